"""Random sequences of events on an accelerated VAE, against a twin that is not: `make soak`.

Each sequence comes from a seed alone; a failure names it and its events, and `--first SEED --count
1` repeats it. Folded networks must have served at least half of all calls of 20 sequences or more.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import NamedTuple

import torch
from soak_events import EVENTS, some_calls
from soak_pair import FAMILIES, Pair, seen

LENGTH = 24
"""Events of a sequence."""


class Counts(NamedTuple):
    """How many calls there were, and those that folded networks have served."""

    calls: int
    fast: int

    def check(self) -> None:
        """Raises AssertionError where fewer than half were served: little was tried."""
        assert 2 * self.fast >= self.calls, f"folded networks served {self.fast} of {self.calls}"


def run(seed: int, length: int = LENGTH) -> Counts:
    """One sequence.

    Raises:
        AssertionError: what went wrong, with the seed and the events.
    """
    family = FAMILIES[seed % len(FAMILIES)]
    events: list[str] = []
    with seen():
        pair = Pair(family, seed)
        try:
            for _ in range(length):
                (event,) = pair.rng.choices(list(EVENTS), list(EVENTS.values()))
                events.append(event.__name__)
                events[-1] += f": {event(pair)}"
                pair.check_weights()
            some_calls(pair)
        except Exception as error:
            lines = "\n  ".join(events)
            raise AssertionError(
                f"--first {seed} --count 1 ({family}): {type(error).__name__}: {error}\n  {lines}"
            ) from error
        finally:
            for undo in list(pair.undo.values()):
                undo()
    return Counts(pair.calls, pair.fast)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=100, help="sequences")
    parser.add_argument("--length", type=int, default=LENGTH, help="events of each")
    args = parser.parse_args()
    import diffusers  # the tests of this file can do without

    torch.set_num_threads(1)
    logging.getLogger("cosmos3_fast").setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    began, calls, fast = time.monotonic(), 0, 0
    for done in range(args.count):
        counts = run(args.first + done, args.length)
        calls, fast = calls + counts.calls, fast + counts.fast
        if sys.stderr.isatty() or done % 10 == 9 or done + 1 == args.count:
            seconds = time.monotonic() - began
            print(
                f"{done + 1} of {args.count} sequences, {fast} of {calls} calls folded, "
                f"{seconds:.0f} s",
                flush=True,
            )
    if args.count >= 20:  # a few may by chance have little to fold
        Counts(calls, fast).check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
