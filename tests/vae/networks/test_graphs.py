"""Graphs that a network keeps: their bookkeeping with a stand-in for a graph; the rest on a GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoder_cases import TINY as TINY_DECODER
from decoder_cases import TINY_CLIP
from encoder_cases import TINY, image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.vae import ClipDecoder, FrameDecoder, FrameEncoder
from cosmos3_fast.vae.networks import decoder as decoder_module
from cosmos3_fast.vae.networks import graphs
from cosmos3_fast.vae.networks.graphs import Graphs
from cosmos3_fast.vae.synthetic import synthetic_decoder_state_dict, synthetic_state_dict

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class Recorded:
    """Keeps what a graph would compute for the values of its capture, and counts."""

    captured = 0
    replayed = 0
    fails = False

    def __init__(
        self, run: Callable[[Tensor], Tensor], given: Tensor, state: Sequence[Tensor] = ()
    ) -> None:
        with graphs.unchanged(state):
            run(given)
            if Recorded.fails:
                raise torch.OutOfMemoryError("out of memory")
        Recorded.captured += 1
        self._run, self.shape, self.at_work = run, given.shape, threading.Lock()

    @staticmethod
    def serves(given: Tensor) -> bool:
        return True

    def __call__(self, given: Tensor) -> Tensor:
        assert given.shape == self.shape
        assert self.at_work.acquire(blocking=False), "two threads replay one graph at once"
        with torch.no_grad():
            result = self._run(given).clone()
        Recorded.replayed += 1
        self.at_work.release()
        return result


def counts() -> tuple[int, int]:
    return Recorded.captured, Recorded.replayed


@pytest.fixture
def encoder() -> FrameEncoder:
    made = FrameEncoder.from_state_dict(synthetic_state_dict(TINY), TINY, torch.float32)
    made._graphs = Graphs(2, Recorded)
    Recorded.captured, Recorded.replayed, Recorded.fails = 0, 0, False
    return made


def pixels(seed: int = 0, batch: int = 1, height: int = 16, width: int = 24) -> Tensor:
    return image(seed, batch, height, width, torch.float32)


def test_one_capture_for_one_key(encoder: FrameEncoder) -> None:
    wanted = encoder.release()(pixels(1))
    encoder._graphs = Graphs(2, Recorded)
    for seed in (0, 1):
        got = encoder(pixels(seed))
    assert torch.equal(got, wanted)
    assert counts() == (1, 2)
    encoder(pixels(0, batch=2))
    encoder(pixels().contiguous(memory_format=torch.channels_last))
    encoder(pixels().bfloat16())
    assert counts() == (4, 5)
    encoder._graphs = Graphs(8, Recorded)
    for _ in range(2):
        encoder(pixels())
        with torch.inference_mode():
            assert encoder(pixels()).is_inference()
    assert counts() == (5, 9)


def test_the_least_recently_used_goes_first(encoder: FrameEncoder) -> None:
    for width in (16, 24, 16, 32):  # 24 goes
        encoder(pixels(width=width))
    assert counts() == (3, 4)
    encoder(pixels(width=16))
    encoder(pixels(width=32))
    assert counts() == (3, 6)
    encoder(pixels(width=24))
    assert counts() == (4, 7)


def test_a_decoder_has_a_graph_for_each_output_and_entry() -> None:
    tensors = synthetic_decoder_state_dict(TINY_DECODER)
    decoder = FrameDecoder.from_state_dict(tensors, TINY_DECODER, torch.float32)
    latents = torch.randn(1, decoder.z_dim, 2, 3)
    calls: list[Callable[[], Tensor]] = [
        lambda: decoder(latents),
        lambda: decoder(latents, "uint8"),
        lambda: decoder.decode_unnormalized(latents),
    ]
    wanted = [call() for call in calls]
    decoder._graphs = Graphs(4, Recorded)
    Recorded.captured, Recorded.replayed, Recorded.fails = 0, 0, False
    for _ in range(2):
        assert all(torch.equal(call(), w) for call, w in zip(calls, wanted, strict=True))
    assert counts() == (3, 6)


CHANGES: dict[str, Callable[[FrameEncoder], Any]] = {
    "in place": lambda e: e.conv_in.weight.mul_(2.0),
    "a parameter": lambda e: setattr(
        e.conv_out, "bias", torch.nn.Parameter(torch.ones(4), requires_grad=False)
    ),
    "loaded": lambda e: e.load_state_dict(e.state_dict()),
    "assigned": lambda e: e.load_state_dict(copy.deepcopy(e.state_dict()), assign=True),
    "moved": lambda e: e.to(torch.float64).to(torch.float32),
    "data": lambda e: setattr(e.conv_out.bias, "data", torch.ones(4)),
    "a module": lambda e: e.middle.__setitem__(0, copy.deepcopy(e.middle[0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_captured_again(encoder: FrameEncoder, change: str) -> None:
    encoder(pixels())
    encoder(pixels(width=16))
    CHANGES[change](encoder)
    for _ in range(2):
        got = encoder(pixels())
    assert counts() == (3, 4)
    assert torch.equal(got, encoder.release()(pixels()))


def test_changed_settings_are_captured_apart(
    encoder: FrameEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder(pixels())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    encoder(pixels())
    assert counts() == (2, 2)


def test_steps_aside(encoder: FrameEncoder) -> None:
    wanted = encoder(pixels())
    before = counts()
    given = pixels().requires_grad_()
    encoder(given).sum().backward()
    assert given.grad is not None
    with torch.no_grad():
        assert torch.equal(encoder(given), wanted)  # a capture of the same
    assert counts() == (before[0], before[1] + 1)
    before = counts()
    torch.func.vmap(lambda x: encoder(x[None]))(pixels(batch=2))
    with FlopCounterMode(display=False) as counter:
        encoder(pixels())
    assert counter.get_total_flops() > 0
    seen: list[Tensor] = []
    hook = encoder.middle[0].register_forward_hook(lambda *_: seen.append(pixels()))
    encoder(pixels())
    hook.remove()
    assert len(seen) == 1
    encoder.conv_in.weight.requires_grad_(True)
    assert encoder(pixels()).requires_grad
    encoder.conv_in.weight.requires_grad_(False)
    assert counts() == before
    encoder(pixels())
    assert counts() == (before[0], before[1] + 1)


def test_is_exported_without_graphs(encoder: FrameEncoder) -> None:
    program = torch.export.export(encoder, (pixels(),))
    assert torch.equal(program.module()(pixels()), encoder.release()(pixels()))
    assert counts() == (0, 0)


def test_a_failed_capture_is_said_once(encoder: FrameEncoder) -> None:
    Recorded.fails = True
    with pytest.warns(UserWarning, match="FrameEncoder: calls with .* got out of memory"):
        got = encoder(pixels())
    Recorded.fails = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(encoder(pixels()), got)
    assert counts() == (0, 0)
    encoder(pixels(width=16))
    assert counts() == (1, 1)


def test_threads_share_graphs_and_take_turns(encoder: FrameEncoder) -> None:
    encoder._graphs = Graphs(3, Recorded)
    given = [pixels(seed, width=width) for seed in range(4) for width in (16, 24, 32)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(encoder, given))
    assert counts() == (3, 12)
    encoder.release()
    assert all(torch.equal(encoder(x), y) for x, y in zip(given, got, strict=True))


def test_copies_and_pickles_capture_anew(encoder: FrameEncoder) -> None:
    wanted = encoder(pixels())
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copies = (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), loaded)
    for i, each in enumerate(copies):
        assert each._graphs is not encoder._graphs
        assert each._graphs.keep == 2
        assert torch.equal(each(pixels()), wanted)
        assert counts()[0] == 2 + i


def test_graphs_do_not_keep_the_network(encoder: FrameEncoder) -> None:
    made = FrameEncoder.from_state_dict(synthetic_state_dict(TINY), TINY, torch.float32).capture()
    made(pixels())
    gone = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_capture_and_release(encoder: FrameEncoder) -> None:
    assert encoder.capture(3) is encoder
    assert encoder._graphs is not None
    assert encoder._graphs.keep == 3
    wanted = encoder(pixels())  # on a CPU, as without
    assert encoder.release() is encoder
    assert encoder._graphs is None
    assert torch.equal(encoder(pixels()), wanted)
    with pytest.raises(ValueError, match="keep must be"):
        encoder.capture(0)


@pytest.fixture
def clip_decoder(monkeypatch: pytest.MonkeyPatch) -> ClipDecoder:
    monkeypatch.setattr(decoder_module, "Graphs", lambda keep: Graphs(keep, Recorded))
    Recorded.captured, Recorded.replayed, Recorded.fails = 0, 0, False
    state = synthetic_decoder_state_dict(TINY_CLIP)
    return ClipDecoder.from_state_dict(state, TINY_CLIP, torch.float32)


def pushes(decoder: ClipDecoder, sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, decoder.z_dim, size, 3, 2) for size in sizes]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("output", ["float", "uint8"])
def test_a_stream_replays_its_steps(clip_decoder: ClipDecoder, output: str) -> None:
    given = pushes(clip_decoder, (1, 1, 1, 2, 1, 2, 1))
    eager, captured = clip_decoder.stream(output), clip_decoder.stream(output, capture=2)
    for i, latents in enumerate(given):
        # What is kept may be made in one mode and written to in another.
        with torch.inference_mode(i % 2 == 0):
            assert torch.equal(captured.push(latents), eager.push(latents))
    assert counts() == (2, 5)


def test_a_stream_begins_with_more_than_a_frame(clip_decoder: ClipDecoder) -> None:
    given = pushes(clip_decoder, (4, 17, 1))
    eager, captured = clip_decoder.stream(), clip_decoder.stream(capture=1)
    for latents in given:
        assert torch.equal(captured.push(latents), eager.push(latents))
    # 1 and 3; 16 and 1; 1: one graph at a time.
    assert counts() == (2, 3)


def test_a_stream_of_no_video_has_no_graphs(clip_decoder: ClipDecoder) -> None:
    stream = clip_decoder.stream(capture=1)
    shapes = [list(stream.push(x[:0]).shape) for x in pushes(clip_decoder, (1, 1, 1))]
    assert [shape[:3] for shape in shapes] == [[0, 3, 1], [0, 3, 4], [0, 3, 4]]
    assert counts() == (0, 0)


def test_streams_share_nothing(clip_decoder: ClipDecoder) -> None:
    given = [pushes(clip_decoder, (1, 1, 1, 1)), pushes(clip_decoder, (1, 1, 1, 1))[::-1]]
    streams = [clip_decoder.stream(capture=1) for _ in given]
    got = [[], []]
    for step in range(4):
        for i, stream in enumerate(streams):
            got[i].append(stream.push(given[i][step]))
    for latents, frames in zip(given, got, strict=True):
        alone = clip_decoder.stream()
        assert all(torch.equal(alone.push(x), y) for x, y in zip(latents, frames, strict=True))
    assert counts() == (2, 4)


def test_a_stream_whose_capture_fails(clip_decoder: ClipDecoder) -> None:
    """What the attempt wrote is undone."""
    given = pushes(clip_decoder, (1, 1, 1, 1))
    eager, captured = clip_decoder.stream(), clip_decoder.stream(capture=1)
    Recorded.fails = True
    assert all(torch.equal(captured.push(x), eager.push(x)) for x in given[:2])
    with pytest.warns(UserWarning, match="ClipStream: calls with .* are not captured"):
        got = captured.push(given[2])
    assert torch.equal(got, eager.push(given[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        assert torch.equal(captured.push(given[3]), eager.push(given[3]))


def test_a_stream_notices_changed_weights(clip_decoder: ClipDecoder) -> None:
    given = pushes(clip_decoder, (1, 1, 1, 1, 1))
    eager, captured = clip_decoder.stream(), clip_decoder.stream(capture=1)
    for i, latents in enumerate(given):
        if i == 3:
            clip_decoder.conv_out.bias.add_(0.25)
        assert torch.equal(captured.push(latents), eager.push(latents))
    assert counts() == (2, 3)


def test_a_stream_with_gradients(clip_decoder: ClipDecoder) -> None:
    given = pushes(clip_decoder, (1, 1, 1, 1, 1, 1))
    eager, captured = clip_decoder.stream(), clip_decoder.stream(capture=1)
    for i, latents in enumerate(given):
        frames = []
        for stream in (captured, eager):
            leaf = latents.clone().requires_grad_(i in (1, 3))
            frames.append(stream.push(leaf))
            if leaf.requires_grad:
                frames[-1].square().sum().backward(retain_graph=True)
                frames.append(leaf.grad)
        half = len(frames) // 2
        # Frames that look back on such as were differentiated are so too, without graphs.
        assert all(
            torch.allclose(*pair, atol=1e-6)
            for pair in zip(frames[:half], frames[half:], strict=True)
        )
    assert Recorded.captured >= 1


def test_capture_of_a_stream_is_checked(clip_decoder: ClipDecoder) -> None:
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="capture must be a positive integer, got"):
            clip_decoder.stream(capture=wrong)
    stream = clip_decoder.stream(capture=1)
    stream.push(pushes(clip_decoder, (3,))[0])
    stream.close()
    assert stream._graphs is None


class NoDevice:
    """What `CudaGraph` asks of torch.cuda, written down; a replay does what was captured."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.replayed: Callable[[], object] = lambda: None
        for name in ("wait_stream", "wait_event", "record"):
            setattr(self, name, lambda *_, name=name: self.log.append(name))
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda: self)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(graphs, "_own_stream", lambda _: self)
        patch.setattr(Tensor, "record_stream", lambda *_: self.log.append("record_stream"))

    def record_event(self) -> NoDevice:
        self.log.append("record")
        return self

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"  # others go on calling CUDA meanwhile
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")

    def replay(self) -> None:
        self.log.append("replay")
        self.replayed()


