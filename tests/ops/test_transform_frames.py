"""`cosmos3::transform_frames` against its algebra in float64 and against 3-D convolutions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from frame_products import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    FORMS,
    LAYOUTS,
    Call,
    fault,
    images,
    make_call,
    matrices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos3_fast import ops
from cosmos3_fast.ops import registry
from cosmos3_fast.ops.cook_toom import (
    POINTS,
    SHARED,
    SHARED_POINT,
    SHARED_SCALES,
    cook_toom_tensors,
)
from cosmos3_fast.ops.transform_frames import (
    transform_frames_reference,
    transformed_bytes,
)

OP = torch.ops.cosmos3.transform_frames


def assert_right(call: Call, got: tuple[Tensor, ...]) -> None:
    assert (found := fault(call, got)) is None, found


@pytest.fixture(params=registry.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    error = registry.backend_error(request.param, device, "transform_frames")
    if error:
        pytest.skip(error)
    return request.param


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("count", "to"), FORMS)
def test_results_are_right_to_rounding(
    count: int, to: int, dtypes: tuple[torch.dtype, ...], backend: str, device: str, poison: None
):
    for seed, (frames, channels) in enumerate(
        itertools.product((1, 2, 4, 5, 9), (1, 7, 16, 40, 96))
    ):
        layout = LAYOUTS[seed % len(LAYOUTS)]
        image = (1 + seed % 2, channels, 2, 3)
        call = make_call(count, to, frames, image, dtypes, layout, device, seed)
        assert_right(call, ops.transform_frames(*call.positional, **call.named, backend=backend))


@pytest.mark.parametrize("image", [(2, 7, 30, 41), (1, 96, 9, 11), (1, 5000, 1, 3)], ids=str)
@pytest.mark.parametrize(("count", "to"), FORMS)
def test_many_pixels(
    count: int, to: int, image: tuple[int, int, int, int], backend: str, device: str, poison: None
):
    """More than a kernel takes together, by numbers that do not divide them."""
    for dtypes in DTYPES:
        call = make_call(count, to, 5, image, dtypes, device=device)
        assert_right(call, ops.transform_frames(*call.positional, **call.named, backend=backend))


@pytest.mark.parametrize(("count", "to"), FORMS)
def test_each_argument_may_be_absent(count: int, to: int, backend: str, device: str, poison: None):
    names = ("bias", "residual", "weight", "past", "scales")
    for absent in (*((n,) for n in names), names, ("residual", "past"), ("bias", "weight")):
        for silu, keep_sum in ((True, False), (False, True)):
            call = make_call(count, to, 5, (2, 24, 2, 2), device=device, absent=absent)
            call.named |= {"silu": silu, "keep_sum": keep_sum}
            got = ops.transform_frames(*call.positional, **call.named, backend=backend)
            assert_right(call, got)
            assert (got[0].numel() == 0) != keep_sum


def test_without_a_weight_frames_are_their_sums(backend: str, device: str):
    call = make_call(3, 1, 4, (1, 8, 2, 3), device=device, absent=("weight",))
    total, window, _ = ops.transform_frames(*call.positional, **call.named, backend=backend)
    assert torch.equal(window[2:], total)


@pytest.mark.parametrize(("m", "point"), [*((m, 1.0) for m in POINTS), (2, 0.75), (2, 1.3)])
def test_the_matrices_make_a_convolution(m: int, point: float):
    inverse, kernel, inputs = (torch.tensor(x, dtype=F64) for x in matrices(m, point))
    if point == 1:
        for ours, made in zip(
            (inverse, kernel, inputs), cook_toom_tensors(m, inverse), strict=True
        ):
            assert torch.equal(ours, made)
    generator = torch.Generator().manual_seed(m)
    d = torch.randn(m + 2, generator=generator, dtype=F64)
    g = torch.randn(3, generator=generator, dtype=F64)
    wanted = F.conv1d(d.view(1, 1, -1), g.view(1, 1, -1)).flatten()
    torch.testing.assert_close(inverse @ ((kernel @ g) * (inputs @ d)), wanted)
    assert kernel[-1].tolist() == [0.0, 0.0, 1.0]


def convolved(transformed: Tensor, kernels: Tensor) -> list[Tensor]:
    """The products of what `transform_frames` gave: a 2-D convolution of each with its kernel."""
    if transformed.dim() == 5:  # plain frames, of which each tap reads its own
        frames = transformed.shape[0] - 2
        transformed = torch.stack([transformed[i : i + frames] for i in range(3)])
    return [F.conv2d(x.flatten(0, 1), k, padding=1)
            for x, k in zip(transformed, kernels, strict=True)]  # fmt: skip


# Blocks of two whose kernels are those of blocks of four.
SHARING = "two of four"


@pytest.mark.parametrize("chunks", [(9,), (1, 4, 4), (3, 1, 6, 2), (4, 5)])
@pytest.mark.parametrize(
    ("first", "second"), [*itertools.product((1, 2, 4), repeat=2), (1, SHARING), (SHARING, SHARING)]
)
def test_two_layers_are_the_3d_convolutions(
    first: int | str, second: int | str, chunks: tuple[int, ...], backend: str, device: str
):
    """Clip -> causal convolution + bias + residual, norm, SiLU -> causal convolution + bias, in
    float64, a chunk at a time."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(device)

    frames, batch, inner = sum(chunks), 2, 6
    clip, skip = randn(batch, 5, frames, 4, 3), randn(batch, inner, frames, 4, 3)
    weights = randn(inner, 5, 3, 3, 3), randn(3, inner, 3, 3, 3)
    biases, gamma = (randn(inner), randn(3)), randn(inner)

    def causal(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w, b)

    summed = causal(clip, weights[0], biases[0]) + skip
    hidden = F.silu(F.normalize(summed, dim=1) * inner**0.5 * gamma.view(-1, 1, 1, 1))
    wanted = causal(hidden, weights[1], biases[1])

    def kernels(w: Tensor, m: int | str) -> Tensor:
        """One for each product: G applied to the taps."""
        if m == 1:
            return w.unbind(2)
        if m == SHARING:
            return kernels(w, 4)[[*SHARED]]
        return torch.einsum("pk,oikhw->poihw", cook_toom_tensors(m, w)[1], w)

    def form(m: int | str) -> tuple[int, list[float] | None]:
        return (2, [*SHARED_SCALES]) if m == SHARING else (m, None)

    point = SHARED_POINT if second == SHARING else 1.0
    stacks = kernels(weights[0], first), kernels(weights[1], second)
    pasts: list[Tensor | None] = [None, None]
    begin, got, sums = 0, [], []
    for count in chunks:
        part, add = (x[:, :, begin : begin + count].permute(2, 0, 1, 3, 4) for x in (clip, skip))
        begin += count
        _, x, pasts[0] = ops.transform_frames(
            *([part.flatten(0, 1)], count),
            to=form(first)[0],
            past=pasts[0],
            keep_sum=False,
            point=point,
            backend=backend,
        )
        total, x, pasts[1] = ops.transform_frames(
            *(convolved(x, stacks[0]), count),
            to=form(second)[0],
            bias=biases[0],
            scales=form(first)[1],
            point=point,
            residual=add,
            weight=gamma,
            past=pasts[1],
            backend=backend,
        )
        sums.append(total)
        y, *_ = ops.transform_frames(
            *(convolved(x, stacks[1]), count),
            bias=biases[1],
            scales=form(second)[1],
            point=point,
            backend=backend,
        )
        got.append(y)
    torch.testing.assert_close(torch.cat(sums).permute(1, 2, 0, 3, 4), summed)
    torch.testing.assert_close(torch.cat(got).permute(1, 2, 0, 3, 4), wanted)


