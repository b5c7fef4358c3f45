"""What a run did, and how far it is while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos3_fast.bulk.damage import Damage
from cosmos3_fast.bulk.reading import Failure

_SHOWN = 3
_KINDS = 5


@dataclass
class Summary:
    """What a run of `bulk.encode` did.

    Attributes:
        out: the folder.
        samples: how many were encoded.
        total: how many the folder holds now.
        known: pictures that had latents before the run.
        repeated: pictures whose content another one of this run had.
        failures: pictures that could not be encoded, as in errors.parquet.
        warnings: what reading warned of, and how often.
        left_out: files of folders and tars that are no pictures or clips by their suffix or their
            content, by suffix.
        damaged: files of the folder that were not what an earlier run wrote, and were set aside.
        seconds: of encoding, from the first picture to the last shard.
    """

    out: Path
    samples: int = 0
    total: int = 0
    known: int = 0
    repeated: int = 0
    failures: list[Failure] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    damaged: list[Damage] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    def lines(self) -> list[str]:
        """The summary as text."""
        lines = [
            f"{self.out}: {self.samples} encoded in {self.seconds:.1f} s "
            f"({self.images_per_second:.2f} images/s), {self.total} in all"
        ]
        if self.known or self.repeated:
            lines.append(f"  skipped: {self.known} encoded before, {self.repeated} repeated")
        if left_out := self.left_out.total():
            kinds = ", ".join(
                f"{kind} {count}" for kind, count in self.left_out.most_common(_KINDS)
            )
            lines.append(f"  left out, no pictures or clips: {left_out} ({kinds})")
        if self.damaged:
            lines.append(f"  damaged files: {len(self.damaged)}; their samples are encoded again")
            lines += [f"    {each}" for each in self.damaged]
        lines.append(f"  errors: {len(self.failures)}" + (" (errors.parquet)" * any(self.failures)))
        lines += [f"    {each.source}: {each.reason}" for each in self.failures[:_SHOWN]]
        if warned := self.warnings.total():
            text, _ = self.warnings.most_common(1)[0]
            lines.append(f"  warnings: {warned}, such as: {text}")
        return lines


def progress_bar(total: int | None, shown: bool) -> Any:
    """A tqdm bar of pictures, with images/s and the time left; None: how many is not known."""
    from tqdm import tqdm

    return tqdm(total=total, unit=" images", disable=not shown, smoothing=0.1, dynamic_ncols=True)


def known_total(rows: Sequence[int | None]) -> int | None:
    """The sum, or None where one is not known."""
    return None if None in rows else sum(row or 0 for row in rows)
