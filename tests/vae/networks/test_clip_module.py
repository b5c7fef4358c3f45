"""ClipEncoder as a module: inputs, errors, checkpoints, compile, export, copies."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoint_files import write_checkpoint
from encoder_cases import RESIDUAL, TINY_CLIP, WAN21, WAN21_ATTENTION, clip

from cosmos3_fast.vae import ClipEncoder, FrameEncoder
from cosmos3_fast.vae.checkpoint.reading import CheckpointError
from cosmos3_fast.vae.fold import side_by_side
from cosmos3_fast.vae.networks import layers
from cosmos3_fast.vae.networks.causal import Sum
from cosmos3_fast.vae.networks.layers import add_pair_average
from cosmos3_fast.vae.synthetic import (
    synthetic_state_dict,
)
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error


def build(config: dict = TINY_CLIP, dtype: torch.dtype = torch.float32) -> ClipEncoder:
    return ClipEncoder.from_state_dict(synthetic_state_dict(config), config, dtype)


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return build(RESIDUAL)


def test_input_layouts_agree() -> None:
    encoder = build()
    pixels = clip(0, 2, 5, 48, 32, torch.float32)
    wanted = encoder(pixels)
    sliced = torch.full((3, 5, 11, 50, 70), torch.nan)
    sliced[1:, 1:4, 1:11:2, 1:49, 3:67:2] = pixels
    frames_first = pixels.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (
        pixels.contiguous(memory_format=torch.channels_last_3d),
        sliced[1:, 1:4, 1:11:2, 1:49, 3:67:2],
        frames_first,
    ):
        assert torch.equal(encoder(other), wanted)
    still = pixels[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert torch.equal(encoder(still), encoder(still.contiguous()))


def test_batch_entries_are_independent() -> None:
    encoder = build()
    pixels = clip(1, 3, 5, 16, 24, torch.float32)
    alone = torch.cat([encoder(entry[None]) for entry in pixels])
    assert relative_error(encoder(pixels), alone) <= FLOAT32_BOUND


def test_bytes_equal_their_normalised_floats(encoder: ClipEncoder) -> None:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (2, 5, 32, 48, 3), dtype=torch.uint8, generator=generator)
    floats = 2.0 * (frames.permute(0, 4, 1, 2, 3).float() / 255.0) - 1.0
    assert torch.equal(encoder(frames), encoder(floats))
    assert torch.equal(encoder(frames, 1), encoder(frames[:, 0]))


def test_empty_batch(encoder: ClipEncoder) -> None:
    for frames, latents in ((1, 1), (5, 2), (9, 3)):
        out = encoder(torch.empty(0, 3, frames, 32, 64))
        assert out.shape == (0, 48, latents, 2, 4)
        assert out.dtype == torch.float32
    assert encoder(torch.empty(0, 5, 32, 64, 3, dtype=torch.uint8)).shape == (0, 48, 2, 2, 4)


def test_casts_pixels_to_its_dtype() -> None:
    encoder = build(dtype=torch.bfloat16)
    pixels = clip(2, 1, 5, 16, 16, torch.float32)
    assert encoder(pixels).dtype == torch.bfloat16
    assert torch.equal(encoder(pixels), encoder(pixels.bfloat16()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"pixels must have shape \[B, 3, T, H, W\], got \[3, 32, 32\]"),
        ((1, 1, 3, 5, 32, 32), r"pixels must have shape \[B, 3, T, H, W\], got"),
        ((1, 3, 4, 32, 32), r"pixels must have 1 \+ 4k frames, got 4"),
        ((1, 3, 6, 32, 32), r"pixels must have 1 \+ 4k frames, got 6"),
        ((1, 3, 0, 32, 32), r"pixels must have 1 \+ 4k frames, got 0"),
        ((1, 4, 5, 32, 32), r"pixels must have 3 channels, got 4 in shape \[1, 4, 32, 32\]"),
        ((1, 3, 5, 40, 32), r"pixels must have a height that is a positive multiple of 16, got 40"),
        ((1, 3, 5, 32, 8), r"pixels must have a width that is a positive multiple of 16, got 8"),
    ],
)
def test_bad_shapes(encoder: ClipEncoder, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize("count", [0, -1, 3, 1.0, True, "2"])
def test_bad_number_of_latent_frames(encoder: ClipEncoder, count: object) -> None:
    message = rf"num_latent_frames must be in 1 to 2 for 5 pixel frames, got {count!r}"
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(1, 3, 5, 32, 32), count)


def test_bad_dtype_and_device(encoder: ClipEncoder) -> None:
    with pytest.raises(ValueError, match=r"pixels must be floating point .* got torch\.int64"):
        encoder(torch.zeros(1, 3, 5, 32, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pixels must be on the encoder's device, cpu, got meta"):
        encoder(torch.zeros(1, 3, 5, 32, 32, device="meta"))
    with pytest.raises(ValueError, match=r"must as bytes have shape .* got \[1, 32, 32, 4\]"):
        encoder(torch.zeros(1, 5, 32, 32, 4, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"pixels must have shape \[B, T, H, W, 3\], got \[32, 32, 3\]"
    ):
        encoder(torch.zeros(32, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        ClipEncoder(encoder.topology, torch.int8)


def test_calls_share_no_state() -> None:
    encoder = build()
    clips = [clip(seed, 1, frames, 16, 16, torch.float32) for seed, frames in ((3, 9), (4, 5))]
    wanted = [encoder(pixels) for pixels in clips]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, latents in zip(pool.map(encoder, clips * 2), wanted * 2, strict=True):
                assert torch.equal(got, latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_and_weights_stay_as_they_are(dtype: torch.dtype) -> None:
    encoder = build(dtype=dtype)
    pixels = clip(5, 1, 9, 16, 16, dtype)
    before = copy.deepcopy((pixels, encoder.state_dict()))
    encoder(pixels)
    assert torch.equal(pixels, before[0])
    after = encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before[1].items())


def test_gradient_reaches_the_pixels_and_only_those_that_matter() -> None:
    encoder = build(dtype=torch.float64)
    pixels = clip(6, 1, 5, 8, 16, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(encoder, (pixels,), fast_mode=True)
    (gradient,) = torch.autograd.grad(encoder(pixels)[:, :, 0].sum(), pixels)
    assert gradient[:, :, 0].abs().min() > 0
    assert gradient[:, :, 1:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captures_one_graph(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    # Compiled calls never take Winograd's convolution.
    state = synthetic_state_dict(TINY_CLIP)
    encoder = ClipEncoder.from_state_dict(state, TINY_CLIP, dtype, winograd=False)
    # Lowering takes most of the time, and is asked for once.
    backend = "aot_eager" if dtype == torch.float32 else "eager"
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=backend)
    pixels = clip(7, 2, 5, 16, 24, dtype)
    assert torch.equal(compiled(pixels), encoder(pixels))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = clip(8, 3, 5, 24, 40, dtype)
        assert torch.equal(compiled(other), encoder(other))


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_exports_saves_and_runs() -> None:
    encoder = build()
    pixels = clip(9, 1, 9, 16, 24, torch.float32)
    file = io.BytesIO()
    torch.export.save(torch.export.export(encoder, (pixels, 2)), file)
    file.seek(0)
    got = torch.export.load(file).module()(pixels, 2)
    assert largest(got - encoder(pixels, 2)) <= FLOAT32_BOUND * largest(got)


def test_state_dict_round_trip(tmp_path: Path) -> None:
    encoder = build(WAN21_ATTENTION, torch.bfloat16)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    fresh = ClipEncoder(encoder.topology, torch.bfloat16)
    fresh.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    pixels = clip(10, 1, 5, 16, 24, torch.bfloat16)
    assert torch.equal(fresh(pixels), encoder(pixels))
    assert not any(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copies_and_moves_behave_alike(dtype: torch.dtype) -> None:
    encoder = build(dtype=dtype)
    pixels = clip(11, 1, 5, 16, 24, dtype)
    wanted = encoder(pixels)
    for other in (
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        copy.deepcopy(encoder).to(device="cpu", dtype=dtype),
        copy.deepcopy(encoder).to(memory_format=torch.channels_last),
    ):
        assert torch.equal(other(pixels), wanted)
        dtypes = {name: tensor.dtype for name, tensor in encoder.state_dict().items()}
        assert {name: tensor.dtype for name, tensor in other.state_dict().items()} == dtypes
    assert copy.deepcopy(encoder).to("meta").device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_is_folded_anew(dtype: torch.dtype) -> None:
    """Kernels along time are rounded once, from float64."""
    encoder = build(dtype=dtype)
    pixels = clip(12, 1, 5, 16, 24, dtype)
    wanted = encoder(pixels)
    other = torch.float16
    message = rf"a ClipEncoder must be folded in its dtype, got a conversion of {dtype} to {other}"
    for convert in (encoder.half, lambda: encoder.to(other), lambda: encoder.to("cpu", other)):
        with pytest.raises(TypeError, match=message):
            convert()
    assert torch.equal(encoder(pixels), wanted)


def test_parts_of_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four frames at a time where they are large: the same but for the order of sums."""
    encoder = build()
    pixels = clip(13, 2, 21, 16, 24, torch.float32)
    whole = encoder(pixels)
    seen: list[int] = []
    encoder.stages[0].register_forward_pre_hook(
        lambda stage, args: (
            seen.append(args[0].products(args[1]).frames)
            if isinstance(args[0], Sum)
            else seen.append(args[0].frames)
        )
    )
    monkeypatch.setattr(layers, "_PIXELS_AT_ONCE", 1)
    assert relative_error(encoder(pixels), whole) <= FLOAT32_BOUND
    assert seen == [1, *[4] * 5]


