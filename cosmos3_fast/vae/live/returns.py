"""What `encode` and `decode` of a VAE return: read, and made again from other tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.vae.live.exact import normalize_latents


@dataclass(frozen=True)
class EncodeReturns:
    """The form of what `vae.encode` returns, learnt from one result.

    Attributes:
        posterior: class of the distribution, made from its `parameters`; None for a plain tensor.
        output: class that holds it as `latent_dist`; None where it stands alone.
        in_tuple: it is the only entry of a tuple.
        z_dim: of a tensor that is a mean only: its channels; else None.
        config: of a tensor that is normalised: the statistics; else None.
    """

    posterior: type[Any] | None
    output: type[Any] | None = None
    in_tuple: bool = False
    z_dim: int | None = None
    config: Any = None

    @classmethod
    def of(cls, out: Any) -> tuple[EncodeReturns, Tensor]:
        """The form of `out` and the tensor in it, [B, 2 z_dim or z_dim, T, h, w].

        Raises:
            TypeError: `out` holds neither a tensor nor a distribution with `parameters`.
        """
        in_tuple = isinstance(out, tuple) and len(out) == 1
        inner = out[0] if in_tuple else out
        posterior = getattr(inner, "latent_dist", inner)
        output = None if posterior is inner else type(inner)
        if isinstance(posterior, Tensor):
            return cls(None, output, in_tuple), posterior
        parameters = getattr(posterior, "parameters", None)
        if not isinstance(parameters, Tensor):
            raise TypeError(
                "vae.encode must return a tensor or a distribution with parameters, "
                f"got {type(posterior).__name__}"
            )
        return cls(type(posterior), output, in_tuple), parameters

    @property
    def is_tensor(self) -> bool:
        """Whether it is no distribution."""
        return self.posterior is None

    def without_variance(self, z_dim: int) -> EncodeReturns:
        """The form of a tensor that is the mean alone."""
        return replace(self, z_dim=z_dim)

    def normalized(self, config: Any) -> EncodeReturns:
        """The form of a tensor that is normalised with the statistics of `config`."""
        return replace(self, config=config)

    def make(self, parameters: Tensor, return_dict: bool = True) -> Any:
        """What `vae.encode` returns for these parameters.

        Args:
            parameters: [B, 2 z_dim, T, h, w].
            return_dict: as the caller passes it to `encode`.
        """
        posterior: Any = parameters
        if self.posterior is not None:
            posterior = self.posterior(parameters)
        elif self.z_dim is not None:
            posterior = parameters[:, : self.z_dim].contiguous()
            if self.config is not None:
                posterior = normalize_latents(posterior, self.config)
        if self.in_tuple or not return_dict:
            return (posterior,)
        return posterior if self.output is None else self.output(latent_dist=posterior)


@dataclass(frozen=True)
class DecodeReturns:
    """The form of what `vae.decode` returns, learnt from one result.

    Attributes:
        output: class that holds the pixels as `sample`; None where they stand alone.
        in_tuple: they are the only entry of a tuple.
        dtype: that of the pixels; None: as the latents'.
    """

    output: type[Any] | None = None
    in_tuple: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, out: Any, dtype: torch.dtype) -> DecodeReturns:
        """The form of `out`, decoded from latents of `dtype`.

        Raises:
            TypeError: `out` holds no tensor.
        """
        in_tuple = isinstance(out, tuple) and len(out) == 1
        inner = out[0] if in_tuple else out
        pixels = getattr(inner, "sample", inner)
        if not isinstance(pixels, Tensor):
            raise TypeError(f"vae.decode must return pixels, got {type(inner).__name__}")
        output = None if pixels is inner else type(inner)
        return cls(output, in_tuple, None if pixels.dtype == dtype else pixels.dtype)

    def make(self, pixels: Tensor, return_dict: bool = True) -> Any:
        """What `vae.decode` returns for these pixels, [B, 3, T, H, W]."""
        if self.dtype is not None:
            pixels = pixels.to(self.dtype)
        if self.in_tuple or not return_dict:
            return (pixels,)
        return pixels if self.output is None else self.output(sample=pixels)
