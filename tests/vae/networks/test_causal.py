"""Causal convolutions: blocks along time, what they remember, and float16's bounds."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import FAMILIES, TINY_CLIP, latent_clip
from frame_products import matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cosmos3_fast.ops.cook_toom import SHARED, SHARED_POINT, cook_toom
from cosmos3_fast.vae import ClipDecoder, UnsupportedVAEError
from cosmos3_fast.vae.fold import FLOAT16_LOSS, FLOAT16_MOST, fitted
from cosmos3_fast.vae.networks.causal import CausalConv, Memory, NormSiLU, Products, Sum, Temporal
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict
from cosmos3_fast.vae.verify import largest, rms

BLOCKS = [1, 2, 4]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(5000 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def causal_conv(
    taps: Tensor, bias: Tensor, temporal: Temporal, gamma: Tensor | None, dtype: torch.dtype
) -> CausalConv:
    """As `fold.Fold.causal` makes it: [Cout, Cin, 3, 3, 3]."""
    earlier, exponents = fitted(taps, temporal, gamma, dtype)
    conv = CausalConv(taps.shape[1], taps.shape[0], None, temporal).to(dtype)
    state = {"weight": taps[:, :, -1], "bias": bias, "earlier": earlier, "exponents": exponents}
    conv.load_state_dict(state)
    return conv.requires_grad_(False)


def convolve(conv: CausalConv, norm: NormSiLU | None, clip: Tensor, sizes: list[int]) -> Tensor:
    """[T, B, C, H, W] as the layers take it: the first frame, then `sizes` frames at a time."""
    memory = Memory(clip.shape[1])
    made = []
    for frames in clip.split([1, *sizes]):
        x = frames.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        made.append(conv.after(norm, Sum(x), memory)[1].total())
        memory.first = False
    return torch.cat(made).unflatten(0, clip.shape[:2])


def wanted_of(taps: Tensor, bias: Tensor, gamma: Tensor | None, clip: Tensor) -> Tensor:
    """The 3-D layer in float64."""
    x = clip.double().permute(1, 2, 0, 3, 4)  # [B, C, T, H, W]
    if gamma is not None:
        x = F.normalize(x) * (gamma.numel() ** 0.5 * gamma.double()).view(-1, 1, 1, 1)
        x = F.silu(x)
    y = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), taps.double(), bias.double())
    return y.permute(2, 0, 1, 3, 4)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sizes", [[], [1], [2, 1], [3, 4], [8], [1] * 5, [5, 2, 4]])
def test_blocks_are_the_3d_convolution(sizes: list[int], block: int, normed: bool) -> None:
    """Of any number of frames at a time, whole blocks or not."""
    taps, bias, clip = seeded(5, 6, 3, 3, 3), seeded(5, seed=1), seeded(1 + sum(sizes), 2, 6, 4, 3)
    norm, gamma = None, None
    if normed:
        gamma = 1 + 0.3 * seeded(6, seed=2)
        norm = NormSiLU(6).double().requires_grad_(False)
        norm.weight.copy_(gamma)
    conv = causal_conv(taps, bias, Temporal(block, torch.float64), gamma, torch.float64)
    wanted = wanted_of(taps, bias, gamma, clip)
    assert largest(convolve(conv, norm, clip, sizes) - wanted) <= 1e-12 * largest(wanted)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=4),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 5, 5, 4, 4))),
    block=st.sampled_from(BLOCKS),
)
def test_blocks_are_the_3d_convolution_whatever_the_shape(
    sizes: list[int], shape: tuple[int, ...], block: int
) -> None:
    batch, inputs, outputs, height, width = shape
    taps, bias = seeded(outputs, inputs, 3, 3, 3), seeded(outputs, seed=1)
    clip = seeded(1 + sum(sizes), batch, inputs, height, width)
    conv = causal_conv(taps, bias, Temporal(block, torch.float64), None, torch.float64)
    wanted = wanted_of(taps, bias, None, clip)
    assert largest(convolve(conv, None, clip, sizes) - wanted) <= 1e-12 * largest(wanted)


def test_sums_and_residuals() -> None:
    """`keep_sum` gives the sum of the terms; the residual comes on top of the convolution."""
    taps, bias = seeded(6, 6, 3, 3, 3), seeded(6, seed=1)
    gamma = 1 + 0.3 * seeded(6, seed=2)
    conv = causal_conv(taps, bias, Temporal(4, torch.float64), gamma, torch.float64)
    norm = NormSiLU(6).double().requires_grad_(False)
    norm.weight.copy_(gamma)
    clip, added, residual = (seeded(6, 2, 6, 4, 3, seed=seed) for seed in (3, 4, 5))
    offset = seeded(6, seed=6)
    memory = Memory(2)
    sums, made = [], []
    for part in zip(*(x.split([1, 5]) for x in (clip, added, residual)), strict=True):
        x, term, rest = (
            each.flatten(0, 1).contiguous(memory_format=torch.channels_last) for each in part
        )
        total, terms = conv.after(norm, Sum(x, offset, term), memory, rest, keep_sum=True)
        sums.append(total)
        made.append(terms.total())
        memory.first = False
    wanted = clip + added + offset.view(-1, 1, 1)
    assert largest(torch.cat(sums).view(clip.shape) - wanted) <= 1e-14 * largest(wanted)
    wanted = wanted_of(taps, bias, gamma, wanted) + residual
    assert largest(torch.cat(made).view(clip.shape) - wanted) <= 1e-12 * largest(wanted)


@pytest.mark.parametrize("sizes", [[1], [2, 1], [1] * 5, [4, 1, 8, 2, 3]])
def test_layers_after_each_other(sizes: list[int]) -> None:
    """In blocks of four; one or two frames in a block of two, with four of the six kernels."""
    taps = [seeded(6, 6, 3, 3, 3, seed=seed) for seed in range(3)]
    bias, temporal = torch.zeros(6, dtype=torch.float64), Temporal(4, torch.float64)
    convs = [causal_conv(each, bias, temporal, None, torch.float64) for each in taps]
    clip, memory, made = seeded(1 + sum(sizes), 2, 6, 4, 3), Memory(2), []
    for frames in clip.split([1, *sizes]):
        terms: Any = Sum(frames.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for conv in convs:
            _, terms = conv.after(None, terms, memory)
            if not memory.first:
                assert len(terms.parts) == (4 if len(frames) <= 2 else 6)
        made.append(terms.total())
        memory.first = False
    wanted = clip
    for each in taps:
        wanted = wanted_of(each, bias, None, wanted)
    assert largest(torch.cat(made).view(clip.shape) - wanted) <= 1e-12 * largest(wanted)


def test_a_memory_keeps_two_frames_and_no_view_of_more() -> None:
    taps, bias = seeded(4, 4, 3, 3, 3), seeded(4, seed=1)
    for block in BLOCKS:
        conv = causal_conv(taps, bias, Temporal(block, torch.float64), None, torch.float64)
        memory = Memory(2)
        assert memory.past(conv) is None
        for size in (1, 9, 1):
            clip = seeded(size, 2, 4, 3, 3, seed=size).flatten(0, 1)
            conv.after(None, Sum(clip.contiguous(memory_format=torch.channels_last)), memory)
            memory.first = False
            past = memory.past(conv)
            assert past is not None
            assert past.shape == (2, 2, 4, 3, 3)
            assert past.untyped_storage().nbytes() == past.numel() * past.element_size()


def half_products(decoder: ClipDecoder) -> list[tuple[str, NormSiLU, CausalConv]]:
    """The convolutions with float16 products, each with the norm in front of it."""
    modules = dict(decoder.named_modules())
    found = []
    for name, conv in modules.items():
        if not isinstance(conv, CausalConv) or conv.temporal is None:
            continue
        if conv.temporal.block > 1 and conv.earlier.dtype == torch.float16:
            parent, _, last = name.rpartition(".")
            norm = "norm_out" if last == "conv_out" else f"{parent}.norm{last[-1]}"
            found.append((name, modules[norm], conv))
    return found


def kernels_of(conv: CausalConv) -> Tensor:
    """[m + 2, Cout, Cin, 3, 3] in float64, as they are held but unscaled."""
    held = conv.earlier.double().unflatten(0, (-1, conv.out_channels))
    last = (conv.weight * 2.0 ** conv.exponents[-1]).to(conv.earlier.dtype).double()
    scales = (2.0 ** -conv.exponents.double()).view(-1, 1, 1, 1, 1)
    return torch.cat([held, last[None]]) * scales


@pytest.mark.parametrize("gamma", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_float16_products_at_their_bound(dtype: torch.dtype, gamma: float | None) -> None:
    """Frames as long as any that a norm gives, along a kernel's rows: finite, right products.

    Each product of each convolution of a network is driven to what `fold.fitted` says is the most.
    """
    tensors = synthetic_decoder_state_dict(TINY_CLIP)
    if gamma is not None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("gamma"):  # a few channels stand out
                tensor[torch.rand(tensor.shape, generator=generator) < 0.2] *= gamma
    products = torch.float16
    decoder = ClipDecoder.from_state_dict(tensors, TINY_CLIP, dtype, products=products)
    convs = half_products(decoder)
    assert len(convs) == sum(
        isinstance(m, CausalConv) and name != "conv_in" for name, m in decoder.named_modules()
    )
    for name, norm, conv in convs:
        assert conv.temporal is not None
        inputs = cook_toom(conv.temporal.block).inputs
        kernels = kernels_of(conv)
        longest = norm.weight.numel() ** 0.5 * norm.weight.double().abs().max().item()
        for j, row in enumerate(inputs):
            lengths = kernels[j].norm(dim=1).sum((1, 2))  # [Cout]
            output = int(lengths.argmax())
            rows = kernels[j][output]  # [Cin, 3, 3]
            unit = rows / rows.norm(dim=0).clamp_min(1e-300)
            window = torch.stack([longest * unit * torch.tensor(f).sign() for f in row])
            clip = window.unsqueeze(1).to(dtype)  # [m + 2, 1, Cin, 3, 3]
            memory = Memory(1)
            # A first frame, then the two that the block looks back on, then the block.
            for part in torch.cat([clip[:1], clip]).split([1, 2, len(row) - 2]):
                x = part.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                made = conv.after(None, Sum(x), memory)[1]
                memory.first = False
            assert isinstance(made, Products)
            assert all(part.dtype == torch.float16 for part in made.parts)
            assert all(bool(part.isfinite().all()) for part in made.parts), name
            # In the middle, all nine taps act: the most there is, which is half of what fits or
            # more, but where a last tap is held unscaled.
            most = made.parts[j][0, output, 1, 1].double().abs().item()
            exponent = conv.exponents[j].item()
            bound = lengths[output].item() * sum(map(abs, row)) * longest * 2.0**exponent
            assert bound <= FLOAT16_MOST
            assert most == pytest.approx(bound, rel=2e-2)
            if dtype != torch.float16 or j < len(row) - 1:
                assert most >= 0.49 * FLOAT16_MOST
            transformed = torch.einsum(
                "i,ichw->chw", torch.tensor(row, dtype=torch.float64), clip[:, 0].double()
            )
            product = F.conv2d(transformed[None], kernels[j], padding=1) * 2.0**exponent
            assert largest(made.parts[j].double() - product) <= 2e-3 * largest(product)
            # And their sums, scaled back.
            scales = 2.0 ** -conv.exponents.double()
            terms = torch.stack([part[0].double() for part in made.parts])
            inverse = torch.tensor(cook_toom(conv.temporal.block).inverse, dtype=torch.float64)
            sums = torch.einsum("ij,jchw->ichw", inverse * scales, terms)
            sums += conv.bias.double().view(-1, 1, 1)
            assert largest(made.total().double() - sums) <= torch.finfo(dtype).eps * largest(sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_latents_stay_finite(dtype: torch.dtype) -> None:
    """Whatever the latents, what a norm gives is bounded, and with it every product."""
    tensors = synthetic_decoder_state_dict(TINY_CLIP)
    for name, tensor in tensors.items():
        if name.endswith("gamma"):
            tensor.mul_(30)
    decoder = ClipDecoder.from_state_dict(tensors, TINY_CLIP, dtype)
    exact = ClipDecoder.from_state_dict(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        TINY_CLIP,
        torch.float64,
        direct=True,
    )
    one_hot = torch.zeros(1, TINY_CLIP["z_dim"], 5, 2, 3, dtype=dtype)
    one_hot[:, 1, ::2] = 100
    for latents in (
        one_hot,
        100 * latent_clip(TINY_CLIP, 0, 1, 5, 2, 3, dtype).sign(),
        torch.zeros_like(one_hot),
        1e-4 * one_hot,
    ):
        for _, norm, conv in half_products(decoder):
            assert bool(conv.earlier.isfinite().all())
            assert norm.weight.abs().max() > 20
        for clip in (latents, latents[:, :, :2]):  # whole blocks of four, and one frame
            got, wanted = decoder(clip), exact(clip)
            assert bool(got.isfinite().all())
            assert rms(got.double() - wanted) <= 0.1 * max(rms(wanted), 0.1)


def test_frames_of_blocks_of_two_are_within_the_bound_of_four() -> None:
    """With whose kernels they are multiplied: so their products fit float16 too."""
    for row, j in zip(matrices(2, SHARED_POINT).inputs, SHARED, strict=True):
        assert sum(map(abs, row)) < sum(map(abs, cook_toom(4).inputs[j]))


def test_a_channel_far_smaller_than_others_is_held() -> None:
    """What float16 loses of a kernel counts by the kernel's own size."""
    taps = seeded(8, 6, 3, 3, 3)
    taps[::2] *= 2.0**-24
    taps[:, ::3] *= 2.0**20
    gamma = torch.ones(6)
    temporal = Temporal(4, torch.float16)
    earlier, exponents = fitted(taps, temporal, gamma, torch.bfloat16)
    assert earlier.dtype == torch.float16
    assert exponents.max() < 0
    conv = causal_conv(taps.float(), torch.zeros(8), temporal, gamma, torch.float32)
    clip = seeded(6, 1, 6, 4, 3, seed=1, dtype=torch.float32)
    clip /= clip.norm(dim=2, keepdim=True)
    wanted = wanted_of(taps.float(), torch.zeros(8), None, clip)
    error = convolve(conv, None, clip, [5]).double() - wanted
    # Four times eps of float16: F(4, 3) adds to what the kernels and the frames lose.
    assert rms(error) <= 4 * 2.0**-10 * rms(wanted)


