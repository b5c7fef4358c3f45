"""ClipDecoder as a module: inputs, iterators, streams, memory, copies, compile, export."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from decoder_cases import FAMILIES, TINY_CLIP, WAN22, latent_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos3_fast.frames import pixel_frames
from cosmos3_fast.vae import ClipDecoder, FrameDecoder
from cosmos3_fast.vae.checkpoint.reading import CheckpointError
from cosmos3_fast.vae.networks import layers
from cosmos3_fast.vae.networks.causal import Memory
from cosmos3_fast.vae.synthetic import (
    COSMOS3_VAE_CONFIG,
    synthetic_config,
    synthetic_decoder_state_dict,
    synthetic_state_dict,
)
from cosmos3_fast.vae.topology import DecoderTopology
from cosmos3_fast.vae.verify import FLOAT32_BOUND, relative_error

Z = TINY_CLIP["z_dim"]


def build(
    config: dict[str, Any] = TINY_CLIP, dtype: torch.dtype = torch.float32, **options: Any
) -> ClipDecoder:
    tensors = synthetic_decoder_state_dict(config)
    return ClipDecoder.from_state_dict(tensors, config, dtype, **options)


def tiny_clip(
    seed: int, batch: int, frames: int, *cells: int, dtype: Any = torch.float32
) -> Tensor:
    return latent_clip(TINY_CLIP, seed, batch, frames, *cells, dtype)


@pytest.fixture(scope="module")
def decoder() -> ClipDecoder:
    return build()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of frames goes through a level at once, as of images of a real size."""
    monkeypatch.setattr(layers, "_PIXELS_AT_ONCE", 1)


