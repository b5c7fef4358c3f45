"""What `encode` and `decode` of a VAE return: read, and made again from other tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Unwrapped(NamedTuple):
    """What `encode` or `decode` returned, taken apart.

    Attributes:
        value: the distribution, or the tensor.
        output: class that holds it; None where it stands alone.
        entries: of the tuple that it is the first of; 0: it is in none.
    """

    value: Any
    output: type[Any] | None
    entries: int

    @classmethod
    def of(cls, out: Any, field: str) -> Unwrapped:
        """Take `out` apart; `field` is the output class's attribute."""
        entries = len(out) if isinstance(out, tuple) else 0
        inner = out[0] if entries else out
        value = getattr(inner, field, inner)
        return cls(value, None if value is inner else type(inner), entries)


def _check_alone(method: str, unwrapped: Unwrapped) -> None:
    if unwrapped.entries > 1:
        raise TypeError(f"vae.{method} must return one thing, got a tuple of {unwrapped.entries}")


@dataclass(frozen=True)
class EncodeReturns:
    """The form of what `vae.encode` returns, learnt from one result.

    Attributes:
        posterior: class of the distribution, made from its `parameters`; None for a plain tensor.
        output: class that holds it as `latent_dist`; None where it stands alone.
        in_tuple: it is the only entry of a tuple.
        z_dim: of a tensor that is a mean only: its channels; else None.
        scale: of a tensor that is normalised: what normalises it; else None.
    """

    posterior: type[Any] | None
    output: type[Any] | None = None
    in_tuple: bool = False
    z_dim: int | None = None
    scale: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, out: Any) -> tuple[EncodeReturns, Tensor]:
        """The form of `out` and the tensor in it, [B, 2 z_dim or z_dim, T, h, w].

        Raises:
            TypeError: `out` holds neither a tensor nor a distribution with `parameters`, or more.
        """
        unwrapped = Unwrapped.of(out, "latent_dist")
        _check_alone("encode", unwrapped)
        posterior, output, in_tuple = unwrapped.value, unwrapped.output, bool(unwrapped.entries)
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

    def scaled(self, scale: Callable[[Tensor], Tensor]) -> EncodeReturns:
        """The form of a tensor that `scale` normalises."""
        return replace(self, scale=scale)

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
            if self.scale is not None:
                posterior = self.scale(posterior)
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
            TypeError: `out` holds no tensor, or more.
        """
        unwrapped = Unwrapped.of(out, "sample")
        _check_alone("decode", unwrapped)
        pixels = unwrapped.value
        if not isinstance(pixels, Tensor):
            raise TypeError(f"vae.decode must return pixels, got {type(pixels).__name__}")
        own_dtype = None if pixels.dtype == dtype else pixels.dtype
        return cls(unwrapped.output, bool(unwrapped.entries), own_dtype)

    def cast(self, pixels: Tensor) -> Tensor:
        """Pixels in the dtype of the result."""
        return pixels if self.dtype is None else pixels.to(self.dtype)

    def make(self, pixels: Tensor, return_dict: bool = True) -> Any:
        """What `vae.decode` returns for these pixels, [B, 3, T, H, W]."""
        pixels = self.cast(pixels)
        if self.in_tuple or not return_dict:
            return (pixels,)
        return pixels if self.output is None else self.output(sample=pixels)


class Finished:
    """Hands finished frames on, each once: also where one way of decoding gives up halfway and
    another one begins anew.

    Args:
        receive: of the caller; takes [B, 3, n, H, W], which it may change.

    Attributes:
        failed: whether `receive` has raised, which is the caller's business.
    """

    def __init__(self, receive: Callable[[Tensor], Any]) -> None:
        self.failed = False
        self._receive = receive
        self._handed = 0
        self._seen = 0

    def restart(self) -> None:
        """What comes next begins with the first frame again."""
        self._seen = 0

    def __call__(self, frames: Tensor) -> None:
        """The next frames, [B, 3, n, H, W]."""
        new = frames[:, :, max(self._handed - self._seen, 0) :]
        self._seen += frames.shape[2]
        if new.shape[2] == 0:
            return
        self._handed += new.shape[2]
        try:
            self._receive(new)
        except BaseException:
            self.failed = True
            raise
