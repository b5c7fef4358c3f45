"""Planted faults: the emulated CUDA source with one line changed; the random cases catch each.

As a script: builds and runs each of them; fails if one is not caught.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from cuda_emulation import Emulation, build, source_of
from cuda_emulation_run import RUNS

# The cases, from seed 0 on, within which each fault has to show.
CASES = 400

LATENTS = {
    "frame bits shifted by one": ("bits[t / 32] >> (t % 32)", "bits[t / 32] >> (t % 32 + 1)"),
    "words of frames taken modulo 2": ("return bits[t / 32]", "return bits[t / 32 % 2]"),
    "float16 read as bfloat16": (
        "static_cast<const Half*>(source.data)", "static_cast<const BFloat16*>(source.data)",
    ),
    "batch stride left out": (
        "return b * strides.b + c * strides.c", "return c * strides.c",
    ),
    "row and column strides swapped": (
        "i / width * strides.h + i % width * strides.w",
        "i / width * strides.w + i % width * strides.h",
    ),
    "in flight beyond the end: stored too": (
        "if (i + k * step < vectors) {", "if (i + k * step <= vectors) {",
    ),
    "loads one vector short": (
        "i + k * step < vectors ? i + k * step : i]",
        "i + k * step < vectors - 1 ? i + k * step : i]",
    ),
    "each thread skips every other round": (
        "i < vectors; i += kInFlight * step", "i < vectors; i += 2 * kInFlight * step",
    ),
    "scalar copy ends early": (
        "  for (int64_t i = threadIdx.x; i < plane; i += blockDim.x) {\n    out[i] = load_as<T>(",
        "  for (int64_t i = threadIdx.x; i < plane - 1; i += blockDim.x) {\n"
        "    out[i] = load_as<T>(",
    ),
    "channels beyond the grid left out": (
        "c < shape.c; c += gridDim.y", "c < gridDim.y; c += gridDim.y",
    ),
    "velocity of a block other than the first left out": (
        "velocity_mask[t] = convert<T>(is_condition ? 0.0f : 1.0f)",
        "velocity_mask[blockIdx.x] = convert<T>(is_condition ? 0.0f : 1.0f)",
    ),
    "blend rounds one operand": (
        "return convert<T>(m * cond +", "return convert<T>(m * convert<T>(cond) +",
    ),
    "velocity written for the first batch entry only": ("if (b < mask_batch &&", "if (b < 1 &&"),
    "alignment of the storage not asked": (
        "reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0", "data != nullptr",
    ),
    "alignment of the frame stride not asked": (" && aligned(strides.t)", ""),
    "alignment of the destination not asked": (
        "cond.vectorized &= is_vector_aligned(noise.const_data_ptr(), shape, to, sizeof(T));",
        "cond.vectorized &= plane_is_dense(shape, to);",
    ),
    "vectors where dtypes differ": ("x.scalar_type() == out_dtype &&", "true &&"),
    "frames that are not conditioned written too": (
        "if (!is_condition || shape.plane() == 0) {", "if (shape.plane() == 0) {",
    ),
    "last frame of a launch taken for the next one's": (
        "frame < first + count", "frame < first + count - 1",
    ),
    "further launches start at frame 0": (
        "const int64_t t = first_frame + blockIdx.x;\n  const bool is_condition",
        "const int64_t t = blockIdx.x;\n  const bool is_condition",
    ),
}  # fmt: skip

NORMS = {
    "bias of the first pixels left out": (
        "if (job.bias != nullptr) {\n#pragma", "if (job.bias != nullptr && first > 0) {\n#pragma",
    ),
    "bias of the first channel for all": ("job.bias[channel]", "job.bias[0]"),
    "vectors of the first pixel for all": (
        "from + at[p].offset + channels[k]", "from + channels[k]",
    ),
    "residual of the first pixel for all": ("job.residual[at.offset + channel]",
                                            "job.residual[channel]"),
    "averages not divided": ("/= static_cast<Value>(side * side)", "*= 1"),
    "averages added to the first of t channels": (
        "channel % job.t == job.t - 1", "channel % job.t == 0",
    ),
    "averages added to the first of two channels": ("to[2 * lane + 1] +=", "to[2 * lane] +="),
    "cells of one row": ("cell + row * pitch + column * channels", "cell + column * channels"),
    "pitch of a cell's rows without its channels": (
        "pitch = job.width * side * channels", "pitch = job.width * side",
    ),
    "exchange one step short": ("offset > 0; offset /= 2", "offset > 1; offset /= 2"),
    "threads that do not meet": (
        "if (job.activated != nullptr) {", "if (job.activated != nullptr && lane < 31) {",
    ),
    "norm not clamped": ("(norm < least ? least : norm)", "norm"),
    "norm of 16 bits not clamped": ("squares < least * least ? least * least : squares", "squares"),
    "square root of the channels left out": (
        "job.weight ? std::sqrt(static_cast<Value>(job.channels)) : Value{1}", "Value{1}",
    ),
    "SiLU always": ("job.silu ? silu_of<T>(scaled) : scaled", "silu_of<T>(scaled)"),
    "no padding to the right": ("row < height && column < width};", "row < height};"),
    "the last vector of a pixel left out": (
        "exists[k] = channels[k] < job.channels;",
        "exists[k] = channels[k] + kLanes < job.channels;",
    ),
    "elements beyond a warp's left out": (
        "channel < job.channels; channel += kWarp", "channel < kWarp; channel += kWarp",
    ),
    "channels that are no whole vectors": ("job.channels % kLanes == 0 &&", "true &&"),
    "more channels than a warp holds": ("job.channels <= kWarp * kHeld<T> &&", "true &&"),
    "cells of another side as vectors": ("job.s == kSide && job.t <= 2", "job.t <= 2"),
    "every third channel as every second": ("job.s == kSide && job.t <= 2", "job.s == kSide"),
    "a bias of another dtype rounded": (
        "if (is_other(weight) || is_other(bias)) {", "if (is_other(weight)) {",
    ),
}  # fmt: skip

# These leave every result right: only the trace of the loads and stores shows them.
SILENT_LATENTS = {
    "in flight beyond the end: the first one stored again": (
        "        if (i + k * step < vectors) {\n          to[i + k * step] = held[k];",
        "        {\n          to[i + k * step < vectors ? i + k * step : i] = held[k];",
    ),
    "in flight beyond the end: loaded too": (
        "from[i + k * step < vectors ? i + k * step : i]", "from[i + k * step]",
    ),
    "every block writes the velocity": (
        "if (blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0)", "if (threadIdx.x == 0)",
    ),
    "every thread takes its neighbors' elements too": (
        "i < plane; i += blockDim.x) {\n    out[i] = load_as<T>(",
        "i < plane; i += 1) {\n    out[i] = load_as<T>(",
    ),
}  # fmt: skip

SILENT_NORMS = {
    "pixels taken by several warps": (
        "pixel += gridDim.x * kWarps", "pixel += kWarps",
    ),
    "pixels beyond the end read too": (
        "first + p < job.pixels ? first + p : first", "first + p",
    ),
    "pixels beyond the end written too": (
        "if (exists[k] && first + p < job.pixels) {", "if (exists[k]) {",
    ),
    "channels beyond the end read too": (
        "channels[k] = exists[k] ? channels[k] : 0;", "",
    ),
    "alignment of the residual not asked": ("is_aligned(job.residual);", "true;"),
    "alignment of the bias not asked": ("is_aligned(job.bias) &&", "true &&"),
}  # fmt: skip

RESIZES = {
    "row stride for column stride": ("y * images.sh, images.sw,", "y * images.sh, images.sh,"),
    "colors next to each other": ("green += from[color_step]", "green += from[1]"),
    "one tap short": ("tap < axis.taps;", "tap < axis.taps - 1;"),
    "weights in the order of the host": (
        "to[(1 + tap) * outputs + i]", "to[outputs + i * axis.taps + tap]",
    ),
    "not clamped above": ("value > 255 ? 255 : value", "value"),
    "columns beyond the last one": ("if (x >= width) {", "if (x > width) {"),
    "only the first image": ("images.data + b * images.sb + x", "images.data + x"),
    "passes in the other order": ("} else if (vertical_first) {", "} else if (!vertical_first) {"),
    "windows from the image's edge": (
        "source = torch::stable::narrow(source, 1, rows.begin, rows.end - rows.begin);", "",
    ),
}  # fmt: skip

PACKING = {
    "row stride for column stride": ("offset += image.sw;", "offset += image.sh;"),
    "color of a thread's first element left out": ("color * image.sc + start", "start"),
    "row of a thread's first element left out": ("start.dy * image.sh + ", ""),
    "next color in the row after": ("offset += to_color;", ""),
    "next patch is the first one": ("offset = column;", "offset = start_column;"),
    "columns one by one": ("patches.channels * size * image.sw", "patches.channels * image.sw"),
    "batch stride left out": ("b * image.sb + row * size", "row * size"),
    "rows one by one": ("row * size * image.sh", "row * image.sh"),
    "further channels as the pixels after": ("channel.index < filled && first", "first"),
    "bytes not normalised": ("convert<Out>(normalized(value))",
                             "convert<Out>(static_cast<float>(value))"),
    "vectors where a row is not whole ones": ("length % kLanes == 0 &&", "true &&"),
    "rows written into the next one": ("if (first + lane < length) {", "{"),
}  # fmt: skip

SILENT_PACKING = {
    "further channels read too": (
        "held[lane] = is_filled[lane] ?", "held[lane] = first + lane < length ?",
    ),
}  # fmt: skip

UNPACKING = {
    "a color every row of a patch": ("patches.sc * size * size;", "patches.sc * size;"),
    "column of a thread's first element left out": ("start_dx * patches.sc +", ""),
    "color of a thread's first element left out": ("start_color * color_step +", ""),
    "row within its patch left out": ("y % size * size * patches.sc +", ""),
    "row within its patch without its columns": ("y % size * size *", "y % size *"),
    "patches one row each": ("y / size * patches.sh", "y * patches.sh"),
    "floats of the first color alone": ("row / height * color_step +", ""),
    "next patch without its way back": ("offset += patches.sw - size * patches.sc;",
                                        "offset += patches.sw;"),
    "batch stride left out": ("b * patches.sb + row", "row"),
    "not clamped": ("lanes[lane] = clamped(held[lane]);", "lanes[lane] = held[lane];"),
    "vectors where a row is not whole ones": ("length % kLanes == 0 &&", "true &&"),
    "rows written into the next one": ("if (first + lane < length) {", "{"),
}  # fmt: skip

SILENT_UNPACKING = {
    "elements beyond a row's end read too": (
        "first + lane < length ? from[offset] : In{}", "from[offset]",
    ),
}  # fmt: skip

FRAMES = {
    "products not scaled": ("= terms[k][lane] * job.scale[k];", "= terms[k][lane];"),
    "bias of the first channels for all": (
        "read_parameters(bias, job.bias, channel);", "read_parameters(bias, job.bias, 0);",
    ),
    "residual of the first frame for all": (
        "smaller(first + i, last_frame), pixel)", "first, pixel)",
    ),
    "the first block's products for all": ("smaller(first / m + n, last_block)", "first / m"),
    "the past forgotten between four frames and the next": (
        "window[1][lane] = window[kAtOnce + 1][lane];", "",
    ),
    "frames beyond the last one not zeros": ("if (first + i >= job.frames) {", "if (false) {"),
    "the last frame's past left out where there is one frame": (
        "if (job.to && job.frames == 1 && inside) {", "if (false) {",
    ),
    "channels beyond the last vector in the norm": (
        "exists ? y[i][lane] : Value{0};", "y[i][lane];",
    ),
    "norms of a warp instead of the group": ("if (group <= kWarp) {", "if (group >= 1) {"),
    "norms read before they are written": (
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < n; ++i) {\n    values[i] = of_w",
        "#pragma unroll\n  for (int i = 0; i < n; ++i) {\n    values[i] = of_w",
    ),
    "norms written before they are read": (
        "  __syncthreads();  // before the next four", "  // before the next four",
    ),
    "the square root of the channels left out": (
        "job.root = std::sqrt(static_cast<Value>(first.size(1)));", "job.root = 1;",
    ),
    "norm not clamped": ("(norm < least ? least : norm)", "norm"),
    "SiLU always": (
        "y[i][lane] = job.silu ? silu_of<is_quick>(scaled) : scaled;",
        "y[i][lane] = silu_of<is_quick>(scaled);",
    ),
    "windows of four in steps of two": (
        "job.blocks + first / m + n;", "job.blocks + first / 2 + n;",
    ),
    "the second window of two left out": (
        "if (first + n * m >= job.frames) {", "if (n > 0 || first + n * m >= job.frames) {",
    ),
    "float16 frames written as bfloat16": (
        "pack_as<Half>(from);", "pack_as<BFloat16>(from);",
    ),
    "channels that are no whole vectors": ("job.channels % S::kLanes ||", ""),
    "more channels than a block holds": ("job.channels > kMostThreads * S::kLanes", "false"),
    "residuals of another dtype as vectors": (
        "has(arguments.dtype_of_sum(), S::kSum) &&", "",
    ),
    "element: the last frames from the sums": (
        "(i >= 2 || t < 0)) {", "i >= 2) {",
    ),
    "windows one frame apart": (
        "terms[i] = window[n * m + i][lane];", "terms[i] = window[n + i][lane];",
    ),
    "windows of two on unit points": ("to_unit_points<m>(terms, job.point);", ""),
    "frames of two on unit points": (
        "frame_of<kProducts, i>(scaled, job.point);", "frame_of<kProducts, i>(scaled, {});",
    ),
    "element: windows of two on unit points": ("to_unit_points<m>(window, job.point);", ""),
    "element: frames of two on unit points": (
        "frame_of<kProducts, i>(terms, job.point);", "frame_of<kProducts, i>(terms, {});",
    ),
}  # fmt: skip

# These leave every result right: only the trace of the loads and stores shows them.
SILENT_FRAMES = {
    "pixels beyond the end read too": (
        "const int64_t pixel = own_pixel < job.pixels ? own_pixel : next;",
        "const int64_t pixel = own_pixel;",
    ),
    "pixels beyond the end written too": (
        "inside = exists && own_pixel < job.pixels;", "inside = exists;",
    ),
    "channels beyond the end read too": (
        "const int channel = exists ? own_channel : 0;", "const int channel = own_channel;",
    ),
    "alignment of the residual not asked": ("job.residual, job.weight,", "job.weight,"),
    "element: frames before the first read too": (
        "t < 0 || t >= job.frames) {", "t >= job.frames) {",
    ),
    "alignment of the past not asked": ("job.weight, job.past}", "job.weight}"),
    "blocks take their neighbors' pixels too": (
        "next += int64_t{gridDim.x} * of_block", "next += of_block",
    ),
    "a unit takes its neighbors' too": ("unit += int64_t{gridDim.x} * kWarps", "unit += kWarps"),
}  # fmt: skip

# By source and name: what is to be replaced, by what, and whether only the trace shows it.
MUTATIONS = {
    (source, name): (*change, silent)
    for source, silent, changes in (
        ("prepare_latents", False, LATENTS),
        ("prepare_latents", True, SILENT_LATENTS),
        ("rms_norm_silu", False, NORMS),
        ("rms_norm_silu", True, SILENT_NORMS),
        ("resize_crop", False, RESIZES),
        ("pack_pixels", False, PACKING),
        ("pack_pixels", True, SILENT_PACKING),
        ("unpack_pixels", False, UNPACKING),
        ("unpack_pixels", True, SILENT_UNPACKING),
        ("transform_frames", False, FRAMES),
        ("transform_frames", True, SILENT_FRAMES),
    )
    for name, change in changes.items()
}


def outcome(library: Path, source: str, traced: bool) -> str:
    """What the cases say of a library, each in a process of its own: a wild write may end it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            RUNS[source](Emulation(library, source), 0, CASES, traced)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as end:
        text = end.read()
    _, status = os.waitpid(child, 0)
    return text or f"the process ended with status {status}"


def is_caught(source: str, name: str, folder: Path) -> bool:
    """Whether the cases find the fault `name`; says what they found.

    Raises:
        AssertionError: the fault no longer fits the source.
    """
    before, after, traced = MUTATIONS[source, name]
    text = source_of(source).read_text()
    assert before in text, f"{name}: {before!r} is not in {source_of(source)}"
    mutant, library = folder / "mutant.cu", folder / "mutant.so"
    mutant.write_text(text.replace(before, after, 1))
    build(library, "traced" if traced else "quick", mutant)
    found = outcome(library, source, traced)
    print(f"{source}, {name}: {found}", flush=True)
    # Only a wrong call or a crash counts, not an error of the test itself.
    return found.startswith(("AssertionError", "the process ended")) or any(
        text in found for text in ("do not meet", "beyond the memory that its block shares")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="of each source, one in so many")
    every = parser.parse_args().every
    torch.set_num_threads(1)  # before the forks, which threads would not survive
    chosen = [*MUTATIONS][::every]
    with tempfile.TemporaryDirectory() as folder:
        missed = [each for each in chosen if not is_caught(*each, Path(folder))]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    for source, name in missed:
        print(f"not caught: {source}, {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
