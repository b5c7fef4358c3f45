"""Images and clips to the latents of NVIDIA Cosmos3 and back, by 2-D convolutions.

The ops are imported with the package; everything else when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cosmos3_fast.ops import BackendUnavailableError, prepare_latents, prepare_latents_

if TYPE_CHECKING:
    from cosmos3_fast.acceleration import accelerate, refresh, restore
    from cosmos3_fast.latents import LatentPreparation, PreparedLatents
    from cosmos3_fast.vae import (
        ClipDecoder,
        ClipEncoder,
        FrameDecoder,
        FrameEncoder,
        UnsupportedVAEError,
    )
    from cosmos3_fast.vae.show import save_video

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "ClipDecoder",
    "ClipEncoder",
    "FrameDecoder",
    "FrameEncoder",
    "LatentPreparation",
    "PreparedLatents",
    "UnsupportedVAEError",
    "accelerate",
    "prepare_latents",
    "prepare_latents_",
    "refresh",
    "restore",
    "save_video",
]

# No module of the package may be called as one of these names: importing it would hide the name.
_HOMES = {
    "ClipDecoder": "cosmos3_fast.vae",
    "ClipEncoder": "cosmos3_fast.vae",
    "FrameDecoder": "cosmos3_fast.vae",
    "FrameEncoder": "cosmos3_fast.vae",
    "LatentPreparation": "cosmos3_fast.latents",
    "PreparedLatents": "cosmos3_fast.latents",
    "UnsupportedVAEError": "cosmos3_fast.vae",
    "accelerate": "cosmos3_fast.acceleration",
    "refresh": "cosmos3_fast.acceleration",
    "restore": "cosmos3_fast.acceleration",
    "save_video": "cosmos3_fast.vae.show",
}
_MODULES = ("engines", "images", "latents", "vae")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"cosmos3_fast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