def test_autocast_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        encoder = build(dtype=dtype)
        pixels = clip(14, 1, 5, 16, 24, dtype)
        wanted = encoder(pixels)
        for half in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", half):
                assert torch.equal(encoder(pixels), wanted)


def test_first_shares_its_parameters() -> None:
    encoder = build()
    first = encoder.first
    assert type(first) is FrameEncoder
    own = dict(encoder.named_parameters())
    for name, parameter in first.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr()
        assert not parameter.requires_grad


@pytest.mark.parametrize("config", [RESIDUAL, WAN21], ids=["wan2.2", "wan2.1"])
@pytest.mark.parametrize("shard", [None, 2**20], ids=["single", "sharded"])
def test_checkpoint_equals_from_state_dict(tmp_path: Path, config: dict, shard: int | None) -> None:
    state = {**synthetic_state_dict(config), "decoder.conv_in.weight": torch.zeros(4)}
    write_checkpoint(tmp_path / "vae", config, state, max_shard_bytes=shard)
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) == 1 or shard
    wanted = ClipEncoder.from_state_dict(state, config, torch.bfloat16)
    loaded = ClipEncoder.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    got = loaded.state_dict()
    assert got.keys() == wanted.state_dict().keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.state_dict().items())
    alone = FrameEncoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in alone.items())
    along_time = {name for name in got if name.endswith((".earlier", ".exponents", ".weight"))}
    assert got.keys() - alone.keys() <= along_time | {n for n in got if ".time_conv." in n}


