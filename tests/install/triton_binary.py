"""Compiles every Triton kernel for each GPU architecture, without a GPU, and prints what came out.

Run in a process of its own, without TRITON_INTERPRET: prints a JSON list of kernel, architecture,
registers, spilled bytes, shared memory and the widths of its global accesses in bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from cuda_binary import _tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cosmos3_fast.ops.triton import pack_pixels, prepare_latents, rms_norm_silu, unpack_pixels

ARCHITECTURES = (80, 90, 100, 120)
LATENT_STRIDES = tuple(f"{x}_{d}" for x in ("cond", "noise") for d in "bcthw")
INTEGERS = dict.fromkeys(("C", "T", "plane", "W", "tiles", "launch_frames", *LATENT_STRIDES), "i32")
BLENDED = {k: v for k, v in INTEGERS.items() if k != "launch_frames"}
# All that the norm's kernel can do but an average and padding.
NORMALIZED = {
    "NORM": True, "SUM": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_RESIDUAL": True,
    "SILU": True, "PAD": 0, "T": 1, "S": 1,
}  # fmt: skip
FRAMES = {"bits_low": "i64", "bits_high": "i64", "first_frame": "i32"}


def norm_types(x: str, weight: str, bias: str) -> dict[str, str]:
    images = dict.fromkeys(("activated", "sum", "x", "residual"), f"*{x}")
    sizes = dict.fromkeys(("pixels", "C", "H", "W"), "i32")
    return {**images, "weight": f"*{weight}", "bias": f"*{bias}", **sizes}


def cases() -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Name → (kernel, types of its arguments, constants), as a bf16 run specialises them."""
    latents = {"latents": "*bf16", "velocity_mask": "*bf16", "cond": "*bf16", "noise": "*bf16"}
    return {
        **{
            name: (
                prepare_latents.prepare_latents_kernel,
                {**latents, **INTEGERS, **FRAMES},
                {"IN_PLACE": in_place, "DENSE": True, "VECTOR": 8, "BLOCK": prepare_latents.BLOCK},
            )
            for name, in_place in (("prepare_latents", False), ("prepare_latents_", True))
        },
        "blend": (
            prepare_latents.blend_kernel,
            {
                **latents, **BLENDED, "mask": "*fp32", "mask_batch": "i32", "mask_b": "i32",
                "mask_t": "i32",
            },
            {
                "COMPUTE": triton.language.float32, "DENSE": True, "VECTOR": 8,
                "BLOCK": prepare_latents.BLOCK,
            },
        ),
        **{
            name: (
                rms_norm_silu.rms_norm_silu_kernel,
                norm_types("bf16", "bf16", "bf16"),
                {
                    **NORMALIZED, "ROOT": 640**0.5, "EPS": 1e-12,
                    "COMPUTE": triton.language.float32,
                    "PIXELS": rms_norm_silu.ELEMENTS // 1024, "CHANNELS": 1024, **constants,
                },
            )
            for name, constants in {
                "rms_norm_silu": {"HAS_BIAS": False, "HAS_RESIDUAL": False, "SUM": False},
                "add_rms_norm_silu": {},
                "add_pad": {"NORM": False, "PAD": 1},
            }.items()
        },
        "pack_pixels": (
            pack_pixels.pack_pixels_kernel,
            {
                "out": "*bf16", "pixels": "*u8", "elements": "i32", "rows": "i32",
                "columns": "i32", "stride_b": "i32", "stride_c": "i32", "stride_h": "i32",
                "stride_w": "i32",
            },
            {"BYTES": True, "PATCH": 2, "CHANNELS": 16, "BLOCK": pack_pixels.BLOCK},
        ),
        **{
            name: (
                unpack_pixels.unpack_pixels_kernel,
                {
                    "out": out, "x": "*bf16", "elements": "i32", "H": "i32", "W": "i32",
                    "stride_b": "i32", "stride_c": "i32", "stride_h": "i32", "stride_w": "i32",
                },
                {"BYTES": out == "*u8", "PATCH": 2, "BLOCK": unpack_pixels.BLOCK_BYTES // size},
            )
            for name, out, size in (("unpack_floats", "*bf16", 2), ("unpack_bytes", "*u8", 1))
        },
    }  # fmt: skip


# What Triton sees to be multiples of 16 at 480x832: the pointers, the encoder's channels and sizes;
# not the latents' planes of 30x52 elements.
ALIGNED = ("latents", "velocity_mask", "cond", "noise", "out", "activated", "sum", "x", "weight",
           "bias", "residual", "pixels", "C", "elements", "columns")  # fmt: skip


def compile_case(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int) -> Any:
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in ALIGNED and name in types
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


def resources(cubin: bytes) -> dict[str, int]:
    tool = _tool("cuobjdump")
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def widths(ptx: str, instruction: str) -> list[int]:
    """Bytes per thread of each `ld.global` or `st.global`."""
    found = re.findall(rf"{instruction}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    return sorted({int(lanes or 1) * int(bits) // 8 for lanes, bits in found})


def main() -> None:
    rows = []
    for name, (kernel, types, constants) in cases().items():
        for arch in ARCHITECTURES:
            compiled = compile_case(kernel, types, constants, arch)
            usage = resources(compiled.asm["cubin"])
            rows.append(
                {
                    "kernel": name,
                    "architecture": f"sm_{arch}",
                    "registers": usage["REG"],
                    "spilled": usage["STACK"] + usage["LOCAL"],
                    "shared": usage["SHARED"],
                    "loads": widths(compiled.asm["ptx"], "ld"),
                    "stores": widths(compiled.asm["ptx"], "st"),
                }
            )
            print(f"{name} for sm_{arch}", file=sys.stderr)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
