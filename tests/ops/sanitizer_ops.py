"""Every op over small hostile inputs: what compute-sanitizer runs on a GPU.

The device gets the same inputs with the same strides as the CPU, where the reference runs and the
results are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from frame_products import DTYPES as FRAME_DTYPES
from frame_products import FORMS, Call, fault, make_call
from op_inputs import latent, sample_inputs
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

LAYOUTS = ("contiguous", "offset", "stepped", "expanded")
Case = tuple[str, tuple[Any, ...]]


def cases(device: str) -> Iterator[Case]:
    """(op, arguments) on `device`; the same values on every device."""
    for sample in sample_inputs(device, LAYOUTS):
        cond, noise, frames = sample.cond_latent, sample.noise, list(sample.frames)
        yield "prepare_latents", (cond, noise, frames)
        if cond.shape[2] == 1 or cond.shape[2] >= noise.shape[2]:
            yield "prepare_latents.mask", (cond, noise, sample.mask())
        if all(n < 2 or s for n, s in zip(noise.shape, noise.stride(), strict=True)):
            yield "prepare_latents_", (cond, noise, frames)
    for channels, dtype in ((3, torch.float32), (160, torch.bfloat16), (640, torch.float16)):
        # Contiguous, channels-last, and neither with a pitch of its own.
        x = latent((2, 5, 7, channels, 1), dtype, device=device).permute(0, 3, 1, 2, 4)[..., 0]
        gamma = latent((1, 1, 1, 1, channels), dtype, device=device, seed=1).flatten()
        for each in (x.contiguous(), x, x[:, :, 1:, ::2]):
            yield "rms_norm_silu", (each, gamma, True)
            yield "rms_norm_silu", (each, None, False)
            yield "rms_norm_silu", (each, gamma, True, gamma, each)
            yield "add_rms_norm_silu", (each, gamma, True, None, each.repeat(1, 1, 2, 2))
            yield "add_pad", (each, gamma, each)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 10, 14, 3), generator=generator, dtype=torch.uint8).to(device)
    floats = (torch.rand((2, 3, 10, 14), generator=generator) * 2 - 1).to(device)
    for pixels in (image, image[:, 1:9, ::2], floats, floats[..., 2:12:2], floats[:, :, 1:9]):
        patch = 1 if pixels.shape[-1] == 5 or pixels.shape[2] == 7 else 2
        for dtype in (torch.float32, torch.bfloat16):
            yield "pack_pixels", (pixels, patch, dtype)
            yield "pack_pixels", (pixels, patch, dtype, 16)
    for each in (image, image[0], image[:, 1:9, ::2], image[0, :, :, [2, 1, 0]]):
        for vertical_first in (False, True):
            crop = [1, 2, 9, 11]
            yield "resize_crop", (each, [12, 17], crop, "lanczos", vertical_first)
            yield "resize_crop", (each, [11, 13], crop, "bicubic", vertical_first)
    for patch, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        x = latent((2, 5, 7, 3 * patch**2, 1), dtype, device=device).permute(0, 3, 1, 2, 4)[..., 0]
        for each in (x.contiguous(), x, x[:, :, 1:, ::2]):
            yield "unpack_pixels", (each, patch, False)
            yield "unpack_pixels", (each, patch, True)


def run(op: str, arguments: tuple[Any, ...], backend: str | None) -> tuple[Tensor, ...]:
    """The outputs of an op, or of its reference where `backend` is None."""
    name, _, overload = op.partition(".")
    if backend is None:
        result = registry.select(op, "eager", arguments[0].device)(*arguments)
    elif overload:
        cond, noise, mask = arguments
        result = ops.prepare_latents(cond, noise, condition_mask=mask, backend=backend)
    else:
        result = getattr(ops, name)(*arguments, backend=backend)
    outputs = result if isinstance(result, tuple) else (result,)
    # What it wrote in place is an output too.
    return (*outputs, arguments[1]) if op.endswith("_") else outputs


def frame_calls(device: str) -> Iterator[Call]:
    """Calls of `transform_frames` on `device`; the same values on every device."""
    for seed, (count, to) in enumerate(FORMS):
        dtypes = FRAME_DTYPES[seed % len(FRAME_DTYPES)]
        for channels, layout in ((3, "sliced"), (96, "channels_last"), (520, "channels_last")):
            yield make_call(count, to, 5, (1, channels, 2, 3), dtypes, layout, device, seed)


def check(
    device: str, which: tuple[str, ...] = ("cpp", "triton"), only: list[str] | None = None
) -> Counter[str]:
    """Run everything that the backends `which` serve on `device`.

    Args:
        only: the names of the ops to run; None: all.

    Returns:
        Calls made per "op backend".

    Raises:
        AssertionError: a result differs from the reference by more than its rounding.
    """
    made: Counter[str] = Counter()
    for backend in which:
        for (op, arguments), (_, theirs) in zip(cases(device), cases("cpu"), strict=True):
            if only is not None and op.partition(".")[0] not in only:
                continue
            if registry.backend_error(backend, device, op) is not None:
                continue
            got, wanted = run(op, arguments, backend), run(op, theirs, None)
            for i, (ours, expected) in enumerate(zip(got, wanted, strict=True)):
                # Bytes are equal: both sides round halves to even.
                bound = 2 * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0
                torch.testing.assert_close(
                    ours.cpu(),
                    expected,
                    rtol=bound,
                    atol=bound,
                    msg=lambda text, at=f"{op} {backend} output {i}": f"{at}: {text}",
                )
            made[f"{op} {backend}"] += 1
        if only is not None and "transform_frames" not in only:
            continue
        if registry.backend_error(backend, device, "transform_frames") is None:
            for call, same in zip(frame_calls(device), frame_calls("cpu"), strict=True):
                got = ops.transform_frames(*call.positional, **call.named, backend=backend)
                found = fault(same, tuple(x.cpu() for x in got))
                assert found is None, f"transform_frames {backend}: {found} in {call}"
                made[f"transform_frames {backend}"] += 1
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", help="names of ops (default: all)")
    options = parser.parse_args()
    made = check(options.device, only=options.only)
    for name, count in made.items():
        print(f"{name}: {count} calls equal the reference")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
