"""Compiles every variant of every Triton kernel that a call can ask for, without a GPU.

Run in a process of its own, without TRITON_INTERPRET: prints a JSON list of kernel, variant,
architecture, what its PTX shifts by a variable amount and what it approximates. Each variant is
compiled for `MAIN`, and for each other architecture a few of each kernel; with --all, each variant
for each architecture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton.language as tl
from triton_binary import (
    ARCHITECTURES,
    BLENDED,
    FRAMES,
    INTEGERS,
    NORMALIZED,
    compile_case,
    norm_types,
)

from cosmos3_fast.ops.triton import pack_pixels, prepare_latents, rms_norm_silu, unpack_pixels

MAIN = 90
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
Types = dict[str, str]
Variant = tuple[str, Any, Types, dict[str, Any]]


def access(vectorized: bool, *dtypes: str) -> dict[str, Any]:
    vector = 16 // min(SIZES[d] for d in dtypes) if vectorized else 1
    return {"DENSE": vectorized, "VECTOR": vector, "BLOCK": prepare_latents.BLOCK}


def latents(cond: str, noise: str) -> Types:
    return {
        "latents": f"*{noise}", "velocity_mask": f"*{noise}", "cond": f"*{cond}",
        "noise": f"*{noise}",
    }  # fmt: skip


def integers(types: Types) -> Iterator[tuple[str, Types, dict[str, Any]]]:
    """What each integer argument can be: all of 64 bits, and each one specialised to 1."""
    wide = {name: "i64" if kind == "i32" else kind for name, kind in types.items()}
    yield "64-bit integers", wide, {}
    for name, kind in types.items():
        if kind == "i32" and name != "first_frame":  # which is not specialised
            yield f"{name} = 1", {k: v for k, v in types.items() if k != name}, {name: 1}


def frame_variants(kernel: Any, in_place: bool) -> Iterator[Variant]:
    for cond, noise in itertools.product(SIZES, SIZES):
        for vectorized in (True, False):
            types = {**latents(cond, noise), **INTEGERS, **FRAMES}
            if not vectorized:  # a word that fits 32 bits comes as one
                types |= {"bits_low": "i32", "bits_high": "i32"}
            constants = {**access(vectorized, cond, noise), "IN_PLACE": in_place}
            yield f"{cond} {noise} {vectorized}", kernel, types, constants
    types = {**latents("fp32", "bf16"), **INTEGERS, **FRAMES, "bits_low": "i32"}
    for index, (text, kinds, ones) in enumerate(integers(types)):
        constants = {**access(index % 2 == 0, "fp32", "bf16"), "IN_PLACE": in_place}
        yield text, kernel, kinds, {**constants, **ones}


def blend_variants(kernel: Any) -> Iterator[Variant]:
    masks = itertools.cycle(SIZES)
    common = {**BLENDED, "mask_batch": "i32", "mask_b": "i32", "mask_t": "i32"}
    for cond, noise in itertools.product(SIZES, SIZES):
        for vectorized in (True, False):
            mask = next(masks)
            compute = tl.float64 if noise == "fp64" else tl.float32
            constants = {**access(vectorized, cond, noise), "COMPUTE": compute}
            types = {**latents(cond, noise), **common, "mask": f"*{mask}"}
            yield f"{cond} {noise} {mask} {vectorized}", kernel, types, constants
        next(masks)  # so that each pair sees other masks
    types = {**latents("fp32", "bf16"), **common, "mask": "*fp32"}
    for index, (text, kinds, ones) in enumerate(integers(types)):
        constants = {**access(index % 2 == 0, "fp32", "bf16"), "COMPUTE": tl.float32}
        yield text, kernel, kinds, {**constants, **ones}


def norm_variants(kernel: Any) -> Iterator[Variant]:
    all_of_it = {
        **NORMALIZED, "EPS": 1e-12, "ROOT": 48**0.5, "CHANNELS": 64, "PIXELS": 64,
    }  # fmt: skip
    biases = itertools.cycle(SIZES)
    for x, weight in itertools.product(SIZES, SIZES):
        bias = next(biases)
        types = norm_types(x, weight, bias)
        compute = {"COMPUTE": tl.float64 if x == "fp64" else tl.float32}
        yield f"{x} {weight} {bias}", kernel, types, {**all_of_it, **compute}
        if x == weight:
            for text, constants in {
                "alone": {"HAS_WEIGHT": False, "HAS_BIAS": False, "HAS_RESIDUAL": False,
                          "SILU": False, "SUM": False},
                "average": {"T": 2, "S": 2},
                "average of frames": {"T": 2},
                "padded": {"NORM": False, "PAD": 1},
                "padded average": {"NORM": False, "PAD": 1, "S": 2},
            }.items():  # fmt: skip
                yield f"{x} {text}", kernel, types, {**all_of_it, **compute, **constants}
        next(biases)  # so that each pair sees other biases
    for index, (text, kinds, ones) in enumerate(integers(norm_types("bf16", "bf16", "bf16"))):
        constants = {**all_of_it, "COMPUTE": tl.float32, "T": 1 + index % 2}
        yield text, kernel, kinds, {**constants, **ones}


def pack_variants(kernel: Any) -> Iterator[Variant]:
    names = ("elements", "rows", "columns", "stride_b", "stride_c", "stride_h", "stride_w")
    sizes = dict.fromkeys(names, "i32")
    for source, out in itertools.product(("u8", *SIZES), SIZES):
        constants = {
            "BYTES": source == "u8", "PATCH": 2, "CHANNELS": 16, "BLOCK": pack_pixels.BLOCK,
        }  # fmt: skip
        types = {"out": f"*{out}", "pixels": f"*{source}", **sizes}
        yield f"{source} {out}", kernel, types, constants
    constants = {"BYTES": True, "PATCH": 1, "CHANNELS": 3, "BLOCK": pack_pixels.BLOCK}
    for text, kinds, ones in integers({"out": "*bf16", "pixels": "*u8", **sizes}):
        yield text, kernel, kinds, {**constants, **ones}


def unpack_variants(kernel: Any) -> Iterator[Variant]:
    names = ("elements", "H", "W", "stride_b", "stride_c", "stride_h", "stride_w")
    sizes = dict.fromkeys(names, "i32")
    for x, as_bytes in itertools.product(SIZES, (False, True)):
        size = 1 if as_bytes else SIZES[x]
        constants = {"BYTES": as_bytes, "PATCH": 2, "BLOCK": unpack_pixels.BLOCK_BYTES // size}
        types = {"out": "*u8" if as_bytes else f"*{x}", "x": f"*{x}", **sizes}
        yield f"{x} {as_bytes}", kernel, types, constants
    constants = {"BYTES": True, "PATCH": 1, "BLOCK": unpack_pixels.BLOCK_BYTES}
    for text, kinds, ones in integers({"out": "*u8", "x": "*bf16", **sizes}):
        yield text, kernel, kinds, {**constants, **ones}


def variants() -> dict[str, list[Variant]]:
    module = prepare_latents
    return {
        "prepare_latents": [*frame_variants(module.prepare_latents_kernel, in_place=False)],
        "prepare_latents_": [*frame_variants(module.prepare_latents_kernel, in_place=True)],
        "blend": [*blend_variants(module.blend_kernel)],
        "rms_norm_silu": [*norm_variants(rms_norm_silu.rms_norm_silu_kernel)],
        "pack_pixels": [*pack_variants(pack_pixels.pack_pixels_kernel)],
        "unpack_pixels": [*unpack_variants(unpack_pixels.unpack_pixels_kernel)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every variant for every architecture")
    everything = parser.parse_args().all
    rows = []
    for name, each in variants().items():
        for index, (text, kernel, types, constants) in enumerate(each):
            for arch in ARCHITECTURES if everything or index % 16 == 5 else (MAIN,):
                given = {k: v for k, v in constants.items() if k in kernel.arg_names}
                try:
                    ptx = compile_case(kernel, types, given, arch).asm["ptx"]
                except Exception as error:
                    raise RuntimeError(f"{name} ({text}) for sm_{arch}") from error
                # `shr.b64 %rd1, %rd2, %r3`: the width of shifts by an amount in a register.
                shifts = re.findall(r"\bsh[lr]\.[bsu](\d+)\s+%\w+, %\w+, %r", ptx)
                # `div.full.f32`, `sqrt.approx.f32`: within a few units, not rounded.
                quick = re.findall(r"\b(\w+)\.(?:approx|full)\b", ptx)
                rows.append(
                    {
                        "kernel": name,
                        "variant": text,
                        "architecture": f"sm_{arch}",
                        "shifts": sorted({int(width) for width in shifts}),
                        "approximated": sorted(set(quick)),
                    }
                )
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