@pytest.mark.parametrize(("direct", "weights"), [(False, 1.1e9), (True, 0.56e9)])
def test_attributes_at_cosmos3_topology(direct: bool, weights: float) -> None:
    topology = DecoderTopology.from_config(synthetic_config(COSMOS3_VAE_CONFIG))
    decoder = ClipDecoder(topology, device="meta", direct=direct)
    assert (decoder.z_dim, decoder.spatial_factor) == (48, 16)
    assert (decoder.dtype, decoder.device.type) == (torch.bfloat16, "meta")
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert count == pytest.approx(weights, rel=0.03)
    assert all(parameter.element_size() == 2 for parameter in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_layout_and_dtype(dtype: torch.dtype) -> None:
    decoder = build(WAN22, dtype)
    latents = latent_clip(WAN22, 0, 2, 3, 3, 2, torch.float32)
    out = decoder(latents)
    assert (out.shape, out.dtype) == ((2, 3, 9, 48, 32), dtype)
    assert out.is_contiguous()
    assert out.abs().max() <= 1
    assert torch.equal(decoder(latents.to(dtype)), out)
    out = decoder(latents, "uint8")
    assert (out.shape, out.dtype) == ((2, 9, 48, 32, 3), torch.uint8)
    assert out.is_contiguous()


def test_input_layouts_agree(decoder: ClipDecoder) -> None:
    latents = tiny_clip(0, 2, 5, 3, 4)
    wanted = decoder(latents)
    sliced = torch.full((3, Z + 2, 11, 5, 9), torch.nan)
    place = (slice(1, None), slice(1, Z + 1), slice(1, 11, 2), slice(1, 4), slice(0, 8, 2))
    sliced[place] = latents
    for other in (
        latents.contiguous(memory_format=torch.channels_last_3d),
        sliced[place],
        latents.transpose(1, 2).contiguous().transpose(1, 2),
        latents.double(),
    ):
        assert torch.equal(decoder(other), wanted)
    still = latents[:, :, :1].expand(-1, -1, 6, -1, -1)
    assert torch.equal(decoder(still), decoder(still.contiguous()))


def test_batch_entries_are_independent(decoder: ClipDecoder) -> None:
    latents = tiny_clip(1, 3, 4, 2, 3)
    alone = torch.cat([decoder(entry[None]) for entry in latents])
    assert relative_error(decoder(latents), alone) <= FLOAT32_BOUND


def test_empty_batch(decoder: ClipDecoder) -> None:
    latents = torch.empty(0, Z, 5, 2, 3)
    for decode in (decoder, decoder.decode_unnormalized):
        out = decode(latents)
        assert (out.shape, out.dtype) == ((0, 3, 17, 16, 24), torch.float32)
        out = decode(latents, "uint8")
        assert (out.shape, out.dtype) == ((0, 17, 16, 24, 3), torch.uint8)
    assert [part.shape[2] for part in decoder.frames(latents)] == [1, 16]
    stream = decoder.stream("uint8")
    assert stream.push(latents[:, :, :2]).shape == (0, 5, 16, 24, 3)
    assert stream.push(latents[:, :, 2:]).shape == (0, 12, 16, 24, 3)


BAD_LATENTS = [
    (
        torch.zeros(Z, 2, 2),
        rf"latents must have shape \[B, {Z}, h, w\] or \[B, {Z}, T, h, w\], got",
    ),
    (torch.zeros(1, 5, 2, 2, 2), rf"latents must have {Z} channels, got shape \[1, 5, 2, 2, 2\]"),
    (torch.zeros(1, Z, 0, 2, 2), r"latents must have at least 1 frame, got shape \[1, \d, 0, 2, 2"),
    (torch.zeros(1, Z, 3, 0, 2), r"latents must have height and width of at least 1, got"),
    (
        torch.zeros(1, Z, 3, 2, 2, dtype=torch.int64),
        r"latents must be floating point, got torch\.i",
    ),
    (
        torch.zeros(1, Z, 3, 2, 2, device="meta"),
        r"latents must be on the decoder's device, cpu, got meta",
    ),
]


@pytest.mark.parametrize(("latents", "message"), BAD_LATENTS)
def test_bad_latents(decoder: ClipDecoder, latents: Tensor, message: str) -> None:
    """With the call, also where it gives an iterator."""
    calls = (decoder, decoder.decode_unnormalized, decoder.frames, decoder.stream().push)
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(latents)


def test_unknown_output_dtype_and_form(decoder: ClipDecoder) -> None:
    latents = torch.zeros(1, Z, 2, 2, 2)
    message = r"output must be one of \['float', 'uint8'\], got 'png'"
    calls: tuple[Callable[[], Any], ...] = (
        lambda: decoder(latents, output="png"),
        lambda: decoder.frames(latents, output="png"),
        lambda: decoder.stream("png"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    topology = decoder.topology
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        ClipDecoder(topology, torch.int8)
    message = (
        r"products must be the network's dtype, torch\.float32 or torch\.float16, got .*bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        ClipDecoder(topology, torch.float32, products=torch.bfloat16)
    message = r"products must be the network's dtype, torch\.float32, got torch\.float16"
    with pytest.raises(ValueError, match=message):
        ClipDecoder(topology, torch.float32, products=torch.float16, direct=True)


@pytest.mark.parametrize("output", ["float", "uint8"])
@pytest.mark.parametrize("frames", [1, 2, 5, 13, 36])
def test_frames_are_those_of_the_whole(decoder: ClipDecoder, frames: int, output: str) -> None:
    latents = tiny_clip(2, 2, frames, 2, 3)
    time = 1 if output == "uint8" else 2
    parts = list(decoder.frames(latents, output))
    assert torch.equal(torch.cat(parts, time), decoder(latents, output))
    sizes = [part.shape[time] for part in parts]
    assert sizes[0] == 1
    assert all(0 < size <= 16 for size in sizes)
    assert sum(sizes) == pixel_frames(frames)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_large_images(
    dtype: torch.dtype, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth first, a block at a time: the same but for the order of sums."""
    decoder = build(dtype=dtype)
    latents = tiny_clip(3, 2, 8, 3, 2, dtype=dtype)
    parts = list(decoder.frames(latents))
    block = 2 if dtype == torch.float32 else 4
    assert [part.shape[2] for part in parts] == [1, *[block] * (28 // block)]
    assert torch.equal(torch.cat(parts, 2), decoder(latents))
    monkeypatch.undo()
    whole = decoder(latents)
    if dtype == torch.float32:
        assert relative_error(torch.cat(parts, 2), whole) <= FLOAT32_BOUND
    else:
        # Each of some twenty layers may round the other way: by eps/√12 of its values, rms.
        difference = (torch.cat(parts, 2).double() - whole.double()).square().mean().sqrt()
        assert difference <= (20 / 12) ** 0.5 * torch.finfo(dtype).eps * whole.double().std()


def test_large_parts_hold_few_frames(small_parts: None) -> None:
    """No layer of the largest level ever sees more than one block, however long the clip."""
    decoder = build()
    seen: list[int] = []
    decoder.stages[-1].register_forward_pre_hook(
        lambda stage, args: seen.append(args[0].x.shape[0])
    )
    decoder(tiny_clip(4, 1, 30, 1, 2))
    assert max(seen) == 2
    assert sum(seen) == pixel_frames(30)


def split(latents: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(latents.split(sizes, 2))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [1, 8], [2, 3, 4], [4, 1, 4], [3, 6]])
def test_a_stream_equals_the_whole(sizes: list[int], direct: bool) -> None:
    decoder = build(direct=direct)
    latents = tiny_clip(5, 2, 9, 2, 3)
    for output in ("float", "uint8"):
        time = 1 if output == "uint8" else 2
        stream = decoder.stream(output)
        parts = [stream.push(part) for part in split(latents, sizes)]
        done = itertools.accumulate(sizes)
        for part, size, end in zip(parts, sizes, done, strict=True):
            assert part.shape[time] == 4 * size - 3 * (size == end)
        whole, got = decoder(latents, output), torch.cat(parts, time)
        if output == "uint8":
            assert (got.int() - whole.int()).abs().max() <= 1
        else:
            assert relative_error(got, whole) <= FLOAT32_BOUND


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 18), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)
def test_a_stream_equals_the_whole_however_it_comes(
    sizes: list[int], shape: tuple[int, int, int]
) -> None:
    decoder = TINY_DECODER
    latents = tiny_clip(6, shape[0], sum(sizes), *shape[1:])
    stream = decoder.stream()
    got = torch.cat([stream.push(part) for part in split(latents, sizes)], 2)
    assert relative_error(got, decoder(latents)) <= FLOAT32_BOUND


TINY_DECODER = build()


def test_a_stream_takes_single_frames_and_checks_its_shape(decoder: ClipDecoder) -> None:
    latents = tiny_clip(7, 2, 3, 2, 3)
    stream = decoder.stream()
    parts = [stream.push(latents[:, :, 0])]
    for other in (latents[:1], latents[..., :2], latents[:, :, :, :1]):
        message = r"latents must have batch, height and width \(2, 2, 3\) as before, got \("
        with pytest.raises(ValueError, match=message):
            stream.push(other)
    # What is refused changes nothing.
    parts += [stream.push(latents[:, :, i]) for i in (1, 2)]
    assert relative_error(torch.cat(parts, 2), decoder(latents)) <= FLOAT32_BOUND


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """All that any layer keeps."""
    refs: list[weakref.ref[Tensor]] = []
    keep = Memory.keep

    def recorded(self: Memory, layer: Any, frames: Tensor) -> None:
        refs.append(weakref.ref(frames))
        keep(self, layer, frames)

    monkeypatch.setattr(Memory, "keep", recorded)
    return refs


def alive(refs: list[weakref.ref[Tensor]]) -> int:
    assert refs
    return sum(ref() is not None for ref in refs)


def test_a_finished_call_keeps_nothing(
    decoder: ClipDecoder, remembered: list[weakref.ref[Tensor]]
) -> None:
    latents = tiny_clip(8, 1, 5, 2, 2)
    decoder(latents)
    assert alive(remembered) == 0
    frames = decoder.frames(latents)
    next(frames)
    assert alive(remembered) > 0
    for _ in frames:
        pass
    assert alive(remembered) == 0
    stream = decoder.stream()
    stream.push(latents)
    held = alive(remembered)
    stream.push(latents)
    assert alive(remembered) == held > 0
    stream.close()
    assert alive(remembered) == 0


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_remembered_does_not_grow(
    direct: bool, remembered: list[weakref.ref[Tensor]]
) -> None:
    """Two frames of each convolution, and no storage of more."""
    stream = build(direct=direct).stream()
    sizes = []
    for frames in (2, 9, 1, 16):
        stream.push(tiny_clip(25, 1, frames, 2, 2))
        held = [past for past in (ref() for ref in remembered) if past is not None]
        assert all(past.shape[0] <= 2 for past in held)
        sizes.append(sum(past.untyped_storage().nbytes() for past in held))
        assert sizes[-1] == sum(past.numel() * past.element_size() for past in held)
        held.clear()
    assert len(set(sizes)) == 1


def test_an_abandoned_iterator_keeps_nothing(
    decoder: ClipDecoder, remembered: list[weakref.ref[Tensor]]
) -> None:
    latents = tiny_clip(9, 1, 5, 2, 2)
    gc.disable()
    try:
        frames = decoder.frames(latents)
        next(frames), next(frames)
        assert alive(remembered) > 0
        del frames
        assert alive(remembered) == 0
        stream = decoder.stream()
        stream.push(latents)
        del stream
        assert alive(remembered) == 0
    finally:
        gc.enable()


class OutOfMemory(RuntimeError):
    pass


@pytest.fixture
def failing() -> Iterator[ClipDecoder]:
    """A decoder whose last stage fails on the second call of each clip."""
    decoder = build()

    def fail(stage: Any, args: Any) -> None:
        if not args[1].first:
            raise OutOfMemory("as a device would")

    hook = decoder.stages[-1].register_forward_pre_hook(fail)
    yield decoder
    hook.remove()


def test_an_exception_keeps_nothing(
    failing: ClipDecoder, remembered: list[weakref.ref[Tensor]]
) -> None:
    latents = tiny_clip(10, 1, 5, 2, 2)
    for call in (failing, lambda z: list(failing.frames(z)), failing.stream().push):
        try:
            call(latents)
        except OutOfMemory:
            pass
        else:
            raise AssertionError("the hook must fail")
        assert alive(remembered) == 0


def test_a_stream_that_failed_is_at_its_end(
    failing: ClipDecoder, remembered: list[weakref.ref[Tensor]]
) -> None:
    latents = tiny_clip(11, 1, 3, 2, 2)
    stream = failing.stream()
    stream.push(latents[:, :, 0])
    assert alive(remembered) > 0
    with contextlib.suppress(OutOfMemory):
        stream.push(latents[:, :, 1:])
    assert alive(remembered) == 0
    message = r"the stream must not have ended, got one that failed or was closed"
    with pytest.raises(RuntimeError, match=message):
        stream.push(latents[:, :, :1])
    closed = failing.stream()
    closed.close()
    with pytest.raises(RuntimeError, match=message):
        closed.push(latents[:, :, :1])


def test_interleaved_clips_share_nothing(decoder: ClipDecoder) -> None:
    clips = [tiny_clip(12, 1, 7, 2, 2), tiny_clip(13, 2, 9, 2, 3)]
    wanted = [decoder(latents) for latents in clips]
    iterators = [decoder.frames(latents) for latents in clips]
    got: list[list[Tensor]] = [[], []]
    streams = [decoder.stream() for _ in clips]
    pushed: list[list[Tensor]] = [[], []]
    for step in range(9):
        for i, latents in enumerate(clips):
            got[i] += [part for part in [next(iterators[i], None)] if part is not None]
            if step < latents.shape[2]:
                pushed[i].append(streams[i].push(latents[:, :, step]))
    for i, whole in enumerate(wanted):
        got[i] += iterators[i]
        assert torch.equal(torch.cat(got[i], 2), whole)
        assert relative_error(torch.cat(pushed[i], 2), whole) <= FLOAT32_BOUND
        assert torch.equal(decoder(clips[i]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_share_no_state(dtype: torch.dtype) -> None:
    decoder = build(dtype=dtype)
    clips = [tiny_clip(seed, 1, frames, 2, 3, dtype=dtype) for seed, frames in ((14, 5), (15, 3))]
    wanted = [decoder(latents) for latents in clips]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, pixels in zip(pool.map(decoder, clips * 2), wanted * 2, strict=True):
                assert torch.equal(got, pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_and_weights_stay_as_they_are(dtype: torch.dtype) -> None:
    decoder = build(dtype=dtype)
    latents = tiny_clip(16, 1, 5, 2, 3, dtype=dtype)
    before = copy.deepcopy((latents, decoder.state_dict()))
    decoder(latents)
    assert torch.equal(latents, before[0])
    after = decoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before[1].items())


def test_gradient_reaches_the_latents_and_only_those_that_matter() -> None:
    """Finite differences; a frame does not see later latents, but for what cancels in a block."""
    for options, cancelled in (({}, 1e-12), ({"direct": True}, 0)):
        decoder = build(dtype=torch.float64, **options)
        assert not any(p.requires_grad for p in decoder.parameters())
        latents = tiny_clip(17, 1, 4, 1, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(decoder, (latents,), fast_mode=True)
        pixels = decoder(latents)
        for latent, end in ((0, 1), (1, 5), (2, 9)):
            (gradient,) = torch.autograd.grad(pixels[:, :, :end].sum(), latents, retain_graph=True)
            assert gradient[:, :, latent].abs().max() > 0
            most = 0 if latent == 0 else cancelled
            assert gradient[:, :, latent + 1 :].abs().max() <= most
        assert not decoder(latents, "uint8").requires_grad
        parts = list(decoder.frames(latents))
        assert torch.equal(torch.cat(parts, 2), pixels)


def test_inference_mode_and_no_grad_agree(decoder: ClipDecoder) -> None:
    latents = tiny_clip(18, 1, 5, 2, 3)
    wanted = decoder(latents)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(decoder(latents), wanted)
            stream = decoder.stream()
            stream.push(latents[:, :, :3])
        # A stream goes on in another mode.
        assert relative_error(stream.push(latents[:, :, 3:]), wanted[:, :, 9:]) <= FLOAT32_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    decoder = build(dtype=dtype)
    alone = FrameDecoder.from_state_dict(synthetic_decoder_state_dict(TINY_CLIP), TINY_CLIP, dtype)
    latents = tiny_clip(24, 1, 5, 2, 3, dtype=dtype)
    wanted, first = decoder(latents), alone(latents[:, :, 0])
    frames = decoder.frames(latents)
    parts = [next(frames)]
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", half):
            assert torch.equal(decoder(latents), wanted)
            assert torch.equal(alone(latents[:, :, 0]), first)
            assert torch.equal(decoder.stream().push(latents), wanted)
            for part in frames:
                assert torch.is_autocast_enabled("cpu")  # the caller's own
                parts.append(part)
    assert torch.equal(torch.cat(parts, 2), wanted)


STATES = [
    (torch.float32, {}),
    (torch.float32, {"products": torch.float16}),
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.bfloat16, {"direct": True}),
]


@pytest.mark.parametrize(("dtype", "options"), STATES, ids=str)
def test_state_dict_round_trip(tmp_path: Path, dtype: torch.dtype, options: Any) -> None:
    decoder = build(dtype=dtype, **options)
    latents = tiny_clip(19, 1, 5, 2, 3, dtype=dtype)
    wanted = decoder(latents)
    state = decoder.state_dict()
    exponents = [tensor for name, tensor in state.items() if name.endswith(".exponents")]
    half = options.get("products", dtype) == torch.float16 or (dtype, options) == STATES[2]
    assert any(bool(tensor.any()) for tensor in exponents) == half
    torch.save(state, tmp_path / "decoder.pt")
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "decoder.safetensors")
    for assign, loaded in (
        (False, torch.load(tmp_path / "decoder.pt", weights_only=True)),
        (False, load_file(tmp_path / "decoder.safetensors")),
        (True, torch.load(tmp_path / "decoder.pt", weights_only=True)),
    ):
        fresh = ClipDecoder(decoder.topology, dtype, **options)
        fresh.load_state_dict(loaded, assign=assign)
        assert not any(p.requires_grad for p in fresh.parameters()) or assign
        assert torch.equal(fresh(latents), wanted)
        assert {n: t.dtype for n, t in fresh.state_dict().items()} == {
            n: t.dtype for n, t in state.items()
        }


@pytest.mark.parametrize(("dtype", "options"), STATES, ids=str)
def test_copies_and_moves_behave_alike(dtype: torch.dtype, options: Any) -> None:
    decoder = build(dtype=dtype, **options)
    latents = tiny_clip(20, 1, 5, 2, 3, dtype=dtype)
    wanted = decoder(latents)
    for other in (
        copy.deepcopy(decoder),
        pickle.loads(pickle.dumps(decoder)),
        copy.deepcopy(decoder).to("cpu", dtype),
        copy.deepcopy(decoder).to(memory_format=torch.channels_last),
    ):
        assert torch.equal(other(latents), wanted)
    assert copy.deepcopy(decoder).to("meta").device.type == "meta"
    other_dtype = torch.float64
    message = rf"a ClipDecoder must be folded in its dtype, got a conversion of {dtype} to .*64"
    for convert in (decoder.double, lambda: decoder.to(other_dtype)):
        with pytest.raises(TypeError, match=message):
            convert()
    assert torch.equal(decoder(latents), wanted)


def test_the_last_taps_are_the_frame_decoders() -> None:
    tensors = synthetic_decoder_state_dict(WAN22)
    state = ClipDecoder.from_state_dict(tensors, WAN22, torch.bfloat16).state_dict()
    alone = FrameDecoder.from_state_dict(tensors, WAN22, torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())
    others = state.keys() - alone.keys()
    assert all(n.endswith((".earlier", ".exponents")) or ".time_conv." in n for n in others)


@pytest.mark.parametrize("options", [{}, {"direct": True}, {"products": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("family", ["wan2.2", "wan2.1"])
@pytest.mark.parametrize("shard", [None, 2**20], ids=["single", "sharded"])
def test_checkpoint_equals_from_state_dict(
    tmp_path: Path, family: str, shard: int | None, options: Any
) -> None:
    config = FAMILIES[family]
    tensors = synthetic_decoder_state_dict(config)
    write_checkpoint(tmp_path / "vae", config, {**synthetic_state_dict(config), **tensors}, shard)
    wanted = ClipDecoder.from_state_dict(tensors, config, torch.bfloat16, **options).state_dict()
    loaded = ClipDecoder.from_pretrained(tmp_path, **options)
    assert loaded.dtype == torch.bfloat16
    got = loaded.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(got[name].dtype == wanted[name].dtype for name in wanted)


def test_broken_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_CLIP, synthetic_decoder_state_dict(TINY_CLIP))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        ClipDecoder.from_pretrained(tmp_path)


def test_captures_one_graph_for_every_size() -> None:
    torch.compiler.reset()
    decoder = build()
    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend="eager")
    latents = tiny_clip(21, 2, 3, 5, 7)  # sizes that no other has
    assert torch.equal(compiled(latents), decoder(latents))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = tiny_clip(22, 3, 3, 6, 5)
        assert torch.equal(compiled(other), decoder(other))


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_exports_saves_and_runs() -> None:
    decoder = build(dtype=torch.bfloat16)
    latents = tiny_clip(23, 1, 3, 2, 3, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.export.save(torch.export.export(decoder, (latents,)), file)
    file.seek(0)
    got = torch.export.load(file).module()(latents)
    assert torch.equal(got, decoder(latents))
