"""Latents as a picture, as frames and as a video file, or an error where they make none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.arguments import dtype_name
from cosmos3_fast.frames import pixel_frames
from cosmos3_fast.images.video import check_video, write_video
from cosmos3_fast.memory import why_not_in_memory
from cosmos3_fast.vae.live.seam import folded_decoder
from cosmos3_fast.vae.networks.decoder import ClipDecoder, FrameDecoder
from cosmos3_fast.vae.source import Decoder, VaeSource, compute_dtype


def save_video(
    decoder: Any,
    latents: Tensor,
    path: str | os.PathLike[str],
    fps: float | Fraction = 24,
    crf: float = 18,
    normalized: bool = True,
    *,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Decode latents and write what they show while it is decoded.

    Frames are encoded in a thread beside the decoder, in memory that does not grow with their
    number. The file is there when all of it is: an error or an interrupt leaves nothing behind.

    Args:
        decoder: a `ClipDecoder`; a `FrameDecoder` for one latent frame; a live VAE, of which such
            a decoder is made (each time, but for one that `accelerate` has made fast, which keeps
            it), on the latents' device where the VAE is on a CPU; or a checkpoint as
            `ClipDecoder.from_pretrained` takes it, on the latents' device, in float32 on a CPU and
            bfloat16 elsewhere.
        latents: [1, z, T, h, w] as a pipeline gives them with `output_type="latent"`, or
            [z, T, h, w] as in `bulk.LatentDataset`; floating point, finite, on any device. They are
            1 + 4(T - 1) frames.
        path: `.mp4` (H.264), `.webm` (VP9), `.gif`, a new or empty folder for `frame_00000.png`
            and so on, or `.png` where T is 1. All but pictures need PyAV: the extra `[video]`.
        fps: frames per second, in [0.01, 1000]; of `.gif` at most 50.
        crf: quality of `.mp4` (0 to 51) and `.webm` (0 to 63); lower is better.
        normalized: the latents have the scale of the model, as in pipelines; False: the VAE's own,
            as `vae.decode` takes them.
        progress: called with the number of frames that are decoded.

    Returns:
        The path that was written, absolute.

    Raises:
        ValueError: latents of another shape or dtype, or not finite, or whose pixels are not; a
            path that must not be written to; a rate or quality that is none.
        UnsupportedVAEError: a live VAE or checkpoint of another family.
        ImportError: PyAV is missing, or has no encoder for this.
        MemoryError: not even the largest layer can fit.
        TypeError: `decoder` is none of these.
    """
    check_video(path, fps, crf)
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor, got {type(latents).__name__}")
    if latents.dim() == 4:
        latents = latents[None]
    if latents.dim() != 5 or latents.shape[0] != 1 or latents.shape[2] < 1:
        raise ValueError(
            "latents must have shape [1, z, T, h, w] or [z, T, h, w] with T >= 1, got "
            f"{list(latents.shape)}"
        )
    _check_finite(latents, "latents")
    network = _network(decoder, latents)
    parts = decoded_frames(network, latents, "latents", normalized)
    height, width = (size * network.spatial_factor for size in latents.shape[3:])
    frames = pixel_frames(latents.shape[2])
    return write_video(parts, path, (height, width), frames, fps, crf, progress)


def _network(given: Any, latents: Tensor) -> Decoder:
    if isinstance(given, (FrameDecoder, ClipDecoder)):
        return given
    if given is None or (isinstance(given, torch.nn.Module) and not hasattr(given, "decoder")):
        raise TypeError(
            "decoder must be a ClipDecoder, a FrameDecoder, a live VAE or a checkpoint, got "
            f"{type(given).__name__}"
        )
    source, clips = VaeSource(given), latents.shape[2] > 1
    if source.checkpoint is None:
        # A pipeline that offloads has its VAE on the CPU when it gives latents.
        own = next(given.decoder.parameters()).device
        device = latents.device if own.type == "cpu" else own
        kept = folded_decoder(given, latents.shape[2], device)
        return kept or (ClipDecoder if clips else FrameDecoder).from_vae(given).to(device)
    return source.decoder(compute_dtype(None, latents.device), latents.device, clips)


def check_memory(decoder: Decoder, shape: torch.Size) -> None:
    """Refuse latents [1, z, T, h, w] whose pixels cannot fit; a lower bound.

    Raises:
        MemoryError: there is less memory, used or not.
    """
    height, width = (size * decoder.spatial_factor for size in shape[-2:])
    # What the last stage reads and what it writes, and the pixels; of a clip, of a block.
    frames = min(4, pixel_frames(shape[2]))
    cells = (height // decoder.topology.patch_size) * (width // decoder.topology.patch_size)
    channels = decoder.topology.stages[-1].out_channels
    size = decoder.dtype.itemsize
    reason = why_not_in_memory(
        f"latents of {shape[-2]}x{shape[-1]} cells, {height}x{width} pixels,",
        frames * (2 * cells * channels * size + 3 * height * width * size),
        decoder.device,
    )
    if reason is not None:
        raise MemoryError(reason)


def decoded_picture(
    decoder: Decoder, latents: Tensor, name: str, normalized: bool = True
) -> Tensor:
    """What `decoder(latents, output="uint8")` gives; of NaN, which is black there, an error.

    Args:
        latents: [1, z, 1, h, w], on any device.
        name: what messages call them.
        normalized: as for `save_video`.

    Returns:
        uint8 [H, W, 3], on the CPU.

    Raises:
        ValueError: the latents or their pixels are not finite.
        MemoryError: see `check_memory`.
    """
    (picture,) = decoded_frames(decoder, latents, name, normalized)
    return picture[0]


def decoded_frames(
    decoder: Decoder, latents: Tensor, name: str, normalized: bool = True
) -> Iterator[Tensor]:
    """The bytes of `ClipDecoder.frames` as they come; of NaN, which is black there, an error.

    What is wrong with the latents is said by the call, with their pixels when they come.

    Args:
        latents: [1, z, T, h, w], on any device; T is 1 for a `FrameDecoder`.
        name, normalized: see `decoded_picture`.

    Yields:
        uint8 [n, H, W, 3], on the CPU: the first frame, then up to 16 at a time.

    Raises:
        ValueError: the latents or their pixels are not finite, or the decoder does not take them.
        MemoryError: see `check_memory`.
    """
    _check_finite(latents, name)
    check_memory(decoder, latents.shape)
    given = latents.to(decoder.device)
    parts: Iterator[Tensor]
    if isinstance(decoder, ClipDecoder):
        parts = decoder.frames(given, normalized=normalized)
    else:
        with torch.no_grad():
            decode = decoder if normalized else decoder.decode_unnormalized
            parts = iter([decode(given)])
    return _checked(parts, decoder, name)


@torch.no_grad()
def _checked(parts: Iterator[Tensor], decoder: Decoder, name: str) -> Iterator[Tensor]:
    """[1, 3, n, H, W] to bytes [n, H, W, 3] on the CPU."""
    for part in parts:
        pixels = part[0].float()
        if not pixels.isfinite().all():
            raise ValueError(
                f"{name} must decode to finite pixels, got NaN or infinity: the weights, or the "
                f"dtype {dtype_name(decoder.dtype)} in which they are computed, do not serve these "
                "latents"
            )
        # As the decoder makes bytes.
        levels = (pixels / 2 + 0.5).mul_(255).round_().to(torch.uint8)
        yield levels.permute(1, 2, 3, 0).contiguous().cpu()


def _check_finite(latents: Tensor, name: str) -> None:
    if not latents.isfinite().all():
        raise ValueError(f"{name} must hold finite values, got NaN or infinity")