def test_broken_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_CLIP, synthetic_state_dict(TINY_CLIP))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        ClipEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("width", "out", "factor_s"),
    [
        (width, out, factor_s)
        for width, out in ((8, 16), (8, 8), (16, 8), (8, 4), (6, 12), (4, 16))
        for factor_s in (1, 2)
        if width * 2 * factor_s**2 % out == 0
    ],
)
def test_pair_average_matches_the_3d_layer(width: int, out: int, factor_s: int) -> None:
    """Against the layer's definition, written out value by value."""
    generator = torch.Generator().manual_seed(0)
    pair = list(torch.randn(2, 2, width, 4, 6, generator=generator).double())
    factor = 2 * factor_s**2
    group = width * factor // out
    wanted = torch.zeros(2, out, 4 // factor_s, 6 // factor_s).double()
    for i in range(width):
        for time in range(2):
            for row in range(factor_s):
                for column in range(factor_s):
                    position = ((i * 2 + time) * factor_s + row) * factor_s + column
                    cell = pair[time][:, i, row::factor_s, column::factor_s]
                    wanted[:, position // group] += cell / group
    y = torch.randn(wanted.shape, generator=generator).double()
    assert largest(add_pair_average(y.clone(), *pair, factor_s) - (y + wanted)) <= 1e-14


def test_side_by_side_is_the_3d_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, 3, generator=generator).double()
    window = torch.randn(2, 4, 3, 6, 7, generator=generator).double()
    wanted = F.conv3d(window, weight, padding=(0, 1, 1))[:, :, 0]
    frames = torch.cat(window.unbind(2), 1)
    assert largest(F.conv2d(frames, side_by_side(weight), padding=1) - wanted) <= 1e-12