def test_results_are_no_views(device: str):
    frame = images(3, 8, 2, 3, device=device)
    past = images(2, 1, 8, 2, 3, device=device, seed=1)
    for op in (OP, lambda *a: ops.transform_frames(*a[:2], to=a[2], past=a[7])):
        results = op([frame], 3, 1, None, None, None, True, past)
        pointers = {x.untyped_storage().data_ptr() for x in (*results, frame, past)}
        assert len(pointers) == 5


@pytest.mark.parametrize("image", [(0, 3, 2, 2), (2, 3, 0, 2), (2, 16, 2, 0)])
def test_without_elements(image: tuple[int, int, int, int], backend: str, device: str):
    for count, to in FORMS:
        call = make_call(count, to, 5, image, device=device)
        assert_right(call, ops.transform_frames(*call.positional, **call.named, backend=backend))


def test_extremes(backend: str, device: str, poison: None):
    """An infinite product and a NaN stay where they belong, norms are clamped."""
    call = make_call(6, 4, 4, (1, 16, 1, 4), device=device, absent=("residual", "bias", "scales"))
    for product in call.products:
        product[..., 0] = 0.0
        product[..., 1] = 1e-30
    call.products[5][:, 3, 0, 2] = float("inf")
    call.products[0][:, 3, 0, 3] = float("nan")
    total, x, _ = ops.transform_frames(*call.positional, **call.named, backend=backend)
    wanted = transform_frames_reference(*call.all())
    torch.testing.assert_close(total, wanted[0], equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x[..., :2], wanted[1][..., :2], rtol=1e-5, atol=1e-6)
    assert total[:3].isfinite()[..., 2].all()  # the last product is that of the last frame alone
    assert total[0, 0, 3, 0, 3].isnan()
    assert x[..., 3].isfinite().sum() < x[..., 3].numel()


