"""Small pictures and a small VAE for the tests of `cosmos3_fast.bulk`."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint_files import write_checkpoint
from encoder_cases import TINY, TINY_CLIP
from PIL import Image

from cosmos3_fast import ClipEncoder, FrameEncoder
from cosmos3_fast.bulk import LatentDataset, encode
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict, synthetic_state_dict

# Multiples of the tiny VAE's spatial factor, 4.
SIZE = (16, 24)


@functools.cache
def tiny_encoder(seed: int = 0) -> FrameEncoder:
    return FrameEncoder.from_state_dict(synthetic_state_dict(TINY, seed), TINY, torch.float32)


@functools.cache
def tiny_clip_encoder() -> ClipEncoder:
    tensors = synthetic_state_dict(TINY_CLIP, 0)
    return ClipEncoder.from_state_dict(tensors, TINY_CLIP, torch.float32)


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of the VAE of `tiny_encoder`, with a decoder."""
    config = {**TINY, "decoder_base_dim": 8}
    tensors = synthetic_state_dict(config, seed) | synthetic_decoder_state_dict(config, seed)
    write_checkpoint(folder / "vae", config, tensors)
    return folder


def picture(seed: int, height: int = 20, width: int = 30) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(seed: int, height: int = 20, width: int = 30) -> bytes:
    buffer = io.BytesIO()
    picture(seed, height, width).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, count: int, first: int = 0) -> list[Path]:
    """PNG files of as many seeds from `first` on, in two levels of folders."""
    paths = []
    for seed in range(first, first + count):
        path = folder / f"part{seed // 8}" / f"{seed:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
        paths.append(path)
    return paths


def encode_tiny(source: Any, out: Path, **options: Any) -> Any:
    """`encode` with the tiny VAE, in this process alone unless told otherwise."""
    settings: dict[str, Any] = {"vae": tiny_encoder(), "size": SIZE, "workers": 0}
    if "buckets" in options:
        del settings["size"]
    return encode(source, out, **{**settings, **options})


def contents(out: Path) -> dict[str, tuple[list[str], torch.Tensor]]:
    """By key: every name and the latents."""
    dataset = LatentDataset(out)
    found = {
        sample["key"]: (sorted(dataset.names(i)), sample["latents"])
        for i, sample in enumerate(dataset[i] for i in range(len(dataset)))
    }
    assert len(found) == len(dataset)
    return found


def same_contents(out: Path, wanted: Path) -> bool:
    """Whether two folders hold the same samples under the same names."""
    ours, theirs = contents(out), contents(wanted)
    return ours.keys() == theirs.keys() and all(
        ours[key][0] == names and close(ours[key][1], latents)
        for key, (names, latents) in theirs.items()
    )


def close(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether latents differ by no more than a batch of another size makes them.

    A convolution may sum in another order then, which can turn the last bit of bfloat16: 2^-8 of
    a value.
    """
    return ours.dtype == wanted.dtype and torch.allclose(ours, wanted, rtol=2**-7, atol=1e-5)