@pytest.mark.parametrize("network", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_that_float16_does_not_hold_stay_in_the_networks_dtype(
    network: torch.dtype,
) -> None:
    taps, temporal = seeded(8, 6, 3, 3, 3), Temporal(4, torch.float16)
    # A frame alone would overflow.
    frames = max(sum(map(abs, row)) for row in cook_toom(4).inputs) * 6**0.5
    for gamma, held in ((FLOAT16_MOST / frames * 0.99, torch.float16), (FLOAT16_MOST, network)):
        earlier, exponents = fitted(taps, temporal, torch.full((6,), gamma), network)
        assert earlier.dtype == held
        assert bool(exponents.any()) == (held == torch.float16)
    # Tiny ones are scaled up, and lose nothing.
    tiny = taps * 1e-20
    earlier, exponents = fitted(tiny, temporal, torch.ones(6), network)
    assert earlier.dtype == torch.float16
    assert exponents.min() > 60
    kernel = torch.tensor(cook_toom(4).kernel, dtype=torch.float64)
    exact = torch.einsum("jk,okchw->johwc", kernel, tiny.permute(0, 2, 1, 3, 4))
    exact = exact.permute(0, 1, 4, 2, 3)[:-1]
    got = earlier.double().unflatten(0, (5, 8)) * (2.0 ** -exponents[:-1].double()).view(
        -1, 1, 1, 1, 1
    )
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours - theirs).norm() <= FLOAT16_LOSS * theirs.norm()


