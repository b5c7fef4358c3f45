"""`FoldedNetwork`: what all networks of 2-D convolutions, folded from a 3-D VAE, have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, repeat
from operator import contains, is_not, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cosmos3_fast.frames import TEMPORAL_FACTOR
from cosmos3_fast.ops._torch import PLAIN_TENSORS, has_hooks_of_all_modules, is_watched
from cosmos3_fast.ops.checks import FLOAT_DTYPES as _DTYPES
from cosmos3_fast.ops.registry import unobserved
from cosmos3_fast.vae.checkpoint.reading import open_checkpoint
from cosmos3_fast.vae.compatibility import check_modules
from cosmos3_fast.vae.fold import fold
from cosmos3_fast.vae.networks.causal import Temporal, WinogradConv
from cosmos3_fast.vae.topology import Topology, UnsupportedVAEError

if TYPE_CHECKING:
    from typing import Self


_is_there = partial(is_not, None)
_hooks, _hooks_before = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")


class _Parts(NamedTuple):
    """What a network's modules hold, in dictionaries that live on.

    Attributes:
        below: of each module the modules below it, the network's own first.
        modules: all of them.
        attributes: of the modules below.
        tensors: of all.
    """

    below: list[dict[str, Any]]
    modules: list[Any]
    attributes: list[dict[str, Any]]
    tensors: list[dict[str, Any]]


class FoldedNetwork(nn.Module):
    """A network folded from the encoder or the decoder of a Wan-family VAE.

    Use `from_vae`, `from_pretrained` or `from_state_dict`; the constructor gives a network with
    initial weights, to receive a `state_dict()` of the same topology. Parameters do not require
    gradients.

    Args:
        topology: the structure.
        dtype: of the parameters and of the result: float32, bfloat16, float16 or float64.
        temporal: how frames after a clip's first are taken; None: a network for single frames.

    Attributes:
        topology: as given, a `topology_type`.
        z_dim: latent channels.
        spatial_factor: pixels per latent cell along height and width.
        takes_clips: whether it takes more than one frame.
        folded_dtype: `dtype` as given, whatever the parameters were converted to since.

    Raises:
        UnsupportedVAEError: a network for clips, and a temporal factor other than 4.
    """

    topology_type: ClassVar[type[Topology]]
    takes_clips: ClassVar[bool] = False

    def __init__(self, topology: Any, dtype: torch.dtype, temporal: Temporal | None = None) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {[str(d) for d in _DTYPES]}, got {dtype}")
        if temporal is not None and topology.temporal_factor != TEMPORAL_FACTOR:
            raise UnsupportedVAEError(
                f"the temporal factor must be {TEMPORAL_FACTOR}, got {topology.temporal_factor} "
                "(config: temperal_downsample)"
            )
        self.topology = topology
        self.z_dim: int = topology.z_dim
        self.spatial_factor: int = topology.spatial_factor
        self.folded_dtype = dtype
        self._temporal = temporal
        self._complete = False
        self._parts: _Parts | None = None

    def _finish(self) -> None:
        """The end of a constructor: parameters of their dtypes and layouts, without gradients."""
        self.to(self.folded_dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)
        self._complete = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._complete and self._temporal is not None:
            weight = self._weight
            to = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            if to != weight.dtype:
                raise TypeError(
                    f"a {type(self).__name__} must be folded in its dtype, got a conversion of "
                    f"{weight.dtype} to {to}: its kernels along time are rounded once, from float64"
                )
        return super()._apply(fn, recurse)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and of the result."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters and of the result."""
        return self._weight.device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}

    def _read(self, given: Tensor) -> list[Tensor] | None:
        """The network's tensors, which a call with `given` reads and nothing else observes.

        None: it is differentiated, a mode, a transform or a tracer is on, a hook is set or a
        forward replaced, or a tensor is of a subclass.
        """
        parts = self._parts
        if (
            parts is None
            or parts.below[0] is not self._modules
            or [*chain.from_iterable(map(dict.values, parts.below))] != parts.modules
        ):
            _, *inner = self.modules()
            below = [module._modules for module in (self, *inner)]
            tensors: list[dict[str, Any]] = []
            for module in (self, *inner):
                tensors += [module._parameters, module._buffers]
            parts = self._parts = _Parts(
                below,
                [*chain.from_iterable(map(dict.values, below))],
                [vars(module) for module in inner],
                tensors,
            )
        if (
            type(given) not in PLAIN_TENSORS
            or is_watched()
            or any(map(_hooks, parts.attributes))
            or any(map(_hooks_before, parts.attributes))
            or has_hooks_of_all_modules()
            or any(map(contains, parts.attributes, repeat("forward")))
        ):
            return None
        held: list[Tensor] = [
            *filter(_is_there, chain.from_iterable(map(dict.values, parts.tensors)))
        ]
        if not {*map(type, held)} <= {*PLAIN_TENSORS}:
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (given, *held)):
            return None
        return held

    def _undisturbed(self, given: Tensor) -> AbstractContextManager[Any]:
        """A context in which ops are called without a question, where nothing observes a call."""
        if torch.compiler.is_compiling() or self._read(given) is None:
            return nullcontext()
        return unobserved(given.device)

    @property
    def _weight(self) -> Tensor:
        conv: Any = self.conv_in
        weight: Tensor = conv.weight
        return weight

    @property
    def roundings(self) -> tuple[torch.dtype, ...]:
        """The dtypes to which it rounds on the way: its own, and that of products along time."""
        return (self.dtype,) if self._temporal is None else (self.dtype, self._temporal.dtype)

    @classmethod
    def from_vae(
        cls,
        vae: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        probe: bool = True,
        winograd: bool = True,
        **options: Any,
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
                take a Winograd convolution, whose largest error is up to 12 eps of its largest
                value at 1024 channels, against 3 of a direct one, and in which one NaN spoils its
                whole tile.
            options: those of the constructor.

        Raises:
            UnsupportedVAEError: the structure, a tensor, a module's setting or the probe differs
                from what this network computes, or a tensor is not finite in `dtype`.
        """
        part, outer_conv = cls.topology_type.part, cls.topology_type.outer_conv
        if not all(hasattr(vae, name) for name in (part, outer_conv, "config")):
            raise UnsupportedVAEError(
                f"vae must have {part}, {outer_conv} and config, got a {type(vae).__name__}"
            )
        vae = getattr(vae, "_orig_mod", vae)  # of torch.compile
        if hasattr(getattr(vae, part), "_orig_mod"):
            raise UnsupportedVAEError(
                f"vae.{part} must not be compiled, got one that is: fold the VAE first"
            )
        tensors = vae.state_dict()
        topology = cls._checked_topology(tensors, vae.config)
        check_modules(vae, topology, cls.takes_clips)
        network = cls._from_tensors(topology, tensors, dtype, device, winograd, options)
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
        **options: Any,
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
            winograd, options: as for `from_vae`.

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
            return cls._folded(
                checkpoint.topology,
                checkpoint.tensors,
                dtype,
                "cpu" if device is None else device,
                winograd,
                options,
            )

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        config: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        winograd: bool = True,
        **options: Any,
    ) -> Self:
        """Fold a 3-D VAE's state dict (not this module's own: that is `load_state_dict`).

        Args:
            tensors: names as in diffusers; entries of other parts of the VAE are ignored.
            config: the VAE's configuration, a mapping or an object.
            dtype, device: default: those of the first convolution's weight.
            winograd, options: as for `from_vae`.

        Raises:
            UnsupportedVAEError: see `Topology.from_state_dict`; or a tensor has no values, has
                another dtype, or is not finite in `dtype`.
        """
        topology = cls._checked_topology(tensors, config)
        return cls._from_tensors(topology, tensors, dtype, device, winograd, options)

    @classmethod
    def _checked_topology(cls, tensors: Mapping[str, Tensor], config: Any) -> Any:
        used = {name: t for name, t in tensors.items() if cls.topology_type.holds(name)}
        topology = cls.topology_type.from_state_dict(
            {name: tuple(tensor.shape) for name, tensor in used.items()}, config
        )
        for name, tensor in used.items():
            if tensor.is_meta:
                raise UnsupportedVAEError(
                    f"{name} must have values, got a tensor on the meta device"
                )
            if tensor.dtype not in _DTYPES:
                raise UnsupportedVAEError(
                    f"{name} must be one of {[str(d) for d in _DTYPES]}, got {tensor.dtype}"
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
        options: Mapping[str, Any],
    ) -> Self:
        weight = tensors[f"{topology.part}.conv_in.weight"]
        return cls._folded(
            topology,
            tensors,
            weight.dtype if dtype is None else dtype,
            weight.device if device is None else device,
            winograd,
            options,
        )

    @classmethod
    def _folded(
        cls,
        topology: Any,
        tensors: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device | str | int,
        winograd: bool,
        options: Mapping[str, Any],
    ) -> Self:
        """The network of these tensors, or slices of a file (`fold.Taps`)."""
        network: Any = cls(topology, dtype, device="meta", **options)  # type: ignore[call-arg]
        for module in network.modules():
            if isinstance(module, WinogradConv):
                module.winograd = winograd
        network.load_state_dict(fold(network, tensors, device), assign=True)
        network.requires_grad_(False)
        return network.to(device)

    def _probe(self, vae: Any) -> None:
        """Raises UnsupportedVAEError unless a tiny input gives what the VAE gives."""
        raise NotImplementedError


def temporal_form(dtype: torch.dtype, products: torch.dtype | None, direct: bool) -> Temporal:
    """How a network of `dtype` takes the frames after the first; see `ClipDecoder`.

    Raises:
        ValueError: products of another dtype than float16 or the network's.
    """
    if products is None:
        products = torch.float16 if dtype == torch.bfloat16 and not direct else dtype
    if products not in (dtype, torch.float16) or (direct and products != dtype):
        also = "" if direct else " or torch.float16"
        raise ValueError(f"products must be the network's dtype, {dtype}{also}, got {products}")
    if direct:
        return Temporal(1, products)
    # Six products need a finer dtype than the frames have: four, of two frames, round less.
    return Temporal(2 if products == dtype else 4, products)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast: a network promises its `dtype`, and is folded for it."""
    if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
