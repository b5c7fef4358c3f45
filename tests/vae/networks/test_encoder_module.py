"""FrameEncoder as a module: inputs, errors, compile, export, copies."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoder_cases import RESIDUAL, TINY, WAN21, WAN21_ATTENTION, image

from cosmos3_fast.ops import rms_norm_silu
from cosmos3_fast.vae import FrameEncoder
from cosmos3_fast.vae.fold import fold
from cosmos3_fast.vae.networks.causal import Sum
from cosmos3_fast.vae.networks.layers import add_average_shortcut, average_shortcut
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config, synthetic_state_dict
from cosmos3_fast.vae.topology import EncoderTopology
from cosmos3_fast.vae.verify import FLOAT32_BOUND, largest, relative_error


def build(config: dict = RESIDUAL, dtype: torch.dtype = torch.float32) -> FrameEncoder:
    return FrameEncoder.from_state_dict(synthetic_state_dict(config), config, dtype)


@pytest.fixture(scope="module")
def encoder() -> FrameEncoder:
    return build()


def test_attributes_at_cosmos3_topology() -> None:
    topology = EncoderTopology.from_config(synthetic_config(COSMOS3_VAE_CONFIG))
    encoder = FrameEncoder(topology, torch.bfloat16, device="meta")
    assert (encoder.z_dim, encoder.spatial_factor) == (48, 16)
    assert (encoder.dtype, encoder.device.type) == (torch.bfloat16, "meta")
    shapes = topology.tensor_shapes().values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 149_637_088
    # And zeros for the four channels that packing adds.
    assert sum(p.numel() for p in encoder.parameters()) == 53_180_368 + 160 * 4 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_layout_and_dtype(dtype: torch.dtype) -> None:
    out = build(dtype=dtype)(image(0, 2, 48, 32, torch.float32))
    assert out.shape == (2, 48, 1, 3, 2)
    assert out.dtype == dtype
    assert out.is_contiguous()


def test_input_layouts_agree(encoder: FrameEncoder) -> None:
    pixels = image(0, 2, 48, 32, torch.float32)
    wanted = encoder(pixels)
    sliced = torch.full((3, 5, 50, 70), torch.nan)
    sliced[1:, 1:4, 1:49, 3:67:2] = pixels
    hwc = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    clip = torch.full((2, 3, 4, 48, 32), torch.nan)
    clip[:, :, 2] = pixels
    for other in (
        pixels.contiguous(memory_format=torch.channels_last),
        sliced[1:, 1:4, 1:49, 3:67:2],
        hwc,
        pixels[:, :, None],
        clip[:, :, 2:3],
        pixels.flip(-1).flip(-1),
    ):
        assert torch.equal(encoder(other), wanted)
    expanded = pixels[:1].expand(2, -1, -1, -1)
    assert torch.equal(encoder(expanded), encoder(expanded.contiguous()))


def test_batch_entries_are_independent(encoder: FrameEncoder) -> None:
    pixels = image(1, 3, 32, 48, torch.float32)
    together = encoder(pixels)
    alone = torch.cat([encoder(entry[None]) for entry in pixels])
    assert relative_error(together, alone) <= FLOAT32_BOUND


def test_fold_takes_the_last_of_all_temporal_taps(encoder: FrameEncoder) -> None:
    """The loaders hand over single taps; the fold itself takes whole 3-D tensors too."""
    whole = synthetic_state_dict(RESIDUAL)
    folded = fold(encoder, whole)
    wanted = encoder.state_dict()
    assert folded.keys() == wanted.keys()
    assert all(torch.equal(folded[name], wanted[name]) for name in wanted)


def test_empty_batch(encoder: FrameEncoder) -> None:
    assert encoder(torch.empty(0, 3, 32, 64)).shape == (0, 48, 1, 2, 4)
    assert encoder(torch.empty(0, 3, 1, 32, 64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 32, 32),
            r"pixels must have shape \[B, 3, H, W\] or \[B, 3, 1, H, W\], got \[3, 32, 32\]",
        ),
        ((1, 4, 32, 32), r"pixels must have 3 channels, got 4 in shape \[1, 4, 32, 32\]"),
        ((1, 3, 5, 32, 32), r"pixels must have 1 frame, got 5: clips .* exact mode, through a VAE"),
        ((1, 3, 0, 32, 32), r"pixels must have 1 frame, got 0"),
        ((1, 3, 40, 32), r"pixels must have a height that is a positive multiple of 16, got 40"),
        ((1, 3, 32, 8), r"pixels must have a width that is a positive multiple of 16, got 8"),
        ((1, 3, 0, 32), r"pixels must have a height that is a positive multiple of 16, got 0"),
    ],
)
def test_bad_shapes(encoder: FrameEncoder, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(shape))


def test_bad_dtype_and_device(encoder: FrameEncoder) -> None:
    with pytest.raises(ValueError, match=r"pixels must be floating point .* got torch\.int64"):
        encoder(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pixels must be on the encoder's device, cpu, got meta"):
        encoder(torch.zeros(1, 3, 32, 32, device="meta"))
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        FrameEncoder(encoder.topology, torch.int8)


def test_gradient_reaches_the_pixels_only() -> None:
    encoder = build(TINY, torch.float64)
    assert not any(p.requires_grad for p in encoder.parameters())
    pixels = image(0, 1, 8, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(encoder, (pixels,), fast_mode=True)


@pytest.mark.parametrize(
    ("config", "dynamic"), [(RESIDUAL, False), (WAN21_ATTENTION, False), (TINY, True)]
)
def test_captures_one_graph(config: dict, dynamic: bool) -> None:
    torch.compiler.reset()
    encoder = build(config)
    factor = encoder.spatial_factor
    compiled = torch.compile(encoder, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    pixels = image(0, 2, 2 * factor, 3 * factor, torch.float32)
    wanted = encoder(pixels)
    assert relative_error(compiled(pixels), wanted) <= FLOAT32_BOUND
    if dynamic:
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, height, width in ((3, 4, 5), (2, 6, 3)):
                other = image(1, batch, height * factor, width * factor, torch.float32)
                assert relative_error(compiled(other), encoder(other)) <= FLOAT32_BOUND


def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    encoder = build(TINY)
    pixels = image(0, 2, 16, 24, torch.float32)
    wanted = encoder(pixels)
    got = torch.compile(encoder, fullgraph=True)(pixels)
    assert relative_error(got, wanted) <= FLOAT32_BOUND


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture
def frames_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Three images of one shape; convolutions are then of float32 and not of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return [image(seed, 2, 48, 32, torch.float32).cuda() for seed in range(3)]


@pytest.mark.gpu
@needs_gpu
def test_compiles_into_cuda_graphs(frames_on_gpu: list[torch.Tensor]) -> None:
    torch.compiler.reset()
    encoder = build(TINY).cuda()
    compiled = torch.compile(encoder, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        # The first calls warm up and record, the later ones replay what was recorded.
        for pixels in frames_on_gpu * 2:
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(pixels).clone()
            assert relative_error(got, encoder(pixels)) <= FLOAT32_BOUND


@pytest.mark.gpu
@needs_gpu
def test_replays_in_a_cuda_graph(frames_on_gpu: list[torch.Tensor]) -> None:
    encoder = build(TINY).cuda()
    pixels = frames_on_gpu[0].clone()
    with torch.no_grad():
        # Libraries and kernels are set up outside the capture, on a stream beside the current one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            encoder(pixels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            latents = encoder(pixels)
        for each in frames_on_gpu:
            pixels.copy_(each)
            graph.replay()
            # The capture may have been given another convolution than the eager call is.
            assert relative_error(latents, encoder(each)) <= FLOAT32_BOUND


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_exports_saves_and_runs() -> None:
    encoder = build(WAN21)
    # One row of cells has ambiguous strides, which the exporter's guards exclude.
    rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        encoder,
        (image(0, 2, 16, 24, torch.float32),),
        dynamic_shapes={"pixels": {0: batch, 2: 8 * rows, 3: 8 * columns}},
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in ((1, 16, 40), (3, 32, 16)):
        pixels = image(2, *size, torch.float32)
        wanted = encoder(pixels)
        assert relative_error(loaded(pixels), wanted) <= FLOAT32_BOUND


def test_state_dict_round_trip(tmp_path: Path) -> None:
    encoder = build(WAN21_ATTENTION, torch.bfloat16)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    fresh = FrameEncoder(encoder.topology, torch.bfloat16)
    fresh.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    pixels = image(0, 1, 16, 24, torch.bfloat16)
    assert torch.equal(fresh(pixels), encoder(pixels))
    assert not any(p.requires_grad for p in fresh.parameters())


def test_copies_behave_alike(encoder: FrameEncoder) -> None:
    pixels = image(0, 1, 32, 48, torch.float32)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(pixels), encoder(pixels))
        assert other.topology == encoder.topology


def test_to_changes_dtype_and_keeps_the_layout() -> None:
    moved = build().to(torch.bfloat16)
    direct = build(dtype=torch.bfloat16)
    pixels = image(0, 1, 32, 48, torch.float32)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved(pixels), direct(pixels))
    for weight in (moved.stages[0].blocks[0].conv1.weight, direct.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_norm_matches_its_formula_and_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 5, 3, generator=generator).bfloat16()
    x[0, :, 0, 0] = 0
    weight = torch.randn(24, generator=generator).bfloat16()
    for silu in (False, True):
        wanted = F.normalize(x.double()) * 24**0.5 * weight.double().view(-1, 1, 1)
        wanted = F.silu(wanted) if silu else wanted
        got = rms_norm_silu(x, weight, silu)
        # Half the spacing of bfloat16's 8 significant bits, and float32's own rounding.
        assert ((got.double() - wanted).abs() <= wanted.abs() * (2**-8 + 1e-5) + 1e-30).all()
        assert got.dtype == x.dtype


SHORTCUTS = [
    (width, out, factor_s, factor_t)
    for width, out in ((8, 8), (8, 16), (16, 8), (8, 4), (6, 12))
    for factor_s in (1, 2)
    for factor_t in (1, 2)
    if width * factor_t * factor_s**2 % out == 0
]


@pytest.mark.parametrize(("width", "out", "factor_s", "factor_t"), SHORTCUTS)
def test_average_shortcut_matches_the_3d_layer(
    width: int, out: int, factor_s: int, factor_t: int
) -> None:
    """Against the layer's definition, written out value by value."""
    factor = factor_t * factor_s**2
    x = torch.randn(2, width, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    group = width * factor // out
    wanted = torch.zeros(2, out, 4 // factor_s, 6 // factor_s).double()
    for i in range(width):
        for row in range(factor_s):
            for column in range(factor_s):
                time = factor_t - 1
                position = ((i * factor_t + time) * factor_s + row) * factor_s + column
                wanted[:, position // group] += x[:, i, row::factor_s, column::factor_s] / group
    assert largest(average_shortcut(x, out, factor_t, factor_s) - wanted) <= 1e-14
    y = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    for residual in (None, torch.full_like(y, 0.5)):
        got = add_average_shortcut(Sum(y, None, residual), x, factor_t, factor_s).total()
        assert largest(got - (y + wanted + (0 if residual is None else 0.5))) <= 1e-14


def test_bytes_equal_their_normalised_floats() -> None:
    """uint8 [B, H, W, 3] against SGLang's `2 (x / 255) - 1` in float32, bit for bit."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=generator)
    floats = 2.0 * (pixels.permute(0, 3, 1, 2).float() / 255.0) - 1.0
    for dtype in (torch.float32, torch.bfloat16):
        encoder = build(dtype=dtype)
        assert torch.equal(encoder(pixels), encoder(floats))
        assert encoder(pixels[:0]).shape == encoder(floats[:0]).shape


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 32, 48), r"must as bytes have shape \[B, H, W, 3\], got \[1, 3, 32, 48\]"),
        ((32, 48, 3), r"must as bytes have shape \[B, H, W, 3\], got \[32, 48, 3\]"),
        ((1, 40, 48, 3), "height that is a positive multiple of 16, got 40"),
    ],
)
def test_bytes_of_another_shape_are_refused(
    encoder: FrameEncoder, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(shape, dtype=torch.uint8))
