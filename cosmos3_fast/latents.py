"""The stage: an image or clip and a seed to conditioned initial latents.

    condition latents  = (vae.encode(pixels).mode() - mean) / std
    noise              = torch.randn([B,C,T,H/16,W/16], generator)
    latents            = condition latents at the conditioned frames, noise elsewhere
    velocity mask      = 0 at the conditioned frames, 1 elsewhere

as in SGLang's ``Cosmos3LatentPreparationStage`` and diffusers' ``Cosmos3OmniPipeline``, but only
the pixel frames that the conditioned latents depend on are encoded, and those by a folded encoder
where one is given that serves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from cosmos3_fast import ops
from cosmos3_fast.frames import TEMPORAL_FACTOR, frames_wanted, latent_frames, pixel_frames
from cosmos3_fast.pixels import ClipLike, ImageLike, load_frames, normalize_frames
from cosmos3_fast.vae.exact import encode_exact
from cosmos3_fast.vae.topology import read_config

if TYPE_CHECKING:
    from cosmos3_fast.vae import ClipEncoder, FrameEncoder

Mode = Literal["fast", "exact"]


@dataclass(frozen=True)
class PreparedLatents:
    """What the denoising loop starts from.

    Attributes:
        latents: [B,C,T,h,w] contiguous in the dtype asked for: the condition latents at
            ``condition_frames``, noise elsewhere.
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
        encoder: The folded encoder. A `FrameEncoder` serves ``condition_frames == (0,)``, a
            `ClipEncoder` all of them.
        vae: The engine's own VAE (diffusers' ``AutoencoderKLWan`` or one with its interface), which
            serves what the encoder does not, and everything when ``mode="exact"``.

    Raises:
        ValueError: Neither is given, or the two disagree on latent channels or spatial factor.
    """

    def __init__(
        self, encoder: FrameEncoder | ClipEncoder | None = None, *, vae: Any = None
    ) -> None:
        if encoder is None and vae is None:
            raise ValueError("LatentPreparation needs an encoder, a vae, or both; got neither")
        self.encoder = encoder
        self.vae = vae
        layouts = []
        if encoder is not None:
            layouts.append((int(encoder.z_dim), int(encoder.spatial_factor)))
        self.temporal_factor = TEMPORAL_FACTOR
        if vae is not None:
            spatial_factor = read_config(vae.config, "scale_factor_spatial", 16)
            layouts.append((int(read_config(vae.config, "z_dim")), int(spatial_factor)))
            self.temporal_factor = int(
                read_config(vae.config, "scale_factor_temporal", TEMPORAL_FACTOR)
            )
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
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.bfloat16,
        mode: Mode | None = None,
    ) -> PreparedLatents:
        """Encode the conditioning input and blend it with noise.

        Only the first ``4 * max(condition_frames) + 1`` pixel frames are read and encoded: a longer
        clip is cut, a shorter one (or an image) is padded by repeating its last frame, as the
        engines do.

        Args:
            image_or_clip: See `cosmos3_fast.pixels.load_pixels`.
            num_frames: Pixel frames of the video to generate, at least 1. There are
                ``T = (num_frames - 1) // 4 + 1`` latent frames; where ``num_frames`` is not 1 + 4k
                both SGLang and diffusers round down so, and so does this.
            height, width: Pixel size of the video, multiples of the spatial factor (16).
            condition_frames: Latent frames to condition, distinct, in [0, T), in any order.
            seed: Seed of a new generator on the encoder's device, as SGLang makes it.
            generator: A generator on the encoder's device, instead of ``seed``. With neither, noise
                comes from torch's default generator.
            dtype: Dtype of the noise and of every result: float32, bfloat16, float16 (float64 on
                the CPU).
            mode: "fast" or "exact". None: fast where it can serve (a `ClipEncoder` is there, or a
                `FrameEncoder` and ``condition_frames`` is (0,)), exact otherwise.

        Returns:
            `PreparedLatents`, whose ``mode`` says what ran. B = 1 unless ``image_or_clip`` is a
            float tensor with a batch.

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
        mode = self._choose_mode(mode, frames)
        device = self._device(mode)
        _check_dtype(dtype, device)
        generator = _check_generator(seed, generator, device)
        needed = pixel_frames(frames_wanted(frames), self.temporal_factor)
        pixels = load_frames(image_or_clip, height, width, max_frames=needed)

        shape = (
            pixels.shape[0],
            self.z_dim,
            latent_frames(num_frames, self.temporal_factor),
            height // self.spatial_factor,
            width // self.spatial_factor,
        )
        # Noise before encoding, as SGLang orders it.
        noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        condition = self._encode(pixels, needed, mode, total=shape[2]).to(dtype)
        latents, velocity_mask = ops.prepare_latents(condition, noise, frames)
        return PreparedLatents(latents, velocity_mask, condition, frames, mode)

    def _choose_mode(self, mode: Mode | None, frames: tuple[int, ...]) -> Mode:
        serves = self.encoder is not None and (
            frames == (0,) or getattr(self.encoder, "takes_clips", False)
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
        return self.vae.encoder.conv_in.weight.device

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
        ValueError: A size that is no positive multiple of the spatial factor, ``num_frames < 1``,
            condition frames that are none, repeated, or outside the latent frames.
    """
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        if not _is_int(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    for name, value in (("height", height), ("width", width)):
        if value % spatial_factor:
            raise ValueError(
                f"{name} must be a multiple of the VAE's spatial factor {spatial_factor}, "
                f"got {value}"
            )
    total = latent_frames(num_frames, temporal_factor)
    try:
        frames = tuple(condition_frames)
    except TypeError:
        frames = ()
    if not frames or not all(_is_int(frame) for frame in frames):
        raise ValueError(
            "condition_frames must be a non-empty sequence of integers, "
            f"got {condition_frames!r} of type {type(condition_frames).__name__}"
        )
    for frame in frames:
        if not 0 <= frame < total:
            raise ValueError(
                f"condition_frames must be in [0, {total}) for num_frames={num_frames}, got {frame}"
            )
    if len(set(frames)) != len(frames):
        raise ValueError(f"condition_frames must be distinct, got {list(frames)}")
    return tuple(sorted(frames))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if device.type == "cpu":
        allowed.append(torch.float64)
    if dtype not in allowed:
        names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
        raise ValueError(f"dtype must be one of {names} on {device.type}, got {dtype}")


def _check_generator(
    seed: int | None, generator: torch.Generator | None, device: torch.device
) -> torch.Generator | None:
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if seed is not None:
        if not _is_int(seed) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must be an integer in [-2^63, 2^64), got {seed!r}")
        return torch.Generator(device).manual_seed(seed)
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    given = generator.device
    if given.type != device.type or (given.index or 0) != (device.index or 0):
        raise ValueError(f"generator must be on the encoder's device {device}, got one on {given}")
    return generator
