"""`accelerate`, `restore`, `refresh` and `last_encoding`, for a VAE or the pipeline that has one.

    accelerate(pipe, mode="fast")
    restore(pipe)

All computing is the VAE's (`cosmos3_fast.vae.live`). What an engine needs beside it is its
adapter's, in `cosmos3_fast.engines`, which is imported when such a pipeline or VAE is met.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

import torch
from torch import nn

from cosmos3_fast.vae.live import seam
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.paths import Encoding, choose
from cosmos3_fast.vae.topology import UnsupportedVAEError

__all__ = ["Encoding", "accelerate", "last_encoding", "refresh", "restore"]

T = TypeVar("T")

# Pipelines that need to announce what they use, by the name of a class they derive from, and the
# module whose `announce(pipe, choice)` sees to it.
_ANNOUNCERS = {
    "Cosmos3OmniPipeline": "cosmos3_fast.engines.diffusers",
    "Cosmos3OmniModularPipeline": "cosmos3_fast.engines.diffusers",
}
# Packages whose VAEs are surrounded by more than a VAE by itself, and the module whose `ENGINE`
# says by what.
_ENGINES = {"vllm_omni": "cosmos3_fast.engines.vllm_omni"}


def accelerate(
    target: T,
    mode: str = "fast",
    *,
    clips: bool | None = None,
    products: str | torch.dtype | None = None,
    frozen: bool | None = None,
    graphs: bool | None = None,
) -> T:
    """Accelerate a VAE of the Wan family, or the pipeline that has one.

    Any pipeline of diffusers whose `vae` is `AutoencoderKLWan` or `AutoencoderKLQwenImage`: single
    frames and clips are encoded and decoded by 2-D networks. Cosmos3's, task and modular, encode
    only the frames that the video depends on: none for text, one for an image and the actions
    "policy" and "forward_dynamics", 4·max(condition_frame_indexes_vision) + 1 for a video. Inverse
    dynamics, transfer controls, and modular pipelines in which something else reads the encoder's
    latents, are encoded whole.

    In a release of diffusers that the tests have not run on, a Cosmos3 pipeline has to pass a
    self-test, or is left as it is with a warning.

    Called again it changes the mode. The state is the VAE's: pipelines that share it share the
    acceleration.

    Args:
        target: a VAE or a pipeline. Changed in place.
        mode: see `cosmos3_fast.vae.live.seam.accelerate`. In "exact" a Cosmos3 pipeline's
            results equal the unpatched pipeline's, the sign of zeros apart.
        clips: False: in mode "fast" clips stay the VAE's own; their networks cost memory. None: as
            before; at first True, for a VAE of vLLM-Omni, which has fused ones of its own, False.
        products: torch.float16 or "float16", for a float32 VAE: dtype of the products along time
            of clips, which halves their time on a GPU (`ClipDecoder` says what it costs). None: as
            before; at first the VAE's dtype (in bfloat16 they are float16 in any case).
        frozen: True: the weights stay as they are though they look as if they were trained (they
            require gradients, and the VAE is in training mode or they have some), where otherwise
            the VAE's own code runs. None: as before; at first False.
        graphs: True: on a GPU, calls of one frame are replayed as CUDA graphs, in one launch each
            (`FrameEncoder.capture`). None: as before; at first False.

    Returns:
        `target` itself.

    Raises:
        TypeError: `target` is neither, or `clips`, `frozen` or `graphs` no bool.
        ValueError: an unknown mode, or products of another dtype.
        UnsupportedVAEError: (a ValueError) the VAE is none of this family.
    """
    chosen: dict[str, Any] = {
        "clips": clips,
        "products": products,
        "frozen": frozen,
        "graphs": graphs,
    }
    if choose(mode, **chosen).mode == "off":
        return restore(target)
    if _is_vae(target):
        return seam.accelerate(target, mode, _engine_of(target), **chosen)
    vae = getattr(target, "vae", None)
    names = [base.__name__ for base in type(target).__mro__]
    announcer = next((_ANNOUNCERS[name] for name in names if name in _ANNOUNCERS), None)
    if announcer is None and vae is None:
        name = f"{type(target).__module__}.{type(target).__qualname__}"
        if hasattr(target, "vae"):
            raise UnsupportedVAEError(f"{name} has no vae yet")
        raise TypeError(f"target must be a VAE or a pipeline with one, got {name}")
    # What was chosen while the pipeline had no VAE is on the pipeline.
    choice = choose(mode, before=getattr(target, "__dict__", {}).get(ATTRIBUTE), **chosen)
    if vae is not None:
        seam.accelerate(vae, mode, _engine_of(vae), **chosen)
        choice = seam.choice_of(vae) or choice
    if announcer is None or importlib.import_module(announcer).announce(target, choice):
        return target
    return restore(target)


def restore(target: T) -> T:
    """Undo `accelerate`; what is not accelerated is left as it is.

    Returns:
        `target` itself.
    """
    if not _is_vae(target):
        getattr(target, "__dict__", {}).pop(ATTRIBUTE, None)
    seam.restore(_vae_of(target))
    return target


def refresh(target: T) -> T:
    """Fold again at the next use: for weights that were changed without a trace.

    `cosmos3_fast.vae.live.seam.refresh` says which changes those are, and what is found without.

    Args:
        target: a VAE or a pipeline.

    Returns:
        `target` itself.
    """
    seam.refresh(_vae_of(target))
    return target


def last_encoding(target: Any) -> Encoding | None:
    """How an accelerated VAE, or that of a pipeline, encoded latest; None before the first time."""
    return seam.last_encoding(_vae_of(target))


def _is_vae(target: Any) -> bool:
    return isinstance(seam.uncompiled(target), nn.Module) and hasattr(target, "encode")


def _vae_of(target: Any) -> Any:
    return target if _is_vae(target) else getattr(target, "vae", None)


def _engine_of(vae: Any) -> Engine | None:
    packages = (base.__module__.partition(".")[0] for base in type(seam.uncompiled(vae)).__mro__)
    module = next((_ENGINES[package] for package in packages if package in _ENGINES), None)
    return None if module is None else importlib.import_module(module).ENGINE