def test_kernels_that_float16_does_not_hold_are_refused_in_its_network() -> None:
    taps, temporal = seeded(8, 6, 3, 3, 3), Temporal(2, torch.float16)
    message = "must fit float16 as kernels along time, got values that it loses or that overflow"
    # Frames overflow; or the last tap, which is held unscaled, is lost.
    for kernels, gamma in ((taps, FLOAT16_MOST), (taps * 1e-8, 1.0)):
        with pytest.raises(UnsupportedVAEError, match=message):
            fitted(kernels, temporal, torch.full((6,), gamma), torch.float16)


def test_a_network_with_a_convolution_in_its_own_dtype() -> None:
    """Made, copied, loaded and decoded; named where it is refused."""
    name = "decoder.up_blocks.1.resnets.0.conv1.weight"
    tensors = synthetic_decoder_state_dict(TINY_CLIP)
    gamma = "decoder.up_blocks.1.resnets.0.norm1.gamma"
    tensors[gamma] = tensors[gamma] * 2.0**14
    tensors[name] = tensors[name] * 2.0**-14
    decoder = ClipDecoder.from_state_dict(tensors, TINY_CLIP, torch.bfloat16)
    kept = decoder.stages[1].blocks[0].conv1
    assert kept.earlier.dtype == kept.temporal.dtype == torch.bfloat16
    assert decoder.stages[1].blocks[0].conv2.earlier.dtype == torch.float16
    latents = latent_clip(TINY_CLIP, 0, 1, 5, 2, 3, torch.bfloat16)
    wanted = decoder(latents)
    exact = ClipDecoder.from_state_dict(
        {n: t.bfloat16() for n, t in tensors.items()}, TINY_CLIP, torch.float64, direct=True
    )(latents)
    plain = ClipDecoder.from_state_dict(tensors, TINY_CLIP, torch.bfloat16, direct=True)
    # 1.01 was measured: one convolution of many rounds its products to 8 bits.
    assert rms(wanted.double() - exact) <= 1.1 * rms(plain(latents).double() - exact)
    fresh = ClipDecoder(decoder.topology)
    fresh.load_state_dict(decoder.state_dict())
    for other in (fresh, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(latents), wanted)
        assert other.stages[1].blocks[0].conv1.earlier.dtype == torch.bfloat16
    with pytest.raises(UnsupportedVAEError, match=rf"{name} must fit float16 as kernels along"):
        ClipDecoder.from_state_dict(tensors, TINY_CLIP, torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reads_the_stream_is_direct_and_in_its_dtype(family: str) -> None:
    tensors = synthetic_decoder_state_dict(FAMILIES[family])
    decoder = ClipDecoder.from_state_dict(tensors, FAMILIES[family], torch.bfloat16)
    assert decoder.conv_in.temporal == Temporal(1, torch.bfloat16)
    assert decoder.conv_in.earlier.dtype == torch.bfloat16
    others = [m for m in decoder.modules() if type(m) is nn.Conv2d]
    assert all(m.weight.dtype == torch.bfloat16 for m in others)
    rest: list[Any] = [m for m in decoder.modules() if isinstance(m, CausalConv)][1:]
    assert all(m.temporal[:2] == (4, torch.float16) for m in rest)
