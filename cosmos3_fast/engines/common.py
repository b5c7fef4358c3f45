"""What the engine adapters share: the mode, and a folded encoder that follows its VAE."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.vae import FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.accelerated import Mode, check_mode, uncompiled

MODE_VARIABLE = "COSMOS3_FAST"

# Elements compared per tensor: enough to see any training step, cheap beside an encode.
_SAMPLES = 16


def mode_from_environment() -> Mode:
    """The mode that the environment variable COSMOS3_FAST asks for; "exact" if it is unset.

    Raises:
        ValueError: the variable holds something else.
    """
    value = os.environ.get(MODE_VARIABLE, "").strip().lower()
    return check_mode(value or "exact", MODE_VARIABLE)


class FoldedVAE:
    """The `FrameEncoder` of one VAE, folded when first used and again after a change.

    A change of weights is seen by the identity and version of the parameters and by a sample of
    their values (writes through `.data` leave no other trace). The sample is `_SAMPLES` evenly
    spaced elements of every tensor: a write that touches only others needs `refresh()`.
    The encoder stays on the device it is used on, wherever the VAE is moved meanwhile. Folding
    neither moves the VAE (as the offload hooks of accelerate would) nor compiles it.

    Args:
        vae: see `FrameEncoder.from_vae`.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = uncompiled(vae)
        self._lock = threading.Lock()
        self._encoder: FrameEncoder | None = None
        self._seen: tuple[Any, ...] | None = None
        self._sample: Tensor | None = None

    def refresh(self) -> None:
        """Fold again at the next use."""
        with self._lock:
            self._encoder = None

    def encoder(self, device: torch.device | str) -> FrameEncoder:
        """The folded encoder on `device`, in the VAE's dtype, up to date with its weights.

        Raises:
            UnsupportedVAEError: the VAE cannot be folded.
        """
        with self._lock:
            parameters = self._parameters()
            # A tensor made in inference mode has no version.
            versions = (None if p.is_inference() else p._version for p in parameters)
            seen = tuple((id(p), v, p.dtype) for p, v in zip(parameters, versions, strict=True))
            sample = _sample(parameters)
            stale = (
                self._encoder is None
                or seen != self._seen
                or self._sample is None
                or not torch.equal(sample, self._sample)
            )
            if stale:
                # What was sampled is what is folded, also if the weights change meanwhile.
                with _bare(self._vae) as vae:
                    self._encoder = FrameEncoder.from_vae(vae, device=device)
                # The engine's own encode takes any values.
                self._encoder.checks_values = False
                self._seen, self._sample = seen, sample
            assert self._encoder is not None
            if self._encoder.device != torch.empty(0, device=device).device:
                self._encoder = self._encoder.to(device)
            return self._encoder

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalised latents of pixels [B, 3, H, W] or [B, 3, 1, H, W] on the pixels' device."""
        with torch.no_grad():
            return self.encoder(pixels.device)(pixels)

    def _parameters(self) -> list[nn.Parameter]:
        parameters = [*self._vae.encoder.parameters(), *self._vae.quant_conv.parameters()]
        if any(p.is_meta for p in parameters):
            raise UnsupportedVAEError(
                "the VAE's weights are on the meta device: they are offloaded layer by layer, "
                "and there is nothing to fold"
            )
        return parameters


@contextmanager
def _bare(vae: Any) -> Iterator[Any]:
    """The VAE without its offload hook and with its encoder uncompiled, inside the block."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for name in ("_hf_hook", "encode", "_encode"):
            if name in vars(vae):
                undo.append((vars(vae), name, vars(vae).pop(name)))
        for name in ("encoder", "quant_conv"):
            module = getattr(vae, name)
            if uncompiled(module) is not module:
                undo.append((vae._modules, name, module))
                vae._modules[name] = uncompiled(module)
            for each in uncompiled(module).modules():
                if vars(each).get("_compiled_call_impl") is not None:
                    undo.append((vars(each), "_compiled_call_impl", each._compiled_call_impl))
                    each._compiled_call_impl = None
        yield vae
    finally:
        for attributes, name, value in reversed(undo):
            attributes[name] = value


def _sample(parameters: list[nn.Parameter]) -> Tensor:
    with torch.no_grad():
        views = [p.reshape(-1)[:: max(1, p.numel() // _SAMPLES)] for p in parameters]
        return torch.cat([v.float() for v in views]).cpu()
