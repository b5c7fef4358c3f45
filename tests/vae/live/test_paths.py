"""Which ways may serve what is asked for: one table for the stage, the seam and the engines."""

from __future__ import annotations

from typing import Any

import pytest

from cosmos3_fast.vae.live.paths import (
    ask,
    check_mode,
    serves_fast,
    ways_to_decode,
    ways_to_encode,
)


@pytest.mark.parametrize(
    ("mode", "given", "announced", "clips", "ways"),
    [
        ("fast", 1, None, False, ("fast", "whole")),
        ("exact", 1, None, False, ("whole",)),
        ("fast", 9, None, False, ("whole",)),
        ("fast", 9, None, True, ("fast", "whole")),
        ("exact", 9, None, True, ("whole",)),
        ("fast", 9, 0, False, ("none", "whole")),
        ("exact", 9, 0, False, ("none", "whole")),
        ("fast", 9, 1, False, ("fast", "exact", "whole")),
        ("exact", 9, 1, False, ("exact", "whole")),
        ("fast", 9, 2, False, ("exact", "whole")),
        ("fast", 9, 2, True, ("fast", "exact", "whole")),
        ("fast", 9, 3, False, ("whole",)),
        ("fast", 9, 7, True, ("fast", "whole")),
        # A rest of frames is the VAE's to judge, unless it is not used.
        ("fast", 3, None, True, ("whole",)),
        ("fast", 3, 1, False, ("fast", "whole")),
        ("fast", 8, None, True, ("whole",)),
    ],
)
def test_ways_to_encode(mode: Any, given: int, announced: Any, clips: bool, ways: Any) -> None:
    assert ways_to_encode(mode, ask(given, announced), clips) == ways


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("frames", [0, 1, 2])
def test_ways_to_decode(frames: int, clips: bool) -> None:
    assert ways_to_decode("exact", frames, clips) == ("whole",)
    fast = ways_to_decode("fast", frames, clips)
    assert ("fast" in fast) == (frames == 1 or (clips and frames > 1)) == serves_fast(frames, clips)
    assert fast[-1] == "whole"


def test_what_is_asked_for() -> None:
    asked = ask(17, 2)
    assert (asked.total, asked.wanted, asked.needed) == (5, 2, 5)
    assert (ask(17).wanted, ask(17).needed) == (5, 17)
    assert (ask(17, 0).wanted, ask(17, 0).needed) == (0, 0)
    assert (ask(17, 9).wanted, ask(17, 9).needed) == (5, 17)


def test_modes() -> None:
    assert check_mode("exact") == "exact"
    with pytest.raises(ValueError, match="VARIABLE must be one of exact, fast, off, got 'quick'"):
        check_mode("quick", "VARIABLE")
