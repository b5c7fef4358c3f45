"""The VAE that a dataset is encoded with: where its weights are, its networks, and its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.cli.options import SYNTHETIC_SEED, VaeSource
from cosmos3_fast.vae import ClipEncoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae.checkpoint.reading import open_checkpoint
from cosmos3_fast.vae.fold import Taps
from cosmos3_fast.vae.topology import EncoderTopology

Encoder = FrameEncoder | ClipEncoder


@dataclass(frozen=True)
class Weights:
    """A VAE given in any of the ways that `bulk.encode` takes.

    Args:
        vae: a checkpoint (see `FrameEncoder.from_pretrained`), None for seeded random weights of
            the Cosmos3 topology, a live VAE, or a `FrameEncoder` or `ClipEncoder`.

    Raises:
        TypeError: it is none of these.
    """

    vae: Any

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

    @property
    def _source(self) -> VaeSource | None:
        if self.vae is None or isinstance(self.vae, (str, os.PathLike)):
            return VaeSource(None if self.vae is None else os.fspath(self.vae))
        return None

    def absolute(self) -> Weights:
        """The same, also for a process in another folder."""
        here = isinstance(self.vae, (str, os.PathLike)) and os.path.exists(self.vae)
        return Weights(os.path.abspath(self.vae)) if here else self

    def encoder(self, dtype: torch.dtype, device: torch.device, clips: bool) -> Encoder:
        """The network that encodes; of an encoder that was given, `dtype` and `device` are its own.

        Raises:
            ValueError: clips are wanted of a `FrameEncoder`.
        """
        if isinstance(self.vae, ClipEncoder):
            return self.vae if clips else self.vae.first
        if isinstance(self.vae, FrameEncoder):
            if clips:
                raise ValueError("vae must be a ClipEncoder to encode clips, got a FrameEncoder")
            return self.vae
        if self._source is not None:
            encoder: Encoder = self._source.encoder(dtype, device, clips)
            return encoder
        return (ClipEncoder if clips else FrameEncoder).from_vae(self.vae, dtype, device)

    def decoder(self, dtype: torch.dtype, device: torch.device) -> FrameDecoder:
        """The network that shows latents.

        Raises:
            ValueError: only an encoder was given.
        """
        if isinstance(self.vae, (FrameEncoder, ClipEncoder)):
            raise ValueError(
                f"a preview must have a VAE with a decoder, got a {type(self.vae).__name__}"
            )
        if self._source is not None:
            decoder: FrameDecoder = self._source.decoder(dtype, device)
            return decoder
        return FrameDecoder.from_vae(self.vae, dtype, device)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the weights that act on one frame and the latent statistics.

        It is taken of the values in float32, so that a checkpoint and the same VAE in memory agree
        as long as neither was rounded. That of an encoder is of its folded weights, and differs.
        """
        if isinstance(self.vae, (FrameEncoder, ClipEncoder)):
            encoder = self.vae.first if isinstance(self.vae, ClipEncoder) else self.vae
            return _hash(encoder.topology, encoder.state_dict().__getitem__, encoder.state_dict())
        if self._source is not None and self._source.checkpoint is not None:
            with open_checkpoint(self._source.checkpoint, "vae", EncoderTopology) as checkpoint:
                topology = checkpoint.topology
                return _hash(
                    topology, Taps(checkpoint.tensors, topology).last, topology.tensor_shapes()
                )
        if self._source is not None:
            from cosmos3_fast.vae import synthetic

            config: Any = synthetic.synthetic_config(synthetic.COSMOS3_VAE_CONFIG, SYNTHETIC_SEED)
            tensors: Mapping[str, Tensor] = synthetic.synthetic_state_dict(config, SYNTHETIC_SEED)
        else:
            config, tensors = self.vae.config, self.vae.state_dict()
        topology = EncoderTopology.from_state_dict(
            {name: tuple(t.shape) for name, t in tensors.items() if EncoderTopology.holds(name)},
            config,
        )

        return _hash(topology, Taps(tensors, topology).last, topology.tensor_shapes())


def _hash(topology: Any, read: Callable[[str], Tensor], names: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr(topology.output_statistics).encode())
    for name in sorted(names):
        values = read(name).detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
