"""The stage: an image or clip and a seed to conditioned initial latents.

    condition latents  = (vae.encode(pixels).mode() - mean) / std
    noise              = torch.randn([B,C,T,H/16,W/16], generator)
    latents            = condition latents at the conditioned frames, noise elsewhere
    velocity mask      = 0 at the conditioned frames, 1 elsewhere

as in SGLang's `Cosmos3LatentPreparationStage` and diffusers' `Cosmos3OmniPipeline`, but only
the pixel frames that the conditioned latents depend on are encoded, and those by a folded encoder
where one is given that serves them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cosmos3_fast import ops
from cosmos3_fast.arguments import as_int, dtype_name, positive_int, quoted
from cosmos3_fast.frames import (
    TEMPORAL_FACTOR,
    conditioned_span,
    is_whole,
    latent_frames,
    pixel_frames,
)
from cosmos3_fast.images.clips import Keep
from cosmos3_fast.images.decode import Color
from cosmos3_fast.images.load import ClipLike, ImageLike, load_frames, normalize_frames
from cosmos3_fast.ops.checks import FLOAT_DTYPES, LATENT_DTYPES
from cosmos3_fast.vae.config import read_config, read_factors
from cosmos3_fast.vae.live.exact import computes_in, encode_exact
from cosmos3_fast.vae.live.paths import Mode, serves_fast

if TYPE_CHECKING:
    from cosmos3_fast.vae import ClipEncoder, FrameEncoder


@dataclass(frozen=True)
class PreparedLatents:
    """What the denoising loop starts from.

    Attributes:
        latents: [B,C,T,h,w] contiguous in the dtype asked for: the condition latents at
            `condition_frames`, noise elsewhere.
        velocity_mask: [1,1,T,1,1] in the same dtype: 0 at the conditioned frames, 1 elsewhere.
        condition_latents: [B,C,Tc,h,w] in the same dtype, normalised, with
            Tc = max(condition_frames) + 1.
        condition_frames: The conditioned latent frames, ascending.
        mode: What encoded them: "fast" (the folded encoder) or "exact" (the VAE itself).
    """

    latents: torch.Tensor
    velocity_mask: torch.Tensor
    condition_latents: torch.Tensor
    condition_frames: tuple[int, ...]
    mode: Mode


class LatentPreparation:
    """Prepare conditioned initial latents from an image or a clip.

    Args:
        encoder: The folded encoder. A `FrameEncoder` serves `condition_frames == (0,)`, a
            `ClipEncoder` all of them.
        vae: The engine's own VAE (diffusers' `AutoencoderKLWan` or one with its interface), which
            serves what the encoder does not, and everything when `mode="exact"`.

    Raises:
        ValueError: Neither is given, or the two disagree on latent channels or spatial factor.
    """

    def __init__(
        self, encoder: FrameEncoder | ClipEncoder | None = None, *, vae: Any = None
    ) -> None:
        if encoder is None and vae is None:
            raise ValueError("LatentPreparation needs an encoder, a vae, or both; got neither")
        if encoder is not None and not hasattr(encoder, "spatial_factor"):
            raise ValueError(
                f"encoder must be a FrameEncoder or ClipEncoder, got {type(encoder).__name__}: "
                "give a VAE as LatentPreparation(vae=...), or folded as FrameEncoder.from_vae(vae)"
            )
        self.encoder = encoder
        self.vae = vae
        layouts = []
        if encoder is not None:
            layouts.append((int(encoder.z_dim), int(encoder.spatial_factor)))
        topology = getattr(encoder, "topology", None)
        self.temporal_factor = topology.temporal_factor if topology else TEMPORAL_FACTOR
        if vae is not None:
            spatial_factor, self.temporal_factor = read_factors(vae.config)
            layouts.append((int(read_config(vae.config, "z_dim")), spatial_factor))
        if len(set(layouts)) != 1:
            raise ValueError(
                "encoder and vae must agree on (latent channels, spatial factor), got "
                f"{layouts[0]} and {layouts[1]}"
            )
        self.z_dim, self.spatial_factor = layouts[0]

    @torch.no_grad()
    def __call__(
        self,
        image_or_clip: ImageLike | ClipLike,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        condition_frames: Sequence[int] = (0,),
        *,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        mode: Mode | None = None,
        batch: bool = False,
        keep: Keep = "first",
        noise_device: torch.device | str | int | None = None,
        background: Color | None = None,
    ) -> PreparedLatents:
        """Encode the conditioning input and blend it with noise.

        Only the first `4 * max(condition_frames) + 1` pixel frames are read and encoded: a longer
        clip is cut, a shorter one (or an image) is padded by repeating its last frame, as the
        engines do.

        Args:
            image_or_clip: See `cosmos3_fast.images.load.load_pixels`.
            num_frames: Pixel frames of the video to generate, at least 1. There are
                `T = (num_frames - 1) // 4 + 1` latent frames; where `num_frames` is not 1 + 4k
                both SGLang and diffusers round down so, and so does this, with a warning.
            height, width: Pixel size of the video, multiples of the spatial factor (16).
            condition_frames: Latent frames to condition, distinct, in [0, T), in any order.
            seed: Seed of a new generator on the noise's device, as SGLang makes it. A sequence has
                one per sample of a batch: sample i is then, bit for bit, that of a run by itself
                with seed i. One seed for a batch draws all of its noise in one go.
            generator: One or several generators on the noise's device, instead of `seed`. With
                neither, noise comes from torch's default generator.
            dtype: Dtype of the noise and of every result: float32, bfloat16, float16 (float64 on
                the CPU).
            mode: "fast" or "exact". None: fast where it can serve (a `ClipEncoder` is there, or a
                `FrameEncoder` and `condition_frames` is (0,)), exact otherwise.
            batch: `image_or_clip` is a batch: a list of images or clips, or a uint8 array
                [B,H,W,3] or [B,T,H,W,3]. Otherwise a list is a clip. Float tensors have their own
                batch in any case.
            keep: Which end of a clip that is longer than needed: "first" or "last".
            noise_device: Where the noise is drawn; None: on the encoder's device. "cpu" gives the
                same noise for every device.
            background: See `cosmos3_fast.images.load.load_pixels`.

        Returns:
            `PreparedLatents`, whose `mode` says what ran. B = 1 unless `image_or_clip` is a
            batch.

        Raises:
            ValueError, TypeError, FileNotFoundError: Every argument is checked before anything is
                encoded and before the generator is touched.
        """
        frames = check_request(
            num_frames,
            height,
            width,
            condition_frames,
            spatial_factor=self.spatial_factor,
            temporal_factor=self.temporal_factor,
        )
        num_frames, height, width = map(int, (num_frames, height, width))
        total = latent_frames(num_frames, self.temporal_factor)
        wanted = conditioned_span(frames)
        mode = self._choose_mode(mode, wanted, frames)
        device = self._device(mode)
        _check_dtype(dtype, device)
        drawn_on = device if noise_device is None else torch.device(noise_device)
        generators = _check_generators(seed, generator, drawn_on)
        needed = pixel_frames(wanted, self.temporal_factor)
        samples = [
            load_frames(
                sample,
                height,
                width,
                max_frames=needed,
                keep=keep,
                background=background,
                device=device,
            )
            for sample in _samples(image_or_clip, batch)
        ]
        size = sum(sample.shape[0] for sample in samples)
        if _is_sequence(seed) or _is_sequence(generator):
            if len(generators) != size:
                raise ValueError(
                    f"seed or generator must be one, or one per sample: got {len(generators)} for "
                    f"{size} samples"
                )
            # Each by itself: convolutions of a batch may round differently.
            samples = [part for sample in samples for part in sample.split(1)]
        if not is_whole(num_frames, self.temporal_factor):
            warnings.warn(
                f"num_frames={num_frames} is not 1 + {self.temporal_factor}k: the latents are "
                f"those of {pixel_frames(total, self.temporal_factor)} frames, as in the engines",
                stacklevel=2,
            )

        spatial = (height // self.spatial_factor, width // self.spatial_factor)
        # Noise before encoding, as SGLang orders it.
        drawn = [
            torch.randn(
                (size // len(generators), self.z_dim, total, *spatial),
                generator=each,
                device=drawn_on,
                dtype=dtype,
            )
            for each in generators
        ]
        latents = (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).to(device)
        encoded = [self._encode(sample, needed, mode, total) for sample in samples]
        condition = torch.cat(encoded).to(device, dtype)
        # Only the conditioned frames of the noise are written.
        velocity_mask = ops.prepare_latents_(condition, latents, frames)
        return PreparedLatents(latents, velocity_mask, condition, frames, mode)

    def _choose_mode(self, mode: Mode | None, wanted: int, frames: tuple[int, ...]) -> Mode:
        serves = self.encoder is not None and serves_fast(
            wanted, getattr(self.encoder, "takes_clips", False)
        )
        if mode is None:
            mode = "fast" if serves else "exact"
            if mode == "exact" and self.vae is None:
                raise ValueError(
                    f"condition_frames={list(frames)} need a ClipEncoder or the VAE itself (exact "
                    "mode), and neither was given: LatentPreparation(encoder, vae=...). A "
                    "FrameEncoder serves [0] only"
                )
        if mode not in ("fast", "exact"):
            raise ValueError(f"mode must be 'fast', 'exact' or None, got {mode!r}")
        if mode == "fast" and self.encoder is None:
            raise ValueError("mode='fast' needs an encoder, and none was given")
        if mode == "fast" and not serves:
            raise ValueError(
                "mode='fast' with a FrameEncoder serves condition_frames=[0] only, "
                f"got {list(frames)}: give a ClipEncoder or use mode='exact'"
            )
        if mode == "exact" and self.vae is None:
            raise ValueError("mode='exact' needs a vae, and none was given")
        return mode

    def _device(self, mode: Mode) -> torch.device:
        if mode == "fast":
            assert self.encoder is not None
            return torch.device(self.encoder.device)
        return computes_in(self.vae)[0]

    def _encode(self, pixels: torch.Tensor, needed: int, mode: Mode, total: int) -> torch.Tensor:
        alone = pixels.ndim == 4 and needed == 1
        # Bytes are [B, T, H, W, 3], floats [B, 3, T, H, W].
        time = 1 if pixels.dtype == torch.uint8 else 2
        clip = pixels.unsqueeze(time) if pixels.ndim == 4 else pixels
        missing = needed - clip.shape[time]
        if missing > 0:
            last = clip.narrow(time, -1, 1)
            clip = torch.cat([clip, *[last] * missing], dim=time)
        if mode == "fast":
            assert self.encoder is not None
            if needed == 1:
                clip = clip.squeeze(time)
            # Bytes are normalised on the encoder's device.
            dtype = clip.dtype if clip.dtype == torch.uint8 else self.encoder.dtype
            return self.encoder(clip.to(self.encoder.device, dtype))
        # As SGLang: an image by itself, a clip as the beginning of one of num_frames.
        clip = normalize_frames(clip) if clip.dtype == torch.uint8 else clip
        return encode_exact(self.vae, clip, 1 if alone else total)


def check_request(
    num_frames: int,
    height: int,
    width: int,
    condition_frames: Sequence[int] = (0,),
    *,
    spatial_factor: int = 16,
    temporal_factor: int = TEMPORAL_FACTOR,
) -> tuple[int, ...]:
    """The checks of `LatentPreparation` that need no encoder.

    Returns:
        The condition frames, ascending.

    Raises:
        ValueError: A size that is no positive multiple of the spatial factor, `num_frames < 1`,
            condition frames that are none, repeated, or outside the latent frames.
    """
    num_frames = positive_int("num_frames", num_frames)
    height, width = positive_int("height", height), positive_int("width", width)
    for name, value in (("height", height), ("width", width)):
        if value % spatial_factor:
            raise ValueError(
                f"{name} must be a multiple of the VAE's spatial factor {spatial_factor}, "
                f"got {value}"
            )
    total = latent_frames(num_frames, temporal_factor)
    try:
        given = [as_int(frame) for frame in condition_frames]
    except TypeError:
        given = []
    frames = [frame for frame in given if frame is not None]
    if not frames or len(frames) != len(given):
        raise ValueError(
            "condition_frames must be a non-empty sequence of integers, "
            f"got {quoted(condition_frames)} of type {type(condition_frames).__name__}"
        )
    for frame in frames:
        if not 0 <= frame < total:
            raise ValueError(
                f"condition_frames must be in [0, {total}) for num_frames={num_frames}, "
                f"got {quoted(frame)}"
            )
    if len(set(frames)) != len(frames):
        raise ValueError(f"condition_frames must be distinct, got {list(frames)}")
    return tuple(sorted(frames))


def _samples(image_or_clip: Any, batch: bool) -> list[Any]:
    """What becomes a sample of its own; a float tensor holds several."""
    if not batch:
        return [image_or_clip]
    if isinstance(image_or_clip, (list, tuple)) and image_or_clip:
        return list(image_or_clip)
    rank = getattr(image_or_clip, "ndim", 0)
    if rank in (4, 5):
        floats = "float" in str(image_or_clip.dtype)
        return [image_or_clip] if floats else list(image_or_clip)
    raise ValueError(
        "image_or_clip must with batch=True be a non-empty list, a uint8 array [B,H,W,3] or "
        f"[B,T,H,W,3], or a float tensor, got {quoted(image_or_clip)}"
    )


def _is_sequence(value: Any) -> bool:
    is_plain = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_plain or getattr(value, "ndim", 0) > 0


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    allowed = FLOAT_DTYPES if device.type == "cpu" else LATENT_DTYPES
    if dtype not in allowed:
        names = ", ".join(map(dtype_name, allowed))
        raise ValueError(f"dtype must be one of {names} on {device.type}, got {dtype}")


def _check_generators(
    seed: Any, generator: Any, device: torch.device
) -> list[torch.Generator | None]:
    """The generators that draw: one for all, or one per sample."""
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if seed is not None:
        seeds = list(seed) if _is_sequence(seed) else [seed]
        numbers = [as_int(each) for each in seeds]
        for given, number in zip(seeds, numbers, strict=True):
            if number is None or not -(2**63) <= number < 2**64:
                raise ValueError(f"seed must be an integer in [-2^63, 2^64), got {quoted(given)}")
        if not numbers:
            raise ValueError("seed must be an integer or one per sample, got none")
        return [torch.Generator(device).manual_seed(n) for n in numbers if n is not None]
    if generator is None:
        return [None]
    generators = list(generator) if _is_sequence(generator) else [generator]
    if not generators:
        raise ValueError("generator must be one or one per sample, got none")
    for each in generators:
        if not isinstance(each, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(each).__name__}")
        found = each.device
        if found.type != device.type or (found.index or 0) != (device.index or 0):
            raise ValueError(
                f"generator must be on the encoder's device {device}, got one on {found}: give "
                f"noise_device={str(found)!r} to draw the noise there"
            )
    return generators
