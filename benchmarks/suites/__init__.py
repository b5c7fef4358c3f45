"""The suites, in the order in which `python -m benchmarks.run` measures them.

To add one, add a file with a `SUITE` and name it here: its rows get a table and a plot
without further code. Figures of another form need a function in `report.FIGURES`.
"""

from benchmarks.harness import Suite
from benchmarks.suites import (
    bulk,
    clips,
    decoder,
    encoder,
    engines,
    growth,
    memory,
    op,
    pixels,
    profile,
    stage,
)

SUITES: dict[str, Suite] = {
    "op": op.SUITE,
    "encoder": encoder.SUITE,
    "decoder": decoder.SUITE,
    "clips": clips.SUITE,
    "growth": growth.SUITE,
    "pixels": pixels.SUITE,
    "stage": stage.SUITE,
    "bulk": bulk.SUITE,
    "memory": memory.ENCODER,
    "decoder_memory": memory.DECODER,
    "clip_memory": memory.CLIP,
    "bulk_memory": memory.BULK,
    "profile": profile.SUITE,
    "engines": engines.SUITE,
}
