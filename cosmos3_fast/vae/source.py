"""A VAE in any form in which it may be given: its networks, the VAE itself, and its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cosmos3_fast.vae import ClipDecoder, ClipEncoder, FrameDecoder, FrameEncoder, synthetic
from cosmos3_fast.vae.checkpoint.reading import open_checkpoint
from cosmos3_fast.vae.fold import Taps
from cosmos3_fast.vae.networks.base import FoldedNetwork
from cosmos3_fast.vae.topology import EncoderTopology

Encoder = FrameEncoder | ClipEncoder
Decoder = FrameDecoder | ClipDecoder
Network = TypeVar("Network", bound=FoldedNetwork)

SYNTHETIC_SEED = 0
"""Seed of the weights where no VAE is given."""


def compute_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """`dtype`, or where it is None what a network on `device` computes in by default.

    That is float32 on a CPU and bfloat16 elsewhere.
    """
    if dtype is not None:
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class VaeSource:
    """A VAE given in any form.

    `str(source)` names it: its path or repository, its class, or "synthetic".

    Args:
        vae: a checkpoint (a folder, one file of weights or a repository: see
            `FrameEncoder.from_pretrained`), a live VAE, a `FrameEncoder` or `ClipEncoder`, or None
            for seeded random weights of the Cosmos3 topology, whose latents mean nothing.

    Raises:
        TypeError: it is none of these.
    """

    vae: Any = None

    def __post_init__(self) -> None:
        if not (
            self.vae is None
            or isinstance(self.vae, (str, os.PathLike, FrameEncoder, ClipEncoder))
            or hasattr(self.vae, "encoder")
        ):
            raise TypeError(
                "vae must be a checkpoint's path or repository, a live VAE, a FrameEncoder, a "
                f"ClipEncoder or None, got {type(self.vae).__name__}"
            )

    def __str__(self) -> str:
        if self.vae is None:
            return f"synthetic (random weights, seed {SYNTHETIC_SEED})"
        return self.checkpoint or type(self.vae).__name__

    @property
    def checkpoint(self) -> str | None:
        """The path or repository, where it is one."""
        return os.fspath(self.vae) if isinstance(self.vae, (str, os.PathLike)) else None

    def absolute(self) -> VaeSource:
        """The same VAE, also for a process in another folder."""
        here = self.checkpoint is not None and os.path.exists(self.checkpoint)
        return VaeSource(os.path.abspath(self.vae)) if here else self

    def encoder(self, dtype: torch.dtype, device: torch.device, clips: bool) -> Encoder:
        """The network that encodes; an encoder that was given keeps its own dtype and device.

        Args:
            clips: a `ClipEncoder` is wanted, not a `FrameEncoder`.

        Raises:
            ValueError: clips are wanted of a `FrameEncoder`.
        """
        if isinstance(self.vae, ClipEncoder):
            return self.vae if clips else self.vae.first
        if isinstance(self.vae, FrameEncoder):
            if clips:
                raise ValueError("vae must be a ClipEncoder to encode clips, got a FrameEncoder")
            return self.vae
        kind: type[Encoder] = ClipEncoder if clips else FrameEncoder
        return self._network(kind, synthetic.synthetic_state_dict, dtype, device)

    def decoder(self, dtype: torch.dtype, device: torch.device, clips: bool = False) -> Decoder:
        """The network that shows latents.

        Args:
            clips: a `ClipDecoder` is wanted, not a `FrameDecoder`.

        Raises:
            ValueError: only an encoder was given.
        """
        if isinstance(self.vae, (FrameEncoder, ClipEncoder)):
            raise ValueError(f"vae must have a decoder to show latents, got a {self}")
        kind: type[Decoder] = ClipDecoder if clips else FrameDecoder
        return self._network(kind, synthetic.synthetic_decoder_state_dict, dtype, device)

    def _network(
        self,
        kind: type[Network],
        random_weights: Callable[[Any, int], dict[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Network:
        if self.vae is None:
            config = _synthetic_config()
            tensors = random_weights(config, SYNTHETIC_SEED)
            return kind.from_state_dict(tensors, config, dtype, device)
        if self.checkpoint is not None:
            return kind.from_pretrained(self.checkpoint, dtype=dtype, device=device)
        return kind.from_vae(self.vae, dtype, device)

    def live(self, dtype: torch.dtype, device: torch.device, decodes: bool = False) -> Any:
        """diffusers' VAE, or the live VAE that was given as it is.

        Args:
            decodes: random weights have a small decoder unless it is to decode.

        Raises:
            ImportError: diffusers is needed and cannot be imported.
            ValueError: an encoder or one file of weights was given.
        """
        if isinstance(self.vae, (FrameEncoder, ClipEncoder)):
            raise ValueError(f"vae must be the VAE itself in exact mode, got a {self}")
        if self.vae is not None and self.checkpoint is None:
            return self.vae
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as error:
            raise ImportError(
                f"the VAE itself needs diffusers, which cannot be imported ({error}): "
                "pip install 'cosmos3-fast[diffusers]'"
            ) from error
        if self.checkpoint is None:
            vae = synthetic.synthetic_vae(
                synthetic.COSMOS3_VAE_CONFIG,
                SYNTHETIC_SEED,
                decoder_base_dim=None if decodes else 16,
            )
        elif Path(self.checkpoint).is_file():
            raise ValueError(
                "vae must be a folder as diffusers writes it where the VAE itself is read, got one "
                f"file, {self.checkpoint!r}: use the fast mode"
            )
        else:
            bare = (Path(self.checkpoint) / "config.json").is_file()
            vae = AutoencoderKLWan.from_pretrained(
                self.checkpoint, subfolder=None if bare else "vae", torch_dtype=dtype
            )
        # diffusers' own `to` warns of modules to keep in float32, of which this VAE has none.
        return torch.nn.Module.to(vae, device, dtype).eval()

    def fingerprint(self, clips: bool = False) -> str:
        """SHA-256, in hexadecimal, of the weights that encode and the latent statistics.

        It is taken of the values in float32, so that a checkpoint and the same VAE in memory agree
        as long as neither was rounded. That of an encoder is of its folded weights, and differs.

        Args:
            clips: also of the earlier temporal taps, which act from the second frame on.
        """
        if isinstance(self.vae, (FrameEncoder, ClipEncoder)):
            first = self.vae.first if isinstance(self.vae, ClipEncoder) and not clips else self.vae
            return _digest(first.topology, sorted(first.state_dict().items()))
        if self.checkpoint is not None:
            with open_checkpoint(self.checkpoint, "vae", EncoderTopology) as checkpoint:
                topology = checkpoint.topology
                return _hash(topology, Taps(checkpoint.tensors, topology), clips)
        config: Any
        tensors: Mapping[str, Tensor]
        if self.vae is None:
            config = _synthetic_config()
            tensors = synthetic.synthetic_state_dict(config, SYNTHETIC_SEED)
        else:
            config, tensors = self.vae.config, self.vae.state_dict()
        topology = EncoderTopology.from_state_dict(
            {name: tuple(t.shape) for name, t in tensors.items() if EncoderTopology.holds(name)},
            config,
        )

        return _hash(topology, Taps(tensors, topology), clips)


def _synthetic_config() -> dict[str, Any]:
    return synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, SYNTHETIC_SEED)


def _hash(topology: Any, taps: Taps, clips: bool) -> str:
    def values() -> Iterator[tuple[str, Tensor]]:
        for name, shape in sorted(topology.tensor_shapes().items()):
            yield name, taps.last(name)
            if clips and len(shape) == 5 and shape[2] > 1:
                yield f"{name} before the last tap", taps.all(name)[:, :, :-1]

    return _digest(topology, values())


def _digest(topology: Any, values: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(repr(topology.output_statistics).encode())
    for name, tensor in values:
        single = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(single.shape)}".encode())
        digest.update(single.numpy().data)
    return digest.hexdigest()
