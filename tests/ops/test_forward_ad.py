"""Forward-mode derivatives of every op: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_inputs import latent
from torch import Tensor
from torch.autograd import forward_ad

from cosmos3_fast import ops
from cosmos3_fast.ops.prepare_latents import (
    prepare_latents_mask_reference,
    prepare_latents_reference,
)
from cosmos3_fast.ops.rms_norm_silu import (
    add_pad_reference,
    add_rms_norm_silu_reference,
    rms_norm_silu_reference,
)
from cosmos3_fast.ops.transform_frames import transform_frames_reference

OPS = torch.ops.cosmos3


def inputs(device: str) -> dict[str, Tensor]:
    float64 = torch.float64
    return {
        "cond": latent((1, 3, 1, 2, 4), float64, device=device),
        "noise": latent((2, 3, 4, 2, 4), float64, device=device, seed=1),
        "mask": latent((2, 1, 4, 1, 1), float64, device=device, seed=2).sigmoid(),
        "x": latent((2, 3, 4, 2, 1), float64, device=device, seed=3)[..., 0],
        "weight": latent((3, 1, 1, 1, 1), float64, device=device, seed=4).flatten(),
        "bias": latent((3, 1, 1, 1, 1), float64, device=device, seed=6).flatten(),
        "residual": latent((2, 3, 4, 2, 1), float64, device=device, seed=7)[..., 0],
        "pixels": latent((1, 3, 4, 6, 1), float64, device=device, seed=5)[..., 0],
    }


# (arguments, the op, the wrapper, plain torch)
Function = Callable[..., Tensor]
CASES: dict[str, tuple[tuple[str, ...], Function, Function, Function]] = {
    "frames": (
        ("cond", "noise"),
        lambda c, n: OPS.prepare_latents(c, n, [0, 2])[0],
        lambda c, n: ops.prepare_latents(c, n, (0, 2))[0],
        lambda c, n: prepare_latents_reference(c, n, (0, 2))[0],
    ),
    "mask": (
        ("cond", "noise", "mask"),
        lambda c, n, m: OPS.prepare_latents(c, n, m)[0],
        lambda c, n, m: ops.prepare_latents(c, n, condition_mask=m)[0],
        lambda c, n, m: prepare_latents_mask_reference(c, n, m)[0],
    ),
    "norm": (("x", "weight"), OPS.rms_norm_silu, ops.rms_norm_silu, rms_norm_silu_reference),
    "add and norm": (
        ("x", "weight", "bias", "residual"),
        lambda x, w, b, r: OPS.add_rms_norm_silu(x, w, True, b, r)[0],
        lambda x, w, b, r: ops.add_rms_norm_silu(x, w, True, b, r)[0],
        lambda x, w, b, r: add_rms_norm_silu_reference(x, w, True, b, r)[0],
    ),
    "transformed frames": (
        ("x", "weight", "bias"),
        lambda x, w, b: OPS.transform_frames([x, x, 2 * x], 2, 2, b, None, w)[1],
        lambda x, w, b: ops.transform_frames([x, x, 2 * x], 2, to=2, bias=b, weight=w)[1],
        lambda x, w, b: transform_frames_reference([x, x, 2 * x], 2, 2, b, None, w)[1],
    ),
    "add and pad": (("x", "bias", "residual"), OPS.add_pad, ops.add_pad, add_pad_reference),
    "pack": (
        ("pixels",),
        lambda p: OPS.pack_pixels(p, 2, torch.float64),
        lambda p: ops.pack_pixels(p, 2, torch.float64),
        lambda p: torch.nn.functional.pixel_unshuffle(p, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", [0, 1], ids=["op", "wrapper"])
def test_tangents_are_those_of_plain_torch(which: int, case: str, device: str):
    names, *functions, reference = CASES[case]
    primals = tuple(inputs(device)[name] for name in names)
    tangents = tuple(torch.sin(3 * p) for p in primals)
    value, tangent = torch.func.jvp(functions[which], primals, tangents)
    wanted_value, wanted = torch.func.jvp(reference, primals, tangents)
    assert wanted.any()
    # The same formula in float64.
    torch.testing.assert_close(tangent, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        dual = forward_ad.unpack_dual(functions[which](*duals)).tangent
    torch.testing.assert_close(dual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_tangents_equal_finite_differences(case: str, device: str):
    names, op, *_ = CASES[case]
    leaves = tuple(inputs(device)[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, fast_mode=True)


def test_one_tangent_of_two_is_enough(device: str):
    cond, noise = inputs(device)["cond"], inputs(device)["noise"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(cond, torch.ones_like(cond))
        latents, velocity = ops.prepare_latents(dual, noise, (1,))
        tangent = forward_ad.unpack_dual(latents).tangent
        assert forward_ad.unpack_dual(velocity).tangent is None or not velocity[0, 0, 1].any()
    assert (tangent[:, :, 1] == 1).all()
    assert not tangent[:, :, [0, 2, 3]].any()


def refused() -> dict[str, Callable[[Tensor], Any]]:
    packed, weight = torch.zeros(36, 1, 16, 32), torch.zeros(32, 16, 3, 3)
    noise = torch.zeros(1, 2, 3, 2, 2)
    return {
        "prepare_latents_": lambda t: OPS.prepare_latents_(t * torch.ones(1, 2, 1, 2, 2), noise),
        "winograd_pack": lambda t: OPS.winograd_pack(t * weight),
        "winograd_conv3x3": lambda t: OPS.winograd_conv3x3(t * torch.ones(1, 16, 4, 4), packed),
    }


@pytest.mark.parametrize("op", refused())
def test_what_has_no_derivative_says_so(op: str):
    with pytest.raises(RuntimeError, match=f"{op}: .* must not require a gradient|{op}: no argu"):
        torch.func.jvp(refused()[op], (torch.ones(()),), (torch.ones(()),))
