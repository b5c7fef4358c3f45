"""`FoldedNetwork`: what all 2-D networks folded from a 3-D VAE have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cosmos3_fast.ops.checks import FLOAT_DTYPES as _DTYPES
from cosmos3_fast.vae.checkpoint.reading import open_checkpoint
from cosmos3_fast.vae.compatibility import check_modules
from cosmos3_fast.vae.fold import Read
from cosmos3_fast.vae.networks.layers import WinogradConv
from cosmos3_fast.vae.topology import Topology, UnsupportedVAEError

if TYPE_CHECKING:
    from typing import Self


class FoldedNetwork(nn.Module):
    """A network folded from the encoder or the decoder of a Wan-family VAE.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology. Parameters do not require
    gradients.

    Args:
        topology: the structure.
        dtype: of the parameters and of the result; fp32, bf16, fp16 or fp64.

    Attributes:
        topology: as given, a `topology_type`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
        takes_clips: whether it takes more than one frame.
    """

    topology_type: ClassVar[type[Topology]]
    takes_clips: ClassVar[bool] = False

    def __init__(self, topology: Any, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}, wanted one of {[str(d) for d in _DTYPES]}")
        self.topology = topology
        self.z_dim: int = topology.z_dim
        self.spatial_factor: int = topology.spatial_factor

    @classmethod
    def from_vae(
        cls,
        vae: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        probe: bool = True,
        winograd: bool = True,
    ) -> Self:
        """Fold a part of a live VAE: diffusers', SGLang's or vLLM-Omni's, read by structure.

        The weights are copied; the VAE can be changed or dropped afterwards.

        Args:
            vae: has `config`, `state_dict()`, and `encoder`, `quant_conv` and, to probe, `encode`;
                or for a decoder `decoder`, `post_quant_conv` and `decode`.
            dtype: default: the VAE's.
            device: default: the VAE's.
            probe: also put something tiny and random through both and compare, so that a
                difference that module attributes do not show is found.
            winograd: False: only direct convolutions. In float32 on the CPU, large images otherwise
                take a Winograd convolution, whose largest error is up to 37 eps of its largest
                value at 640 channels, against 2 of a direct one, and in which one NaN spoils its
                whole tile.

        Raises:
            UnsupportedVAEError: the structure, a tensor, a module's setting or the probe differs
                from what this network computes, or a tensor is not finite in `dtype`.
        """
        part, outer_conv = cls.topology_type.part, cls.topology_type.outer_conv
        if not all(hasattr(vae, name) for name in (part, outer_conv, "config")):
            raise UnsupportedVAEError(f"{type(vae).__name__} has no {part}, {outer_conv} or config")
        vae = getattr(vae, "_orig_mod", vae)  # of torch.compile
        if hasattr(getattr(vae, part), "_orig_mod"):
            raise UnsupportedVAEError(
                f"vae.{part} is compiled: fold the VAE before its {part} is compiled"
            )
        tensors = vae.state_dict()
        topology = cls._checked_topology(tensors, vae.config)
        check_modules(vae, topology, cls.takes_clips)
        network = cls._from_tensors(topology, tensors, dtype, device, winograd)
        if probe:
            network._probe(vae)
        return network

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
        """Fold a part of a checkpoint, reading only the tensors and temporal taps it needs.

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
            UnsupportedVAEError: the configuration or a tensor is not that of a supported VAE, or
                a tensor is not finite in `dtype`.
        """
        hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        with open_checkpoint(
            path_or_repo, subfolder or "", cls.topology_type, variant, hub
        ) as checkpoint:
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
            tensors: names as in diffusers; entries of other parts of the VAE are ignored.
            config: the VAE's configuration, a mapping or an object.
            dtype, device: default: those of the first convolution's weight.
            winograd: as for `from_vae`.

        Raises:
            UnsupportedVAEError: see `Topology.from_state_dict`; or a tensor has no values, has
                another dtype, or is not finite in `dtype`.
        """
        topology = cls._checked_topology(tensors, config)
        return cls._from_tensors(topology, tensors, dtype, device, winograd)

    @classmethod
    def _checked_topology(cls, tensors: Mapping[str, Tensor], config: Any) -> Any:
        used = {name: t for name, t in tensors.items() if cls.topology_type.holds(name)}
        topology = cls.topology_type.from_state_dict(
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

    @classmethod
    def _from_tensors(
        cls,
        topology: Any,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        device: torch.device | str | int | None,
        winograd: bool,
    ) -> Self:
        def last(name: str) -> Tensor:
            tensor = tensors[name].detach()
            return (tensor[:, :, -1:] if tensor.dim() == 5 else tensor)[topology.rows(name)].cpu()

        def earlier(name: str) -> Tensor:
            return tensors[name].detach()[:, :, :-1].cpu()

        weight = tensors[f"{topology.part}.conv_in.weight"]
        return cls._from_fold(
            topology,
            last,
            earlier,
            weight.dtype if dtype is None else dtype,
            weight.device if device is None else device,
            winograd,
        )

    @classmethod
    def _from_fold(
        cls,
        topology: Any,
        read: Read,
        read_earlier: Read,
        dtype: torch.dtype,
        device: torch.device | str | int,
        winograd: bool,
    ) -> Self:
        """Fold what the readers give (those of `fold.fold_clip`), all of which must be finite."""

        def finite(reader: Read) -> Read:
            def read_finite(name: str) -> Tensor:
                tensor = reader(name)
                if not bool(tensor.isfinite().all()):
                    raise UnsupportedVAEError(f"{name} holds values that are not finite")
                return tensor

            return read_finite

        network = cls(topology, dtype, device="meta")  # type: ignore[call-arg]
        for module in network.modules():
            if isinstance(module, WinogradConv):
                module.winograd = winograd
        with torch.device("cpu"):  # whatever the default device is
            folded = network._fold(finite(read), finite(read_earlier))
        for name, tensor in folded.items():
            if not bool(tensor.isfinite().all()):
                raise UnsupportedVAEError(f"{name}, once folded, is not finite in {dtype}")
        network.load_state_dict(folded, assign=True)
        network.requires_grad_(False)
        return network.to(device)

    def _fold(self, read: Read, read_earlier: Read) -> dict[str, Tensor]:
        """The state dict of this network; the readers are those of `fold.fold_clip`."""
        raise NotImplementedError

    def _probe(self, vae: Any) -> None:
        """Raises UnsupportedVAEError unless a tiny input gives what the VAE gives."""
        raise NotImplementedError
