"""What the engine adapters share: the mode, and a folded encoder that follows its VAE."""

from __future__ import annotations

import os
import threading
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cosmos3_fast.vae import ConditioningEncoder

Mode = Literal["exact", "fast", "off"]
MODES: tuple[Mode, ...] = ("exact", "fast", "off")
MODE_VARIABLE = "COSMOS3_FAST"

# Elements compared per tensor: enough to see any training step, cheap beside an encode.
_SAMPLES = 16


def check_mode(mode: str, argument: str = "mode") -> Mode:
    """`mode` itself.

    Raises:
        ValueError: it is none of "exact", "fast" and "off".
    """
    for known in MODES:
        if mode == known:
            return known
    raise ValueError(f"{argument} is {mode!r}, wanted one of {', '.join(MODES)}")


def mode_from_environment() -> Mode:
    """The mode that the environment variable COSMOS3_FAST asks for; "exact" if it is unset.

    Raises:
        ValueError: the variable holds something else.
    """
    value = os.environ.get(MODE_VARIABLE, "").strip().lower()
    return check_mode(value or "exact", MODE_VARIABLE)


class FoldedVAE:
    """The `ConditioningEncoder` of one VAE, folded when first used and again after a change.

    A change of weights is seen by the identity and version of the parameters and by a sample of
    their values (writes through `.data` leave no other trace). The sample is `_SAMPLES` evenly
    spaced elements of every tensor: a write that touches only others needs `refresh()`.
    The encoder stays on the device it is used on, wherever the VAE is moved meanwhile.

    Args:
        vae: see `ConditioningEncoder.from_vae`.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._lock = threading.Lock()
        self._encoder: ConditioningEncoder | None = None
        self._seen: tuple[Any, ...] | None = None
        self._sample: Tensor | None = None

    def refresh(self) -> None:
        """Fold again at the next use."""
        with self._lock:
            self._encoder = None

    def encoder(self, device: torch.device | str) -> ConditioningEncoder:
        """The folded encoder on `device`, in the VAE's dtype, up to date with its weights.

        Raises:
            UnsupportedVAEError: the VAE cannot be folded.
        """
        with self._lock:
            parameters = self._parameters()
            seen = tuple((id(p), p._version, p.dtype) for p in parameters)
            sample = _sample(parameters)
            stale = (
                self._encoder is None
                or seen != self._seen
                or self._sample is None
                or not torch.equal(sample, self._sample)
            )
            if stale:
                # The probe inside may move the VAE; what was sampled is what is folded.
                self._encoder = ConditioningEncoder.from_vae(self._vae, device=device)
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
        return [*self._vae.encoder.parameters(), *self._vae.quant_conv.parameters()]


def _sample(parameters: list[nn.Parameter]) -> Tensor:
    with torch.no_grad():
        views = [p.reshape(-1)[:: max(1, p.numel() // _SAMPLES)] for p in parameters]
        return torch.cat([v.float() for v in views]).cpu()
