"""A picture of prepared latents: what was conditioned, and which frames are fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from cosmos3_fast.frames import pixel_frames
from cosmos3_fast.latents import PreparedLatents

WIDTH = 1440
_MARGIN = 48
_GAP = 24
_TILE_GAP = 10
_MAX_TILES = 96
_BACKGROUND = (250, 250, 248)
_INK = (28, 30, 34)
_MUTED = (112, 116, 124)
_FIXED = (198, 66, 32)
_NOISE = (196, 199, 205)


def render_preview(
    pixels: torch.Tensor,
    prepared: PreparedLatents,
    *,
    title: str,
    notes: Sequence[str] = (),
    decoded: torch.Tensor | None = None,
) -> Image.Image:
    """Draw the conditioning photograph, its latent frame, and the strip of latent frames.

    The latent channels are shown as colors: their first three principal components over the first
    conditioned frame, each stretched from its 1st to its 99th percentile. Noise frames go through
    the same projection, with their own common scale.

    Args:
        pixels: what was encoded, as `load_frames` or `load_pixels` gives it. Of a clip, the last
            pixel frame of the first conditioned latent frame is shown, or of the clip if that is
            shorter.
        prepared: What `LatentPreparation` made of them. Of a batch, the first is shown.
        title: One line, drawn large.
        notes: Lines drawn small below the title.
        decoded: uint8 [H,W,3], the first conditioned latent frame as `FrameDecoder` shows it: drawn
            between the photograph and the latent frame.

    Returns:
        An RGB image `WIDTH` pixels wide; its height depends on the shape of the latents.
    """
    # The principal components do not converge on NaN or infinity: draw those as zero.
    latents = prepared.latents[0].detach().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    first = prepared.condition_frames[0]
    fixed = set(prepared.condition_frames)
    frames, rows, columns = latents.shape[1:]
    basis, center = _principal_components(latents[:, first])

    panels = 2 if decoded is None else 3
    panel_width = (WIDTH - 2 * _MARGIN - (panels - 1) * _GAP) // panels
    panel_height = max(1, round(panel_width * rows / columns))
    shown = min(frames, _MAX_TILES)
    per_row = min(shown, 11 if shown <= 33 else 16)
    tile_width = min((WIDTH - 2 * _MARGIN - (per_row - 1) * _TILE_GAP) // per_row, panel_width // 2)
    tile_height = max(1, round(tile_width * rows / columns))
    tile_rows = -(-shown // per_row)

    top = _MARGIN
    panels_top = top + 46 + 26 * len(notes) + 24
    strip_top = panels_top + panel_height + 40 + 30
    tiles_top = strip_top + 48
    tile_pitch = tile_height + 34
    height = tiles_top + tile_rows * tile_pitch + _MARGIN - 10

    canvas = Image.new("RGB", (WIDTH, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, top), title, fill=_INK, font=_font(32))
    for i, note in enumerate(notes):
        draw.text((_MARGIN, top + 46 + 26 * i), note, fill=_MUTED, font=_font(18))

    low, high = _stretch(_project(latents[:, first], basis, center))
    latent_colors = _colors(latents[:, first], basis, center, low, high)
    photograph = _photograph(pixels, pixel_frames(first + 1) - 1)
    smooth, blocks = Image.Resampling.LANCZOS, Image.Resampling.NEAREST
    shown_panels = [
        (photograph, smooth, f"Conditioning pixels, {photograph.width}x{photograph.height}"),
        (latent_colors, blocks, f"Latent frame {first}, {columns}x{rows}, as colors"),
    ]
    if decoded is None:
        shown_panels[1] = (
            latent_colors,
            blocks,
            f"Latent frame {first}, {columns}x{rows}: {latents.shape[0]} channels as colors "
            "(three principal components)",
        )
    else:
        back = Image.fromarray(decoded.cpu().contiguous().numpy())
        shown_panels.insert(1, (back, smooth, f"Latent frame {first}, decoded"))
    for i, (image, resampling, caption) in enumerate(shown_panels):
        left = _MARGIN + i * (panel_width + _GAP)
        canvas.paste(image.resize((panel_width, panel_height), resampling), (left, panels_top))
        draw.text((left, panels_top + panel_height + 10), caption, fill=_MUTED, font=_font(18))

    noise = [frame for frame in range(frames) if frame not in fixed]
    noise_low, noise_high = (
        _stretch(_project(latents[:, noise[0]], basis, center)) if noise else (low, high)
    )
    draw.text((_MARGIN, strip_top), f"The {frames} latent frames", fill=_INK, font=_font(22))
    _legend(draw, strip_top)
    for i in range(shown):
        x = _MARGIN + (i % per_row) * (tile_width + _TILE_GAP)
        y = tiles_top + (i // per_row) * tile_pitch
        is_fixed = i in fixed
        scale = (low, high) if is_fixed else (noise_low, noise_high)
        tile = _colors(latents[:, i], basis, center, *scale)
        canvas.paste(tile.resize((tile_width, tile_height), Image.Resampling.NEAREST), (x, y))
        outline, line_width = (_FIXED, 4) if is_fixed else (_NOISE, 1)
        right, bottom = x + tile_width + line_width - 1, y + tile_height + line_width - 1
        draw.rectangle(
            (x - line_width, y - line_width, right, bottom), outline=outline, width=line_width
        )
        draw.text(
            (x, y + tile_height + 6),
            f"{i} fixed" if is_fixed else f"{i}",
            fill=_FIXED if is_fixed else _MUTED,
            font=_font(16),
        )
    if shown < frames:
        draw.text(
            (WIDTH - _MARGIN, height - _MARGIN + 8),
            f"and {frames - shown} more",
            fill=_MUTED,
            font=_font(16),
            anchor="rs",
        )
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _legend(draw: ImageDraw.ImageDraw, y: int) -> None:
    font = _font(18)
    x = float(WIDTH - _MARGIN)
    for text, color in (
        ("noise, velocity mask 1", _NOISE),
        ("fixed to the condition, velocity mask 0", _FIXED),
    ):
        x -= draw.textlength(text, font=font)
        draw.text((x, y + 3), text, fill=_MUTED, font=font)
        x -= 26
        draw.rectangle((x, y + 5, x + 16, y + 21), outline=color, width=4)
        x -= 28


def _photograph(pixels: torch.Tensor, frame: int) -> Image.Image:
    """One frame of bytes [1, (T,) H, W, 3], or of floats [1, 3, (T,) H, W] in [-1, 1]."""
    image = pixels[0].detach().cpu()
    if image.dtype != torch.uint8:
        eight_bit = ((image.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        image = eight_bit.movedim(0, -1)
    if image.ndim == 4:
        image = image[min(frame, image.shape[0] - 1)]
    return Image.fromarray(image.contiguous().numpy())


def _principal_components(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The three leading directions [C,3] and the mean [C] of a latent frame [C,h,w]."""
    values = frame.flatten(1).double()
    center = values.mean(dim=1)
    centred = values - center[:, None]
    _, vectors = torch.linalg.eigh(centred @ centred.T)
    basis = vectors[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: fix it, so that the same latents give the same colors.
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return (basis * largest.sign()).float(), center.float()


def _project(frame: torch.Tensor, basis: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """[C,h,w] to its components [h,w,3]."""
    return (frame.permute(1, 2, 0) - center) @ basis


def _stretch(components: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = components.flatten(0, 1)
    return torch.quantile(flat, 0.01, dim=0), torch.quantile(flat, 0.99, dim=0)


def _colors(
    frame: torch.Tensor,
    basis: torch.Tensor,
    center: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> Image.Image:
    unit = (_project(frame, basis, center) - low) / (high - low).clamp_min(1e-12)
    eight_bit = unit.clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(eight_bit.contiguous().numpy())