def test_the_order_of_a_capture_and_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    device = NoDevice(monkeypatch)

    def run(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x.is_inference()
        device.log.append("run")
        return x + 1

    with torch.inference_mode():
        graph = graphs.CudaGraph(run, torch.zeros(2))
    capture = ["wait_stream", "run", "begin", "run", "end", "wait_stream", "record"]
    assert device.log == capture
    device.log.clear()
    device.replayed = lambda: graph._result.copy_(graph._given + 1)
    with torch.inference_mode():
        first = graph(torch.ones(2))
    second = graph(torch.full((2,), 2.0))
    assert (first.tolist(), second.tolist()) == ([2.0, 2.0], [3.0, 3.0])
    assert device.log == ["wait_event", "record_stream", "replay", "record"] * 2

    def fails(x: Tensor) -> Tensor:
        if device.log[-1] == "begin":
            raise torch.OutOfMemoryError
        return x

    device.log.clear()
    with pytest.raises(torch.OutOfMemoryError):
        graphs.CudaGraph(fails, torch.zeros(2))
    assert device.log == ["wait_stream", "begin", "end"]
    graphs.CudaGraph(run, torch.zeros(2))  # nothing is held


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> FrameEncoder:
    return FrameEncoder.from_state_dict(synthetic_state_dict(TINY), TINY, dtype, "cuda")


def alike(ours: Tensor, eager: Tensor) -> bool:
    """The capture may have been given another convolution than the eager call is."""
    return bool((ours.float() - eager.float()).norm() <= 0.02 * eager.float().norm())


@pytest.mark.gpu
@needs_gpu
def test_replays_on_a_gpu() -> None:
    eager, encoder = on_gpu(), on_gpu().capture(2)
    given = [pixels(seed).cuda() for seed in range(3)]
    got = [encoder(x) for x in given]
    assert all(alike(y, eager(x)) for x, y in zip(given, got, strict=True))
    again = encoder(given[0])
    assert torch.equal(again, got[0])
    assert again.data_ptr() != got[0].data_ptr()
    with torch.inference_mode():
        assert torch.equal(encoder(given[0]), got[0])
    encoder.conv_out.bias.data = encoder.conv_out.bias + 1.0
    assert not alike(encoder(given[0]), got[0])
    torch.cuda.empty_cache()
    encoder.cpu().cuda()
    encoder.conv_out.bias.sub_(1.0)
    assert alike(encoder(given[1]), got[1])


@pytest.mark.gpu
@needs_gpu
def test_replays_from_threads_and_streams() -> None:
    eager, encoder = on_gpu(), on_gpu().capture()
    given = [pixels(seed, width=16 + 8 * (seed % 2)).cuda() for seed in range(12)]
    torch.cuda.synchronize()

    def call(x: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            got = [encoder(x) for _ in range(5)][-1]
            torch.cuda.current_stream().synchronize()
            return got

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(call, given))
    assert all(alike(y, eager(x)) for x, y in zip(given, got, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_steps_aside_in_the_callers_capture() -> None:
    encoder, given = on_gpu().capture(), pixels().cuda()
    wanted = encoder(given)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        got = encoder(given)
    graph.replay()
    assert alike(got, wanted)


@pytest.mark.gpu
@needs_gpu
def test_the_stage_takes_one() -> None:
    given = pixels(height=32, width=32)
    results = [
        LatentPreparation(each)(given, num_frames=9, height=32, width=32, seed=0).latents
        for each in (on_gpu(), on_gpu().capture())
    ]
    assert alike(results[1], results[0])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_replays_on_a_gpu(dtype: torch.dtype) -> None:
    state = synthetic_decoder_state_dict(TINY_CLIP)
    decoder = ClipDecoder.from_state_dict(state, TINY_CLIP, dtype, "cuda")
    eager, captured = decoder.stream(), decoder.stream(capture=2)
    for i, latents in enumerate(pushes(decoder, (1, 1, 1, 2, 1, 2, 1, 1))):
        stream = torch.cuda.Stream() if i % 3 == 2 else torch.cuda.current_stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), torch.inference_mode(i % 2 == 0):
            got, wanted = captured.push(latents.cuda()), eager.push(latents.cuda())
        torch.cuda.synchronize()
        assert alike(got, wanted)
    assert len(captured._graphs._entries) == 2
    assert all(entry.graph for entry in captured._graphs._entries.values())
