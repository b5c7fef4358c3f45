"""FrameDecoder as a module: sources, inputs, copies, compile, export, gradients."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from decoder_cases import FAMILIES, QWEN, TINY, WAN22, latent_frame

from cosmos3_fast import FrameDecoder
from cosmos3_fast.vae.checkpoint import reading as checkpoint_module
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_decoder_state_dict,
    synthetic_state_dict,
)
from cosmos3_fast.vae.topology import DecoderTopology
from cosmos3_fast.vae.verify import relative_error


def build(config: dict[str, Any] = WAN22, dtype: torch.dtype = torch.float32) -> FrameDecoder:
    return FrameDecoder.from_state_dict(synthetic_decoder_state_dict(config), config, dtype)


@pytest.fixture(scope="module")
def decoder() -> FrameDecoder:
    return build()


def test_attributes_at_cosmos3_topology() -> None:
    topology = DecoderTopology.from_config(synthetic_config(COSMOS3_VAE_CONFIG))
    decoder = FrameDecoder(topology, torch.bfloat16, device="meta")
    assert (decoder.z_dim, decoder.spatial_factor) == (48, 16)
    assert (decoder.dtype, decoder.device.type) == (torch.bfloat16, "meta")
    resident = sum(p.numel() * p.element_size() for p in decoder.parameters())
    assert resident < 430e6


@pytest.mark.parametrize("config", [synthetic_config(COSMOS3_VAE_CONFIG), *FAMILIES.values()])
def test_topology_has_the_vaes_tensors(config: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = getattr(diffusers, config["_class_name"]).from_config(config)
    wanted = {n: tuple(t.shape) for n, t in vae.state_dict().items() if DecoderTopology.holds(n)}
    assert DecoderTopology.from_config(config).tensor_shapes() == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_layout_and_dtype(dtype: torch.dtype) -> None:
    decoder = build(dtype=dtype)
    latents = latent_frame(WAN22, 0, 2, 3, 2, torch.float32)
    out = decoder(latents)
    assert (out.shape, out.dtype) == ((2, 3, 1, 48, 32), dtype)
    assert out.is_contiguous()
    assert out.abs().max() <= 1
    out = decoder(latents, "uint8")
    assert (out.shape, out.dtype) == ((2, 48, 32, 3), torch.uint8)
    assert out.is_contiguous()


def test_input_layouts_agree(decoder: FrameDecoder) -> None:
    latents = latent_frame(WAN22, 0, 2, 3, 4, torch.float32)
    wanted = decoder(latents)
    sliced = torch.full((3, 50, 5, 9), torch.nan)
    sliced[1:, 1:49, 1:4, ::2][..., :4] = latents
    clip = torch.full((2, 48, 4, 3, 4), torch.nan)
    clip[:, :, 2] = latents
    for other in (
        latents.contiguous(memory_format=torch.channels_last),
        sliced[1:, 1:49, 1:4, ::2][..., :4],
        latents[:, :, None],
        clip[:, :, 2:3],
        latents.double(),
    ):
        assert torch.equal(decoder(other), wanted)


def test_batch_entries_are_independent(decoder: FrameDecoder) -> None:
    latents = latent_frame(WAN22, 1, 3, 2, 3, torch.float32)
    alone = torch.cat([decoder(entry[None]) for entry in latents])
    assert relative_error(decoder(latents), alone) <= 1e-5


def test_empty_batch(decoder: FrameDecoder) -> None:
    for decode in (decoder, decoder.decode_unnormalized):
        out = decode(torch.empty(0, 48, 2, 3))
        assert (out.shape, out.dtype) == ((0, 3, 1, 32, 48), torch.float32)
        out = decode(torch.empty(0, 48, 1, 2, 3), "uint8")
        assert (out.shape, out.dtype) == ((0, 32, 48, 3), torch.uint8)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (
            torch.zeros(48, 2, 2),
            r"latents must have shape \[B, 48, h, w\] or \[B, 48, 1, h, w\], got \[48, 2, 2\]",
        ),
        (torch.zeros(1, 16, 2, 2), r"latents must have 48 channels, got shape \[1, 16, 2, 2\]"),
        (torch.zeros(1, 48, 2, 2, 2), r"latents must have 1 frame, got 2 in shape"),
        (torch.zeros(1, 48, 0, 2), r"latents must have height and width of at least 1, got"),
        (torch.zeros(1, 48, 2, 2, dtype=torch.int64), r"latents must be floating point, got torch"),
        (
            torch.zeros(1, 48, 2, 2, device="meta"),
            r"latents must be on the decoder's device, cpu, got meta",
        ),
    ],
)
def test_bad_latents(decoder: FrameDecoder, latents: torch.Tensor, message: str) -> None:
    for decode in (decoder, decoder.decode_unnormalized):
        with pytest.raises(ValueError, match=message):
            decode(latents)


def test_unknown_output_and_dtype(decoder: FrameDecoder) -> None:
    with pytest.raises(ValueError, match=r"output must be one of \['float', 'uint8'\], got 'png'"):
        decoder(torch.zeros(1, 48, 2, 2), output="png")
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        FrameDecoder(decoder.topology, torch.int8)


def test_gradient_reaches_the_latents_only() -> None:
    decoder = build(TINY, torch.float64)
    assert not any(p.requires_grad for p in decoder.parameters())
    latents = latent_frame(TINY, 0, 1, 2, 3, torch.float64).requires_grad_()
    for decode in (decoder, decoder.decode_unnormalized):
        # No pixel within the step of a limit, where the clamp has a kink.
        assert ((decode(latents).abs() - 1).abs() > 1e-12).any()
        assert torch.autograd.gradcheck(decode, (latents,), fast_mode=True)
    assert not decoder(latents, "uint8").requires_grad


@pytest.mark.parametrize("config", [TINY, QWEN], ids=["wan2.2", "qwen-image"])
def test_captures_one_graph_for_every_size(config: dict[str, Any]) -> None:
    torch.compiler.reset()
    decoder = build(config)
    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(latent_frame(config, 0, 2, 5, 7, torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, height, width in ((3, 4, 5), (2, 6, 5)):
            latents = latent_frame(config, 1, batch, height, width, torch.float32)
            assert relative_error(compiled(latents), decoder(latents)) <= 1e-5


def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    decoder = build(TINY)
    latents = latent_frame(TINY, 0, 1, 3, 4, torch.float32)
    compiled = torch.compile(decoder, fullgraph=True)
    assert relative_error(compiled(latents), decoder(latents)) <= 1e-5


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_exports_saves_and_runs() -> None:
    decoder = build(TINY)
    # One row of cells has ambiguous strides, which the exporter's guards exclude.
    rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns"))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        decoder,
        (latent_frame(TINY, 0, 2, 2, 3, torch.float32),),
        dynamic_shapes={"latents": {0: batch, 2: rows, 3: columns}},
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in ((1, 2, 5), (3, 4, 2)):
        latents = latent_frame(TINY, 2, *size, torch.float32)
        assert relative_error(loaded(latents), decoder(latents)) <= 1e-5


def test_state_dict_round_trip_and_copies(tmp_path: Path) -> None:
    decoder = build(TINY, torch.bfloat16)
    torch.save(decoder.state_dict(), tmp_path / "decoder.pt")
    fresh = FrameDecoder(decoder.topology, torch.bfloat16)
    fresh.load_state_dict(torch.load(tmp_path / "decoder.pt", weights_only=True))
    assert not any(p.requires_grad for p in fresh.parameters())
    latents = latent_frame(TINY, 0, 1, 3, 4, torch.bfloat16)
    for other in (fresh, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(latents), decoder(latents))
        assert other.topology == decoder.topology


def test_to_changes_dtype_and_keeps_the_layout() -> None:
    moved, direct = build().to(torch.bfloat16), build(dtype=torch.bfloat16)
    latents = latent_frame(WAN22, 0, 1, 2, 3, torch.float32)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved(latents), direct(latents))
    for weight in (moved.stages[0].upsample.phases, direct.stages[0].blocks[0].conv1.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_a_checkpoint(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the decoder's last taps are read, each once."""
    config = FAMILIES[family]
    tensors = synthetic_decoder_state_dict(config)
    write_checkpoint(tmp_path / "vae", config, {**synthetic_state_dict(config), **tensors}, 2**20)
    taken: dict[str, int] = {}
    open_slices = checkpoint_module.open_slices

    class CountingSlice:
        def __init__(self, name: str, part: Any) -> None:
            self.name, self.part = name, part

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.part, attribute)

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.part[index]
            taken[self.name] = taken.get(self.name, 0) + tensor.numel()
            return tensor

    def counted(*args: Any) -> dict[str, Any]:
        return {name: CountingSlice(name, part) for name, part in open_slices(*args).items()}

    monkeypatch.setattr(checkpoint_module, "open_slices", counted)
    got = FrameDecoder.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    wanted = build(config).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    taps = {name: t.shape[2] if t.dim() == 5 else 1 for name, t in tensors.items()}
    # The 1x1 before the first convolution is needed twice: with and without denormalisation.
    times = {name: 2 if name.startswith("post_quant") else 1 for name in tensors}
    assert taken == {
        name: times[name] * tensor.numel() // taps[name]
        for name, tensor in tensors.items()
        if "time_conv" not in name
    }
