"""The fold's arithmetic against its formulas, bit for bit, and what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from decoder_cases import WAN22
from torch import Tensor

from cosmos3_fast.ops.cook_toom import cook_toom_tensors
from cosmos3_fast.vae import ClipDecoder, ClipEncoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae import fold as fold_module
from cosmos3_fast.vae.config import UnsupportedVAEError
from cosmos3_fast.vae.fold import FLOAT16_LOSS, FLOAT16_MOST, Fold, Taps, fitted, fold, is_finite
from cosmos3_fast.vae.networks.causal import Temporal
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict, synthetic_state_dict

FORMS = [
    (Temporal(4, torch.float16), torch.bfloat16),
    (Temporal(4, torch.float16), torch.float32),
    (Temporal(4, torch.float32), torch.float32),
    (Temporal(4, torch.bfloat16), torch.bfloat16),
    (Temporal(4, torch.float64), torch.float64),
    (Temporal(2, torch.float16), torch.float16),
    (Temporal(1, torch.bfloat16), torch.bfloat16),
    (Temporal(1, torch.float64), torch.float64),
]


def formula(
    taps: Tensor, temporal: Temporal, gamma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """`fitted` on whole tensors, in the order of its description; None: float16 loses them."""
    kernels = taps.double().movedim(2, 0)
    count, held = temporal.kernels, temporal.dtype
    exponents = [0] * count
    if temporal.block > 1:
        _, kernel, inputs = cook_toom_tensors(temporal.block, kernels)
        kernels = torch.einsum("jk,k...->j...", kernel, kernels)
        if held == torch.float16:
            longest = gamma.numel() ** 0.5 * gamma.double().abs().max().item()
            frames = [row.abs().sum().item() * longest for row in inputs]
            lengths = kernels.norm(dim=2).sum((2, 3)).amax(1).tolist()
            exponents = [
                math.floor(math.log2(FLOAT16_MOST / (a * b))) if a * b else 0
                for a, b in zip(frames, lengths, strict=True)
            ]
            if dtype == torch.float16:
                exponents[-1] = min(exponents[-1], 0)
            scaled = [k * 2.0**e for k, e in zip(kernels, exponents, strict=True)]
            lost = [(k - k.half().double()).norm() > FLOAT16_LOSS * k.norm() for k in scaled]
            if max(frames) > FLOAT16_MOST or any(lost):
                if dtype == torch.float16:
                    return None
                held, exponents = dtype, [0] * count
            else:
                kernels = torch.stack(scaled)
    return kernels[: count - 1].flatten(0, 1).to(held), torch.tensor(exponents)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def taps_of(out_channels: int, in_channels: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(out_channels)
    taps = torch.randn(out_channels, in_channels, 3, 3, 3, generator=generator)
    if kind == "one large":  # the others are subnormal in float16 beside it
        taps *= 1e-7
        taps[0, 0, 0, 0, 0] = 1.0
    if kind == "without the last":
        taps[:, :, 2] = 0.0
    return taps * (1e-5 if kind == "small" else 1.0)


@pytest.mark.parametrize(("temporal", "dtype"), FORMS)
@pytest.mark.parametrize("kind", ["plain", "small", "one large", "without the last"])
def test_kernels_have_the_bits_of_the_formula(
    temporal: Temporal, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taps, gamma = taps_of(37, 16, kind), torch.linspace(0.5, 1.5, 16)
    for taken in (taps, taps.bfloat16(), taps.transpose(0, 1).contiguous().transpose(0, 1)):
        wanted = formula(taken, temporal, gamma, dtype)
        for at_once in (1, 1 << 13, 1 << 17):  # one channel at a time, a few, all
            monkeypatch.setattr(fold_module, "_TAPS_AT_ONCE", at_once)
            if wanted is None:
                with pytest.raises(UnsupportedVAEError, match="must fit float16"):
                    fitted(taken, temporal, gamma, dtype)
                continue
            earlier, exponents = fitted(taken, temporal, gamma, dtype)
            assert earlier.is_contiguous(memory_format=torch.channels_last)
            assert (earlier.dtype, exponents.dtype) == (wanted[0].dtype, torch.int64)
            assert torch.equal(exponents, wanted[1])
            assert torch.equal(bits(earlier), bits(wanted[0]))


def test_float16_is_taken_and_refused() -> None:
    """So that each way of `fitted` is known to be gone above."""
    gamma = torch.ones(16)

    def held(kind: str, gamma: Tensor) -> torch.dtype:
        taps = taps_of(37, 16, kind)
        return fitted(taps, Temporal(4, torch.float16), gamma, torch.bfloat16)[0].dtype

    for kind in ("plain", "small", "one large", "without the last"):
        assert held(kind, gamma) == torch.float16
    assert held("plain", gamma * 1e6) == torch.bfloat16  # frames
    with pytest.raises(UnsupportedVAEError, match="must fit float16"):  # its last tap, unscaled
        fitted(taps_of(37, 16, "small"), Temporal(2, torch.float16), gamma, torch.float16)


def test_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(3, 5, 2, 3, 3).to(dtype)
        views = (x, x[:, :, -1], x.movedim(1, -1), x[1:1], x[:, 2, 1], x[:1].expand(4, 5, 2, 3, 3))
        assert all(map(is_finite, views))
        for bad in (math.nan, math.inf, -math.inf):
            y = x.clone()
            y[1, 2, 1, 0, 2] = bad
            assert not any(map(is_finite, (y, y[:, :, -1], y.movedim(1, -1), y[:, 2, 1])))
            assert is_finite(y[:, :, 0])


class Slices(Mapping[str, Any]):
    """Tensors as an open safetensors file gives them; counts the values read, by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.read = dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Any:
        return _Slice(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _Slice:
    def __init__(self, file: Slices, name: str) -> None:
        self.file, self.name = file, name

    def get_shape(self) -> list[int]:
        return list(self.file.tensors[self.name].shape)

    def __getitem__(self, index: Any) -> Tensor:
        part = self.file.tensors[self.name][index]
        self.file.read[self.name] += part.numel()
        return part.clone()


@pytest.mark.parametrize("network", [FrameEncoder, ClipEncoder, FrameDecoder, ClipDecoder])
def test_reads_what_it_folds(network: Any) -> None:
    """Of a network for frames the last taps alone; of one for clips all taps, once."""
    encodes = network.topology_type.part == "encoder"
    tensors = (synthetic_state_dict if encodes else synthetic_decoder_state_dict)(WAN22)
    topology = network.topology_type.from_config(WAN22)
    file = Slices(tensors)
    made = network(topology, torch.bfloat16, device="meta")
    fold(made, file)
    for name, tensor in tensors.items():
        read, values = file.read[name], tensor.numel()
        if name.startswith("quant_conv"):
            values //= 2  # of the mean
        if tensor.dim() == 5 and tensor.shape[2] == 3 and not made.takes_clips:
            values //= 3
        if "time_conv" in name and not made.takes_clips:
            values = 0
        assert read <= values * (2 if name.startswith("post_quant") else 1), name
        assert read > 0 or values == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", [ClipEncoder, ClipDecoder])
def test_kernels_along_time_are_made_on_one_device(
    network: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "meta" as the GPU: no operation takes a tensor from there and one from the CPU."""
    topology = network.topology_type.from_config(WAN22)
    encodes = topology.part == "encoder"
    tensors = (synthetic_state_dict if encodes else synthetic_decoder_state_dict)(WAN22)
    monkeypatch.setattr(fold_module, "is_finite", lambda tensor: True)
    monkeypatch.setattr(fold_module, "_float16_exponents", lambda *given: ([1] * 6, True))
    here = Tensor.cpu
    monkeypatch.setattr(
        Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else here(x)
    )
    made = Fold(network(topology, dtype, device="meta"), Taps(tensors, topology, "meta"), dtype)
    (fold_module._fold_encoder if encodes else fold_module._fold_decoder)(made, topology)
    along_time = {n for n in made.tensors if n.endswith(("earlier", "time_conv.weight"))}
    assert {name for name, x in made.tensors.items() if x.is_meta} == along_time
    assert any(name.startswith("conv_out") for name in along_time)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", [ClipEncoder, ClipDecoder])
def test_a_gpu_folds_as_the_cpu(network: Any, dtype: torch.dtype) -> None:
    encodes = network.topology_type.part == "encoder"
    tensors = (synthetic_state_dict if encodes else synthetic_decoder_state_dict)(WAN22)
    here = network.from_state_dict(tensors, WAN22, dtype).state_dict()
    on_gpu = {name: x.cuda() for name, x in tensors.items()}
    there = network.from_state_dict(on_gpu, WAN22, dtype).state_dict()
    for name, x in here.items():
        assert there[name].device.type == "cuda"
        if name.endswith("earlier"):  # sums of three in another order, rounded once
            error = (there[name].cpu().double() - x.double()).abs()
            assert (error <= torch.finfo(x.dtype).eps * x.double().abs()).all(), name
        else:
            assert torch.equal(there[name].cpu(), x), name
