"""`FrameEncoder`: one frame of pixels to normalised latents, as a 2-D network.

`FoldedEncoder` is what it has in common with the encoder for clips (`cosmos3_fast.vae.clip`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cosmos3_fast.ops import pack_pixels
from cosmos3_fast.vae.checkpoint import open_checkpoint
from cosmos3_fast.vae.compatibility import check_modules, probe_against
from cosmos3_fast.vae.fold import Read, fold_encoder
from cosmos3_fast.vae.layers import Attention, Conv3x3, EncoderStage, NormSiLU, ResidualBlock
from cosmos3_fast.vae.topology import EncoderTopology, UnsupportedVAEError, is_encoder_tensor

if TYPE_CHECKING:
    from typing import Self

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FoldedEncoder(nn.Module):
    """A network folded from the encoder of a Wan-family VAE: its sources and common attributes.

    Args:
        topology: the structure.
        dtype: of the parameters and of the latents; fp32, bf16, fp16 or fp64.

    Attributes:
        topology: the `EncoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
        encodes_clips: whether it takes more than one frame.
    """

    encodes_clips: ClassVar[bool] = False

    def __init__(self, topology: EncoderTopology, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}, wanted one of {[str(d) for d in _DTYPES]}")
        self.topology = topology
        self.z_dim = topology.z_dim
        self.spatial_factor = topology.spatial_factor

    @classmethod
    def from_vae(
        cls,
        vae: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        probe: bool = True,
        winograd: bool = True,
    ) -> Self:
        """Fold the encoder of a live VAE: diffusers', SGLang's or vLLM-Omni's, read by structure.

        The weights are copied; the VAE can be changed or dropped afterwards.

        Args:
            vae: has `encoder`, `quant_conv`, `config`, `state_dict()` and, to probe, `encode`.
            dtype: default: the VAE's.
            device: default: the VAE's.
            probe: also encode one tiny random frame (nine, if it encodes clips) with both and
                compare, so that a difference that module attributes do not show is found.
            winograd: False: only direct convolutions. In float32 on the CPU, large images otherwise
                take a Winograd convolution, whose largest error is up to 37 eps of its largest
                value at 640 channels, against 2 of a direct one, and in which one NaN spoils its
                whole tile.

        Raises:
            UnsupportedVAEError: the structure, a tensor, a module's setting or the probe differs
                from what this encoder computes.
        """
        if not hasattr(vae, "encoder") or not hasattr(vae, "config"):
            raise UnsupportedVAEError(f"{type(vae).__name__} has no encoder or no config")
        vae = getattr(vae, "_orig_mod", vae)  # of torch.compile
        if hasattr(vae.encoder, "_orig_mod"):
            raise UnsupportedVAEError(
                "vae.encoder is compiled: fold the VAE before its encoder is compiled"
            )
        tensors = vae.state_dict()
        topology = _checked_topology(tensors, vae.config)
        check_modules(vae, topology, cls.encodes_clips)
        weight = tensors["encoder.conv_in.weight"]
        encoder = cls._from_fold(
            topology,
            *_readers(tensors),
            dtype or weight.dtype,
            weight.device if device is None else device,
            winograd,
        )
        if probe:
            probe_against(vae, encoder, frames=9 if cls.encodes_clips else 1)
        return encoder

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        subfolder: str | None = "vae",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | int | None = None,
        *,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        winograd: bool = True,
    ) -> Self:
        """Fold the encoder of a checkpoint, reading only the tensors and temporal taps it needs.

        Args:
            path_or_repo: a folder with `config.json` and safetensors (one file or shards with an
                index), or one that has them under `subfolder`; or the id of a repository, fetched
                with huggingface_hub; or one file of weights, `.safetensors` or `.pth`, with
                diffusers' or the original Wan tensor names. Without a `config.json` beside it,
                its latent statistics are those of Wan 2.1 (16 channels) or Wan 2.2 (48).
            subfolder: looked into first; None: the folder itself.
            dtype: of the parameters; weights are rounded to it once.
            device: of the parameters; default: the CPU.
            variant: "fp16" takes `diffusion_pytorch_model.fp16.safetensors`, or its shards.
            revision, token, cache_dir, local_files_only: as huggingface_hub takes them.
            winograd: as for `from_vae`.

        Raises:
            CheckpointError: a file is missing, unreadable or truncated.
            UnsupportedVAEError: the configuration or a tensor is not that of a supported encoder.
        """
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        with open_checkpoint(path_or_repo, subfolder or "", variant, hub) as checkpoint:
            return cls._from_fold(
                checkpoint.topology,
                checkpoint.read,
                checkpoint.read_earlier,
                dtype,
                "cpu" if device is None else device,
                winograd,
            )

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        config: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        winograd: bool = True,
    ) -> Self:
        """Fold a 3-D VAE's state dict (not this module's own: that is `load_state_dict`).

        Args:
            tensors: names as in diffusers; entries outside `encoder.` and `quant_conv.` are
                ignored.
            config: the VAE's configuration, a mapping or an object.
            dtype, device: default: those of `encoder.conv_in.weight`.
            winograd: as for `from_vae`.

        Raises:
            UnsupportedVAEError: see `EncoderTopology.from_state_dict`.
        """
        topology = _checked_topology(tensors, config)
        weight = tensors["encoder.conv_in.weight"]
        return cls._from_fold(
            topology,
            *_readers(tensors),
            dtype or weight.dtype,
            weight.device if device is None else device,
            winograd,
        )

    @classmethod
    def _from_fold(
        cls,
        topology: EncoderTopology,
        read: Read,
        read_earlier: Read,
        dtype: torch.dtype,
        device: torch.device | str | int,
        winograd: bool,
    ) -> Self:
        encoder = cls(topology, dtype, device="meta")  # type: ignore[call-arg]
        for module in encoder.modules():
            if isinstance(module, Conv3x3):
                module.winograd = winograd
        with torch.device("cpu"):  # whatever the default device is
            folded = encoder._fold(read, read_earlier)
        encoder.load_state_dict(folded, assign=True)
        encoder.requires_grad_(False)
        return encoder.to(device)

    def _fold(self, read: Read, read_earlier: Read) -> dict[str, Tensor]:
        """The state dict of this network; the readers are those of `fold.fold_clip`."""
        raise NotImplementedError


class FrameEncoder(FoldedEncoder):
    """The encoder of a Wan-family VAE (the one of Cosmos3) for single frames.

    `encoder(pixels)` equals `(vae.encode(pixels).mode() - latents_mean) / latents_std` for one
    frame, computed without 3-D convolutions: a causal convolution sees only zeros before the
    first frame, so its last temporal tap is all that acts (`cosmos3_fast.vae.fold` has the
    algebra). The result is that of the *untiled* VAE: a VAE's tiling switch, which changes
    results at tile borders, is ignored.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology.

    Parameters do not require gradients; gradients to the pixels flow.

    Args:
        topology: the structure.
        dtype: of the parameters and of the latents; fp32, bf16, fp16 or fp64.
        device: of the parameters.

    Attributes:
        topology: the `EncoderTopology`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
    """

    def __init__(
        self,
        topology: EncoderTopology,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(topology, dtype)
        with torch.device(device or torch.get_default_device()):
            width = topology.stages[0].in_channels
            self.conv_in = Conv3x3(topology.in_channels, width)
            self.stages = nn.ModuleList(
                EncoderStage(stage, topology.residual) for stage in topology.stages
            )
            width = topology.stages[-1].out_channels
            self.middle = nn.Sequential(
                ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)
            )
            self.norm_out = NormSiLU(width)
            self.conv_out = Conv3x3(width, topology.z_dim)
        self.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of the latents."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters and of the latents."""
        return self.conv_in.weight.device

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode one frame per batch entry.

        Args:
            pixels: [B, 3, H, W] or [B, 3, 1, H, W] in [-1, 1], floating point (cast to `dtype`),
                any strides; or bytes [B, H, W, 3], uint8, normalised here as the engines do
                (`2 (x / 255) - 1`). On the encoder's device; H and W are multiples of
                `spatial_factor`. B may be 0. On the CPU, values that are not finite or beyond ±2
                (pixels in [0, 255]) are refused.

        Returns:
            [B, z_dim, 1, H/spatial_factor, W/spatial_factor], normalised, contiguous, in `dtype`.

        Raises:
            ValueError: wrong rank, channels, frames, size, dtype, device or values.
        """
        frame = self._checked_frame(pixels)
        check_values(frame)
        kind = frame.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # `dtype` is promised, and folded for
                return self._encode(frame)
        return self._encode(frame)

    def _encode(self, frame: Tensor) -> Tensor:
        if frame.shape[0] == 0:
            sizes = frame.shape[1:3] if frame.dtype == torch.uint8 else frame.shape[2:]
            height, width = (size // self.spatial_factor for size in sizes)
            shape = (0, self.z_dim, 1, height, width)
            return torch.empty(shape, dtype=self.dtype, device=frame.device)
        x = self.conv_in(pack_pixels(frame, self.topology.patch_size, self.dtype))
        for stage in self.stages:
            x = stage(x)
        x = self.conv_out(self.norm_out(self.middle(x)))
        return x.contiguous(memory_format=torch.contiguous_format).unsqueeze(2)

    def _checked_frame(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] floating point or [B, H, W, 3] bytes."""
        shape = list(pixels.shape)
        is_bytes = pixels.dtype == torch.uint8
        if is_bytes:
            if pixels.dim() != 4 or shape[3] != 3:
                raise ValueError(f"pixels are bytes of shape {shape}, wanted [B, H, W, 3]")
        else:
            if pixels.dim() not in (4, 5):
                raise ValueError(
                    f"pixels has shape {shape}, wanted [B, 3, H, W] or [B, 3, 1, H, W]"
                )
            if shape[1] != 3:
                raise ValueError(f"pixels has {shape[1]} channels in shape {shape}, wanted 3")
            if pixels.dim() == 5:
                if shape[2] != 1:
                    raise ValueError(
                        f"pixels has {shape[2]} frames, wanted 1: clips are encoded by "
                        "ClipEncoder or in exact mode, through a VAE "
                        "(cosmos3_fast.vae.exact.encode_exact)"
                    )
                pixels = pixels[:, :, 0]
        factor = self.spatial_factor
        sizes = shape[1:3] if is_bytes else shape[-2:]
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < factor or size % factor:
                raise ValueError(
                    f"pixels has {name} {size}, wanted a positive multiple of {factor}"
                )
        if not is_bytes and not pixels.is_floating_point():
            raise ValueError(
                f"pixels is {pixels.dtype}, wanted floating point in [-1, 1] or uint8 [B, H, W, 3]"
            )
        if pixels.device != self.device:
            raise ValueError(f"pixels is on {pixels.device}, the encoder on {self.device}")
        return pixels

    def _fold(self, read: Read, read_earlier: Read) -> dict[str, Tensor]:
        return fold_encoder(self.topology, read, self.dtype)


def check_values(pixels: Tensor) -> None:
    """Refuse float pixels that are not in [-1, 1] by far; on the CPU, where looking costs no sync.

    Traced tensors have no values to look at.

    Raises:
        ValueError: NaN, infinity, or a value beyond ±2: interpolation overshoots by less.
    """
    if (
        pixels.device.type != "cpu"
        or not pixels.is_floating_point()
        or not pixels.numel()
        or torch.compiler.is_compiling()
        or type(pixels) not in (Tensor, nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(pixels)
    ):
        return
    low, high = (float(value) for value in pixels.detach().aminmax())
    if not -2.0 <= low <= high <= 2.0:  # also false for NaN
        hint = "; give [0,255] as uint8" if low >= 0.0 else ""
        raise ValueError(f"pixels must be in [-1, 1], got values in [{low:g}, {high:g}]{hint}")


def _checked_topology(tensors: Mapping[str, Tensor], config: Any) -> EncoderTopology:
    used = {name: tensor for name, tensor in tensors.items() if is_encoder_tensor(name)}
    topology = EncoderTopology.from_state_dict(
        {name: tuple(tensor.shape) for name, tensor in used.items()}, config
    )
    for name, tensor in used.items():
        if tensor.is_meta:
            raise UnsupportedVAEError(f"{name} is on the meta device: it has no values to fold")
        if tensor.dtype not in _DTYPES:
            raise UnsupportedVAEError(
                f"{name} is {tensor.dtype}, wanted one of {[str(d) for d in _DTYPES]}"
            )
    return topology


def _readers(tensors: Mapping[str, Tensor]) -> tuple[Read, Read]:
    """The last temporal tap of each convolution, and those before it."""

    def last(name: str) -> Tensor:
        tensor = tensors[name].detach()
        return (tensor[:, :, -1:] if tensor.dim() == 5 else tensor).cpu()

    return last, lambda name: tensors[name].detach()[:, :, :-1].cpu()
