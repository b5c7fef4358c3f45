"""What of a clip is asked for, and which ways of encoding or decoding it may serve, in order.

The stage, the seam and the engines' adapters all decide here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from cosmos3_fast.frames import TEMPORAL_FACTOR, latent_frames, pixel_frames

Mode = Literal["exact", "fast", "off"]
MODES: tuple[Mode, ...] = ("exact", "fast", "off")

Path = Literal["none", "fast", "exact", "whole"]


@dataclass(frozen=True)
class Encoding:
    """How an accelerated VAE encoded.

    Attributes:
        path: "none" (nothing was wanted), "fast" (a folded encoder), "exact" (the VAE's own
            code on a prefix of the clip) or "whole" (the VAE's own code on all of it).
        pixel_frames: frames that were encoded.
        of: frames that were given.
        reason: why the path is not the one that the mode promises; None where it is.
    """

    path: Path
    pixel_frames: int
    of: int
    reason: str | None = None


class Asked(NamedTuple):
    """What of a clip is asked for; see `ask`.

    Attributes:
        given: pixel frames of the clip.
        total: latent frames of the clip.
        wanted: latent frames that are used, the first ones.
        needed: pixel frames that these depend on, the first ones.
        is_plain: whether what is used ends with a whole group of frames: a rest is the VAE's to
            judge.
    """

    given: int
    total: int
    wanted: int
    needed: int
    is_plain: bool


def ask(given: int, announced: int | None = None, factor: int = TEMPORAL_FACTOR) -> Asked:
    """What of a clip is asked for.

    Args:
        given: pixel frames of the clip, at least 1.
        announced: the first so many latent frames are used; None: all, as nobody said otherwise.
        factor: pixel frames per latent frame.
    """
    total = latent_frames(given, factor)
    wanted = total if announced is None else min(announced, total)
    needed = pixel_frames(wanted, factor) if wanted else 0
    return Asked(given, total, wanted, needed, announced is not None or needed == given)


def check_mode(mode: str, argument: str = "mode") -> Mode:
    """`mode` itself.

    Raises:
        ValueError: it is none of "exact", "fast" and "off".
    """
    for known in MODES:
        if mode == known:
            return known
    raise ValueError(f"{argument} must be one of {', '.join(MODES)}, got {mode!r}")


@dataclass(frozen=True)
class Choice:
    """What the user chose for a VAE.

    Attributes:
        mode: "exact" or "fast" ("off" is no acceleration).
        clips: whether in mode "fast" clips go through folded networks too.
        products: dtype of the products along time of clips; None: as `ClipDecoder` has it.
        frozen: the weights stay as they are, though they look as if they were trained.
        graphs: calls of one frame are replayed as CUDA graphs.
    """

    mode: Mode
    clips: bool = True
    products: torch.dtype | None = None
    frozen: bool = False
    graphs: bool = False


def choose(
    mode: str,
    clips: bool | None = None,
    products: str | torch.dtype | None = None,
    before: Choice | None = None,
    clips_by_default: bool = True,
    frozen: bool | None = None,
    graphs: bool | None = None,
) -> Choice:
    """The choice of these arguments of `accelerate`.

    Args:
        mode: one of `MODES`.
        clips: None: as `before`, or by default.
        products: torch.float16 or "float16"; None: as `before`.
        before: an earlier choice.
        clips_by_default: where nothing was chosen before.
        frozen, graphs: None: as `before`.

    Raises:
        ValueError: an unknown mode, or products of another dtype.
        TypeError: `clips`, `frozen` or `graphs` is neither a bool nor None.
    """
    checked = check_mode(mode)
    for name, value in (("clips", clips), ("frozen", frozen), ("graphs", graphs)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, got {value!r}")
    if products not in (None, "float16", torch.float16):
        raise ValueError(f"products must be torch.float16, 'float16' or None, got {products!r}")
    earlier = before or Choice(checked, clips_by_default)
    return Choice(
        checked,
        earlier.clips if clips is None else clips,
        earlier.products if products is None else torch.float16,
        earlier.frozen if frozen is None else frozen,
        earlier.graphs if graphs is None else graphs,
    )


def serves_fast(frames: int, clips: bool = False) -> bool:
    """Whether folded networks take so many latent frames.

    Args:
        frames: to encode or to decode.
        clips: whether there is a network for more than one.
    """
    return frames == 1 or (clips and frames > 1)


def ways_to_encode(mode: Mode, asked: Asked, clips: bool = False) -> tuple[Path, ...]:
    """The ways of encoding that may serve, the best first; the last is always open.

    Args:
        mode: what the user chose.
        asked: of the clip.
        clips: see `serves_fast`.
    """
    ways: list[Path] = []
    if asked.wanted == 0:
        ways.append("none")
    if mode == "fast" and asked.is_plain and serves_fast(asked.wanted, clips):
        ways.append("fast")
    if 0 < asked.wanted < asked.total:
        ways.append("exact")
    return (*ways, "whole")


def ways_to_decode(mode: Mode, frames: int, clips: bool = False) -> tuple[Path, ...]:
    """The ways of decoding so many latent frames that may serve, as `ways_to_encode`."""
    return ("fast", "whole") if mode == "fast" and serves_fast(frames, clips) else ("whole",)
