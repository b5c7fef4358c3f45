"""A contact sheet: samples of a dataset, decoded, with their names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from cosmos3_fast.arguments import positive_int
from cosmos3_fast.bulk.dataset import LatentDataset
from cosmos3_fast.bulk.folder import FolderError
from cosmos3_fast.files import replacing
from cosmos3_fast.vae.show import decoded_picture
from cosmos3_fast.vae.source import VaeSource, compute_dtype

_COLUMNS = 4
_TILE = 320
_GAP = 16
_CAPTION = 26
_BACKGROUND, _INK = (250, 250, 248), (90, 94, 102)


def write_contact_sheet(
    folder: str | os.PathLike[str],
    count: int,
    vae: Any = None,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write `preview.png` into a folder of latents: `count` samples, evenly spread over it.

    Of a clip, the first frame is shown.

    Args:
        folder: from `bulk.encode`.
        count: how many samples; fewer where the folder has fewer.
        vae, vae_dtype, device: as for `bulk.encode`; the VAE must be the folder's.

    Raises:
        FolderError: the folder is empty, or was made with another VAE.
        ValueError: `count` is not positive, the VAE has no decoder, or a sample makes no picture.
    """
    count = positive_int("preview", count)
    weights, device = VaeSource(vae), torch.device(device)
    dataset = LatentDataset(folder, vae)
    if not len(dataset):
        raise FolderError(f"{str(folder)!r} holds no samples to show")
    decoder = weights.decoder(compute_dtype(vae_dtype, device), device)
    shown = min(count, len(dataset))
    samples = [dataset[i * len(dataset) // shown] for i in range(shown)]
    pictures = [
        decoded_picture(decoder, sample["latents"][None, :, :1], sample["source"])
        for sample in samples
    ]
    target = Path(folder) / "preview.png"
    with replacing(target) as partial:
        contact_sheet(pictures, [sample["source"] for sample in samples]).save(partial, "PNG")
    return target


def contact_sheet(pictures: Sequence[torch.Tensor], names: Sequence[str]) -> Image.Image:
    """Pictures, uint8 [H, W, 3] of any sizes, in rows of four, each over the end of its name."""
    columns = min(_COLUMNS, len(pictures))
    tiles = [Image.fromarray(picture.contiguous().numpy()) for picture in pictures]
    for tile in tiles:
        tile.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _CAPTION + _GAP for row in rows]
    size = (columns * (_TILE + _GAP) + _GAP, sum(heights) + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    captions = iter(names)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left = _GAP + column * (_TILE + _GAP)
            sheet.paste(tile, (left, top))
            text = next(captions).rsplit("/", 1)[-1][-40:]
            draw.text((left, top + tile.height + 4), text, fill=_INK, font=font)
        top += height
    return sheet