@pytest.mark.parametrize(("count", "to"), FORMS)
def test_gradients(count: int, to: int, device: str):
    call = make_call(count, to, 3, (1, 3, 1, 2), (F64,) * 3, "contiguous", device)
    call.named["scales"] = [0.5] * count
    names = ("bias", "residual", "weight", "past")
    leaves = [*call.products, *(call.named[n].double() for n in names)]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {**call.named, **dict(zip(names, tensors[count:], strict=True))}
        results = ops.transform_frames([*tensors[:count]], call.frames, **given)
        return tuple(x for x in results if x.numel())

    assert torch.autograd.gradcheck(op, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_gradients_of_some(device: str):
    """Of what is asked for, where a tensor is two arguments, and in 16 bits."""
    x = images(4, 8, 2, 3, device=device).requires_grad_()
    ops.transform_frames([x, x, x], 4)[0].sum().backward()
    assert (x.grad == 3).all()
    call = make_call(6, 4, 4, (1, 8, 1, 2), (F16, BF16, F16), device=device)
    bias = call.named["bias"].requires_grad_()
    total, transformed, _ = ops.transform_frames(*call.positional, **call.named)
    (total.float().sum() + transformed.float().sum()).backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()
    assert call.products[0].grad is None


@pytest.mark.parametrize(("count", "to"), [(1, 0), (3, 1), (4, 2), (6, 4)])
def test_opcheck(count: int, to: int, device: str):
    layout = LAYOUTS[(count + to) % len(LAYOUTS)]
    call = make_call(count, to, 5, (2, 12, 2, 3), layout=layout, device=device)
    call.products[0].requires_grad_()
    call.named["bias"].requires_grad_()
    torch.library.opcheck(OP.default, call.all())


def test_opcheck_of_mixed_dtypes(device: str):
    call = make_call(6, 4, 3, (1, 8, 1, 2), (F16, BF16, F16), device=device,
                     absent=("past", "scales"), keep_sum=False)  # fmt: skip
    torch.library.opcheck(OP.default, call.all())


def layer(x: Tensor, frames: int, skip: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, first, _ = ops.transform_frames([x], frames, to=4, keep_sum=False)
    return ops.transform_frames(
        [each.flatten(0, 1) for each in first], frames, to=2, weight=gamma, residual=skip
    )


@pytest.mark.parametrize("backend_name", ["aot_eager", "eager"])
def test_compiled_for_sizes_that_vary(backend_name: str, device: str):
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend_name)
    gamma = torch.rand(8, device=device)
    for frames, height, width in ((4, 3, 5), (5, 4, 7), (9, 6, 2)):
        x = images(frames * 2, 8, height, width, device=device)
        skip = images(frames, 2, 8, height, width, device=device, seed=1)
        for ours, theirs in zip(
            compiled(x, frames, skip, gamma), layer(x, frames, skip, gamma), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_exported(device: str):
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, skip: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
            return layer(x, 5, skip, gamma)

    arguments = (
        images(10, 8, 3, 5, device=device),
        images(5, 2, 8, 3, 5, device=device, seed=1),
        torch.rand(8, device=device),
    )
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = ({2: height, 3: width}, {3: height, 4: width}, None)
    program = torch.export.export(Layer(), arguments, dynamic_shapes=sizes)
    other = (
        images(10, 8, 6, 4, device=device),
        images(5, 2, 8, 6, 4, device=device, seed=1),
        torch.rand(8, device=device),
    )
    for each in (arguments, other):
        for ours, theirs in zip(program.module()(*each), Layer()(*each), strict=True):
            assert torch.equal(ours, theirs)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_properties(data: st.DataObject):
    count, to = data.draw(st.sampled_from(FORMS))
    image = tuple(
        data.draw(st.integers(low, high)) for low, high in ((0, 2), (1, 70), (0, 3), (0, 4))
    )
    absent = data.draw(st.sets(st.sampled_from(["bias", "residual", "weight", "past", "scales"])))
    call = make_call(
        *(count, to, data.draw(st.integers(1, 11)), image),
        dtypes=data.draw(st.sampled_from(DTYPES)),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        seed=data.draw(st.integers(0, 5)),
        absent=tuple(absent),
        silu=data.draw(st.booleans()),
        keep_sum=data.draw(st.booleans()),
        point=data.draw(st.floats(0.25, 4)),
    )
    assert_right(call, OP(*call.all()))
    assert_right(call, transform_frames_reference(*call.all()))


def test_bytes_are_those_of_the_tensors(device: str):
    for (count, to), frames, dtypes in itertools.product(
        FORMS, (1, 4, 5), ((F32,) * 3, (F16, BF16, F16), (F16, F32, BF16))
    ):
        for absent in ((), ("residual",), ("past",)):
            call = make_call(count, to, frames, (2, 8, 2, 3), dtypes, device=device, absent=absent)
            results = ops.transform_frames(*call.positional, **call.named)
            read = [*call.products, call.named.get("residual")]
            read.append(call.named.get("past") if to else None)
            assert transformed_bytes(
                *(count, to, frames, 2 * 8 * 2 * 3),
                product_size=dtypes[0].itemsize,
                sum_size=dtypes[1].itemsize,
                frames_size=dtypes[2].itemsize,
                residual="residual" not in absent,
                past="past" not in absent,
            ) == sum(x.nbytes for x in (*read, *results) if x is not None)


# Bytes moved for each value of a frame by a call with four frames, past and residual: in 16 bits,
# and all in float32. Six products and six transformed frames take no more than three taps do.
BYTES = {(1, 4): (44, 88), (3, 1): (60, 120), (4, 2): (56, 112), (6, 4): (48, 96), (6, 1): (48, 96)}


@pytest.mark.parametrize(("count", "to"), BYTES)
def test_bytes_to_a_value_of_four_frames(count: int, to: int):
    assert BYTES[count, to] == tuple(
        transformed_bytes(count, to, 4, 1, product_size=size, sum_size=size, frames_size=size)
        for size in (2, 4)
    )
