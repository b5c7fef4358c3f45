"""One message per fault, the same from each backend and from the fake kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_inputs import latent
from torch._subclasses.fake_tensor import FakeTensorMode

from cosmos3_fast import ops
from cosmos3_fast.ops import registry

COND = (1, 3, 1, 4, 6)
NOISE = (2, 3, 5, 4, 6)


def frames_call(
    cond: tuple[int, ...] = COND,
    noise: tuple[int, ...] = NOISE,
    frames: tuple[int, ...] = (0,),
    cond_dtype: torch.dtype = torch.float32,
    noise_dtype: torch.dtype = torch.float32,
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (
        torch.zeros(cond, dtype=cond_dtype),
        torch.zeros(noise, dtype=noise_dtype),
        list(frames),
    )


FRAME_FAULTS = {
    "noise rank": (
        frames_call(noise=(3, 5, 4, 6)),
        "noise must have 5 dimensions [B, C, T, H, W], got shape [3, 5, 4, 6]",
    ),
    "noise dtype": (
        frames_call(noise_dtype=torch.int32),
        "noise must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "cond rank": (
        frames_call(cond=(1, 3, 4, 6)),
        "cond_latent must have 5 dimensions [B, C, T, H, W], got shape [1, 3, 4, 6]",
    ),
    "cond dtype": (
        frames_call(cond_dtype=torch.uint8),
        "cond_latent must be float32, bfloat16, float16 or float64, got torch.uint8",
    ),
    "complex": (
        frames_call(cond_dtype=torch.complex64),
        "cond_latent must be float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    "channels": (
        frames_call(cond=(1, 4, 1, 4, 6)),
        "cond_latent must have C, H and W of noise [2, 3, 5, 4, 6], got [1, 4, 1, 4, 6]",
    ),
    "height": (
        frames_call(cond=(1, 3, 1, 5, 6)),
        "cond_latent must have C, H and W of noise [2, 3, 5, 4, 6], got [1, 3, 1, 5, 6]",
    ),
    "width": (
        frames_call(cond=(1, 3, 1, 4, 1)),
        "cond_latent must have C, H and W of noise [2, 3, 5, 4, 6], got [1, 3, 1, 4, 1]",
    ),
    "batch": (
        frames_call(cond=(3, 3, 1, 4, 6)),
        "cond_latent must have batch size 1 or that of noise (2), got 3",
    ),
    "no batch": (
        frames_call(cond=(0, 3, 1, 4, 6)),
        "cond_latent must have batch size 1 or that of noise (2), got 0",
    ),
    "negative frame": (
        frames_call(frames=(0, -1)),
        "condition_frames must lie in [0, 5), got [0, -1]",
    ),
    "frame too large": (
        frames_call(frames=(5,)),
        "condition_frames must lie in [0, 5), got [5]",
    ),
    "frame of 2**40": (
        frames_call(frames=(1 << 40,)),
        "condition_frames must lie in [0, 5), got [1099511627776]",
    ),
    "repeated frame": (
        frames_call(frames=(1, 2, 1)),
        "condition_frames must not repeat a frame, got [1, 2, 1]",
    ),
    "clip too short": (
        frames_call(cond=(1, 3, 2, 4, 6), frames=(0, 2)),
        "cond_latent must have 1 frame or more than max(condition_frames) = 2, got 2",
    ),
    "no frame": (
        frames_call(cond=(1, 3, 0, 4, 6)),
        "cond_latent must have 1 frame or more than max(condition_frames) = 0, got 0",
    ),
}


def mask_call(
    mask: tuple[int, ...] = (1, 1, 5, 1, 1),
    cond: tuple[int, ...] = COND,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.zeros(cond), torch.zeros(NOISE), torch.zeros(mask, dtype=dtype))


MASK_FAULTS = {
    "mask rank": (
        mask_call((5,)),
        "condition_mask must have 5 dimensions [B, C, T, H, W], got shape [5]",
    ),
    "mask dtype": (
        mask_call(dtype=torch.bool),
        "condition_mask must be float32, bfloat16, float16 or float64, got torch.bool",
    ),
    **{
        f"mask shape {shape}": (
            mask_call(shape),
            "condition_mask must have shape [1 or B, 1, T, 1, 1] for noise [2, 3, 5, 4, 6], "
            f"got {list(shape)}",
        )
        for shape in [
            (3, 1, 5, 1, 1),
            (2, 3, 5, 1, 1),
            (1, 1, 4, 1, 1),
            (1, 1, 1, 1, 1),
            (1, 1, 5, 4, 1),
            (1, 1, 5, 1, 6),
        ]
    },
    "clip too short for a mask": (
        mask_call(cond=(1, 3, 3, 4, 6)),
        "cond_latent must have 1 frame or at least those of noise (5), got 3",
    ),
    "mask with wrong channels": (
        mask_call(cond=(1, 2, 1, 4, 6)),
        "cond_latent must have C, H and W of noise [2, 3, 5, 4, 6], got [1, 2, 1, 4, 6]",
    ),
}


def norm_call(
    x: tuple[int, ...] = (2, 3, 4, 5),
    weight: tuple[int, ...] = (3,),
    bias: tuple[int, ...] = (3,),
    residual: tuple[int, ...] = (2, 3, 4, 5),
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype = torch.float32,
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (
        torch.zeros(x, dtype=dtype),
        torch.zeros(weight),
        True,
        torch.zeros(bias),
        torch.zeros(residual, dtype=residual_dtype),
    )


NORM_FAULTS = {
    "x rank": (norm_call((3, 4)), "x must have shape [B, C, H, W], got [3, 4]"),
    "x dtype": (
        norm_call(dtype=torch.int64),
        "x must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "weight rank": (norm_call(weight=(3, 1)), "weight must have shape [C], got [3, 1]"),
    "weight length": (
        norm_call(weight=(4,)),
        "weight must have the C = 3 elements of x, got 4",
    ),
    "bias rank": (norm_call(bias=(1, 3)), "bias must have shape [C], got [1, 3]"),
    "bias length": (norm_call(bias=(2,)), "bias must have the C = 3 elements of x, got 2"),
    "residual rank": (
        norm_call(residual=(3, 4, 5)),
        "residual must have shape [B, C/t, s·H, s·W], got [3, 4, 5]",
    ),
    "residual dtype": (
        norm_call(residual_dtype=torch.bfloat16),
        "residual must have the dtype of x, torch.float32, got torch.bfloat16",
    ),
    **{
        f"residual {shape}": (
            norm_call(residual=shape),
            f"residual must have shape [B, C/t, s·H, s·W] for x [2, 3, 4, 5], got {list(shape)}",
        )
        for shape in [
            (1, 3, 4, 5),
            (2, 2, 4, 5),
            (2, 6, 4, 5),
            (2, 0, 4, 5),
            (2, 3, 8, 5),
            (2, 3, 4, 10),
            (2, 3, 2, 2),
            (2, 3, 0, 0),
        ]
    },
}


def pixels_call(
    pixels: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    patch_size: int = 2,
    out: torch.dtype = torch.float32,
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.zeros(pixels, dtype=dtype), patch_size, out)


def winograd_call(
    x: tuple[int, ...] = (2, 16, 5, 7),
    packed: tuple[int, ...] = (36, 2, 16, 32),
    bias: tuple[int, ...] = (64,),
    residual: tuple[int, ...] = (2, 64, 5, 7),
    dtype: torch.dtype = torch.float32,
) -> Callable[[], tuple[Any, ...]]:
    return lambda: (
        torch.zeros(x, dtype=dtype),
        *(torch.zeros(shape) for shape in (packed, bias, residual)),
    )


def frames_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def transform_call(
    products: list[torch.Tensor] | None = None, frames: int = 5, to: int = 1, **named: Any
) -> Callable[[], tuple[Any, ...]]:
    names = ("bias", "residual", "weight", "silu", "past", "scales", "keep_sum")
    given = {"silu": True, "keep_sum": True, "point": 1.0, **named}
    rest = [given.get(name) for name in (*names, "sum_dtype", "frames_dtype", "point")]
    chosen = frames_of((10, 3, 4, 6)) if products is None else products
    return lambda: (chosen, frames, to, *rest)


TRANSFORM_FAULTS = {
    "count": (
        transform_call(frames_of(*[(10, 3, 4, 6)] * 2)),
        "products must be 1, 3, 4 or 6 tensors, got 2",
    ),
    "target": (transform_call(to=3), "to must be 0, 1, 2 or 4, got 3"),
    "frames": (transform_call(frames=0), "frames must be at least 1, got 0"),
    "rank": (
        transform_call(frames_of((10, 3, 4))),
        "products must have shape [N, C, H, W], got [10, 3, 4]",
    ),
    "dtype": (
        transform_call(frames_of((10, 3, 4, 6), dtype=torch.int32)),
        "products must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "dtypes": (
        transform_call(
            [*frames_of(*[(10, 3, 4, 6)] * 2), *frames_of((10, 3, 4, 6), dtype=torch.float16)]
        ),
        "products must have one dtype, torch.float32, got torch.float16",
    ),
    **{
        f"shapes {shape}": (
            transform_call(frames_of((10, 3, 4, 6), shape, (10, 3, 4, 6))),
            f"products must have one shape, [10, 3, 4, 6], got {list(shape)}",
        )
        for shape in [(5, 3, 4, 6), (10, 3, 4, 5), (10, 3, 4)]
    },
    "channels": (
        transform_call(frames_of((10, 0, 4, 6))),
        "products must have channels, got [10, 0, 4, 6]",
    ),
    "batch of frames": (
        transform_call(frames_of((9, 3, 4, 6))),
        "products must have N a multiple of 5, for 5 frames in blocks of 1, got [9, 3, 4, 6]",
    ),
    "batch of blocks": (
        transform_call(frames_of(*[(3, 3, 4, 6)] * 6)),
        "products must have N a multiple of 2, for 5 frames in blocks of 4, got [3, 3, 4, 6]",
    ),
    "scales": (transform_call(scales=[1.0, 2.0]), "scales must be 1 numbers, got 2"),
    **{
        f"point {text}": (
            transform_call(point=float(text)),
            f"point must be positive and finite, got {text}",
        )
        for text in ("0", "-1.5", "inf", "nan")
    },
    "sum_dtype": (
        transform_call(sum_dtype=torch.int8),
        "sum_dtype must be float32, bfloat16, float16 or float64, got torch.int8",
    ),
    "float64 frames": (
        transform_call(frames_dtype=torch.float64),
        "frames_dtype must be float64 where the products are, and only there (torch.float32), "
        "got torch.float64",
    ),
    "float32 sum of float64": (
        transform_call(frames_of((10, 3, 4, 6), dtype=torch.float64), sum_dtype=torch.float32),
        "sum_dtype must be float64 where the products are, and only there (torch.float64), "
        "got torch.float32",
    ),
    "bias": (
        transform_call(bias=torch.zeros(4)),
        "bias must have the C = 3 elements of products, got 4",
    ),
    "weight": (transform_call(weight=torch.zeros(3, 1)), "weight must have shape [C], got [3, 1]"),
    "residual rank": (
        transform_call(residual=torch.zeros(10, 3, 4, 6)),
        "residual must have shape [frames, B, C, H, W], got [10, 3, 4, 6]",
    ),
    "residual dtype": (
        transform_call(residual=torch.zeros(5, 2, 3, 4, 6), sum_dtype=torch.bfloat16),
        "residual must have sum_dtype, torch.bfloat16, got torch.float32",
    ),
    "residual shape": (
        transform_call(residual=torch.zeros(4, 2, 3, 4, 6)),
        "residual must have shape [5, 2, 3, 4, 6], got [4, 2, 3, 4, 6]",
    ),
    "past dtype": (
        transform_call(past=torch.zeros(2, 2, 3, 4, 6), frames_dtype=torch.float16),
        "past must have frames_dtype, torch.float16, got torch.float32",
    ),
    "past shape": (
        transform_call(past=torch.zeros(2, 2, 3, 4, 7)),
        "past must have shape [2, 2, 3, 4, 6], got [2, 2, 3, 4, 7]",
    ),
}


ENCODER_FAULTS = {
    "transform_frames": TRANSFORM_FAULTS,
    "rms_norm_silu": NORM_FAULTS,
    "add_rms_norm_silu": NORM_FAULTS,
    "add_pad": {
        fault: (lambda make=make: (make()[0], *make()[3:]), message)
        for fault, (make, message) in NORM_FAULTS.items()
        if "weight" not in fault
    },
    "pack_pixels": {
        "rank": (
            pixels_call((3, 4, 4)),
            "pixels must have shape [B, 3, H, W], or [B, H, W, 3] in uint8, got [3, 4, 4]",
        ),
        "dtype": (
            pixels_call((1, 3, 4, 4), torch.int16),
            "pixels must be uint8, float32, bfloat16, float16 or float64, got torch.int16",
        ),
        "colors": (
            pixels_call((1, 4, 4, 4)),
            "pixels must have 3 colors in shape [B, 3, H, W], or [B, H, W, 3] in uint8, "
            "got [1, 4, 4, 4]",
        ),
        "colors of bytes": (
            pixels_call((1, 3, 4, 4), torch.uint8),
            "pixels must have 3 colors in shape [B, 3, H, W], or [B, H, W, 3] in uint8, "
            "got [1, 3, 4, 4]",
        ),
        "target dtype": (
            pixels_call((1, 3, 4, 4), out=torch.uint8),
            "dtype must be float32, bfloat16, float16 or float64, got torch.uint8",
        ),
        "patch size": (
            pixels_call((1, 3, 4, 4), patch_size=0),
            "patch_size must be in 1 … 32768, got 0",
        ),
        "large patch size": (
            pixels_call((0, 3, 0, 0), patch_size=1 << 62),
            f"patch_size must be in 1 … 32768, got {1 << 62}",
        ),
        "height": (
            pixels_call((1, 3, 5, 4)),
            "pixels must have height and width divisible by patch_size = 2, got [1, 3, 5, 4]",
        ),
        "channels too few": (
            lambda: (torch.zeros(1, 3, 4, 4), 2, torch.float32, 11),
            "channels must be 0 or at least 3·patch_size² = 12, got 11",
        ),
        "width of bytes": (
            pixels_call((1, 4, 5, 3), torch.uint8),
            "pixels must have height and width divisible by patch_size = 2, got [1, 4, 5, 3]",
        ),
    },
    "winograd_pack": {
        "rank": (
            lambda: (torch.zeros(32, 16, 3),),
            "weight must have shape [Cout, Cin, 3, 3], got [32, 16, 3]",
        ),
        "dtype": (
            lambda: (torch.zeros(32, 16, 3, 3, dtype=torch.float64),),
            "weight must be float32, got torch.float64",
        ),
        **{
            f"shape {shape}": (
                lambda shape=shape: (torch.zeros(shape),),
                "weight must have shape [Cout, Cin, 3, 3] with Cout a multiple of 32 and Cin of "
                f"16, got {list(shape)}",
            )
            for shape in [(48, 16, 3, 3), (32, 12, 3, 3), (32, 16, 5, 3), (32, 16, 3, 1)]
        },
    },
    "winograd_conv3x3": {
        "x rank": (
            winograd_call(x=(16, 5, 7)),
            "x must have shape [B, Cin, H, W], got [16, 5, 7]",
        ),
        "x dtype": (winograd_call(dtype=torch.bfloat16), "x must be float32, got torch.bfloat16"),
        "packed rank": (
            winograd_call(packed=(36, 32, 32)),
            "packed_weight must have shape [36, Cout/32, Cin, 32], got [36, 32, 32]",
        ),
        **{
            f"packed {shape}": (
                winograd_call(packed=shape),
                "packed_weight must have shape [36, Cout/32, Cin, 32] for x [2, 16, 5, 7], "
                f"got {list(shape)}",
            )
            for shape in [(16, 2, 16, 32), (36, 2, 32, 32), (36, 2, 16, 16)]
        },
        "bias": (winograd_call(bias=(32,)), "bias must have shape [64], got [32]"),
        "residual": (
            winograd_call(residual=(1, 64, 5, 7)),
            "residual must have shape [2, 64, 5, 7], got [1, 64, 5, 7]",
        ),
    },
}

CALLS = {
    **{
        (op, fault): (arguments, f"{op}: {message}")
        for op in ("prepare_latents", "prepare_latents_")
        for fault, (arguments, message) in FRAME_FAULTS.items()
    },
    **{
        ("prepare_latents.mask", fault): (arguments, f"prepare_latents: {message}")
        for fault, (arguments, message) in MASK_FAULTS.items()
    },
    **{
        (op, fault): (arguments, f"{op}: {message}")
        for op, faults in ENCODER_FAULTS.items()
        for fault, (arguments, message) in faults.items()
    },
    ("prepare_latents_", "expanded noise"): (
        lambda: (torch.zeros(COND), torch.zeros(2, 3, 5, 1, 6).expand(NOISE), [0]),
        "prepare_latents_: noise must not be expanded, got stride 0 in dimension 3 of size 4",
    ),
}
parametrize_faults = pytest.mark.parametrize(
    ("op", "fault"), list(CALLS), ids=[f"{op}: {fault}" for op, fault in CALLS]
)


def on_device(argument: Any, device: str) -> Any:
    """With sizes and strides as they are: `.to` would make a tensor that is expanded dense."""
    if isinstance(argument, torch.Tensor):
        shape, strides = argument.shape, argument.stride()
        return torch.empty_strided(shape, strides, dtype=argument.dtype, device=device).zero_()
    if isinstance(argument, list | tuple):
        return [on_device(each, device) for each in argument]
    return argument


@parametrize_faults
@pytest.mark.parametrize("backend", [None, *registry.BACKENDS])
def test_each_backend_says_the_same(op: str, fault: str, backend: str | None, device: str):
    if backend and (error := registry.backend_error(backend, device, op)) is not None:
        pytest.skip(error)
    make_arguments, message = CALLS[op, fault]
    arguments = on_device(make_arguments(), device)
    with pytest.raises(RuntimeError) as raised:
        registry.select(op, backend, torch.device(device))(*arguments)
    assert str(raised.value) == message
    if op.endswith("_"):
        assert not arguments[1].any(), "nothing may have been written"


@parametrize_faults
@pytest.mark.parametrize("fake_device", ["cpu", "cuda"])
def test_the_fake_says_the_same(op: str, fault: str, fake_device: str):
    make_arguments, message = CALLS[op, fault]
    arguments = make_arguments()
    with FakeTensorMode():
        fakes = on_device(arguments, fake_device)
        with pytest.raises(RuntimeError) as raised:
            registry.select(op, None, torch.device(fake_device))(*fakes)
    assert str(raised.value) == message


@pytest.mark.parametrize("op", ["prepare_latents", "prepare_latents.mask", "prepare_latents_"])
def test_devices_must_agree(op: str):
    third = torch.zeros(1, 1, 5, 1, 1, device="meta") if op.endswith(".mask") else [0]
    with FakeTensorMode():
        noise = torch.empty(NOISE, device="cuda")
        cond = torch.empty(COND, device="cpu")
        if isinstance(third, torch.Tensor):
            third = torch.empty(1, 1, 5, 1, 1, device="cuda")
        with pytest.raises(RuntimeError) as raised:
            registry.select(op, None, noise.device)(cond, noise, third)
    name = op.partition(".")[0]
    assert f"{name}: cond_latent must be on the device of noise (cuda:0), got cpu" in str(
        raised.value
    )


def test_devices_of_the_encoder_ops_must_agree():
    with FakeTensorMode():
        x = torch.empty(1, 16, 4, 4, device="cuda")
        packed = torch.empty(36, 1, 16, 32, device="cuda")
        on_cpu = torch.empty(32)
        for call, message in [
            (lambda: ops.rms_norm_silu(x, on_cpu[:16]), "rms_norm_silu: weight must be on the dev"),
            (lambda: ops.add_pad(x, on_cpu[:16]), "add_pad: bias must be on the dev"),
            (lambda: ops.add_pad(x, None, x.cpu()), "add_pad: residual must be on the dev"),
            (
                lambda: ops.transform_frames([x] * 3, 1, weight=on_cpu[:16]),
                "transform_frames: weight must be on the device of products",
            ),
            (
                lambda: ops.transform_frames([x, x, x.cpu()], 1),
                "transform_frames: products must be on the device of the first of them",
            ),
            (lambda: ops.winograd_conv3x3(x, packed.cpu()), "conv3x3: packed_weight must be on"),
            (lambda: ops.winograd_conv3x3(x, packed, on_cpu), "conv3x3: bias must be on the dev"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_devices_must_agree_on_a_gpu():
    with pytest.raises(
        RuntimeError, match=r"cond_latent must be on the device of noise \(cuda:0\), got cpu"
    ):
        ops.prepare_latents(latent(COND), latent(NOISE, device="cuda"))


def test_gradients_in_place_are_refused():
    cond, noise = latent(COND).requires_grad_(), latent(NOISE)
    with pytest.raises(RuntimeError, match=r"prepare_latents_: .* must not require a gradient"):
        ops.prepare_latents_(cond, noise)
    with torch.no_grad():
        ops.prepare_latents_(cond, noise)
    assert torch.equal(noise[:1, :, :1], cond)


def test_an_unknown_backend_is_a_value_error():
    with pytest.raises(ValueError, match=r"backend must be None or one of .*, got 'cudnn'"):
        ops.prepare_latents(latent(COND), latent(NOISE), backend="cudnn")


def test_frames_and_mask_exclude_each_other():
    with pytest.raises(ValueError, match=r"condition_frames must be left out .*, got \[1\]"):
        ops.prepare_latents(
            latent(COND), latent(NOISE), (1,), condition_mask=torch.zeros(1, 1, 5, 1, 1)
        )


@pytest.mark.parametrize(
    ("frames", "got"),
    [
        (torch.zeros(1, 1, 5, 1, 1), "a tensor of shape [1, 1, 5, 1, 1] in torch.float32"),
        (torch.ones(5, dtype=torch.bool), "a tensor of shape [5] in torch.bool"),
        (0, "0"),
        (None, "None"),
    ],
    ids=["mask", "bool mask", "number", "None"],
)
def test_what_is_no_list_of_frames_is_named(frames: Any, got: str, device: str):
    cond, noise = latent(COND, device=device), latent(NOISE, device=device)
    for call, hint in (
        (ops.prepare_latents, "; give a mask as condition_mask="),
        (ops.prepare_latents_, ""),
    ):
        hint = hint if isinstance(frames, torch.Tensor) else ""  # noqa: PLW2901
        with pytest.raises(TypeError) as raised:
            call(cond, noise, frames)
        name = call.__name__
        wanted = f"{name}: condition_frames must be a list of frames, got {got}{hint}"
        assert str(raised.value) == wanted


def test_a_list_of_frames_may_be_any_integers(device: str):
    cond, noise = latent(COND, device=device), latent(NOISE, device=device)
    wanted, _ = ops.prepare_latents(cond, noise, [0, 2])
    for frames in (torch.tensor([0, 2]), torch.tensor([0, 2], dtype=torch.uint8), range(0, 3, 2)):
        assert torch.equal(ops.prepare_latents(cond, noise, frames)[0], wanted)


def test_a_named_backend_that_is_absent_raises_the_original_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "triton_error", lambda: "ImportError: libtriton.so is broken")
    with pytest.raises(
        registry.BackendUnavailableError,
        match=r"backend 'triton' cannot run prepare_latents on cpu: ImportError: libtriton\.so is",
    ):
        ops.prepare_latents(latent(COND), latent(NOISE), backend="triton")
    monkeypatch.setattr(
        registry, "LIBRARY_ERROR", "undefined symbol: aoti_x (built with torch 2.9)"
    )
    with pytest.raises(registry.BackendUnavailableError, match="undefined symbol: aoti_x"):
        ops.prepare_latents(latent(COND), latent(NOISE), backend="cpp")
