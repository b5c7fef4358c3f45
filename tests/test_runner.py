"""`EncoderRunner`: everything but CUDA with a stand-in for the capture, and CUDA where it is."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from encoder_cases import TINY, image
from torch import Tensor, nn

from cosmos3_fast.latents import LatentPreparation
from cosmos3_fast.runner import CudaCapturer, EncoderRunner, cudnn_benchmark
from cosmos3_fast.vae import ConditioningEncoder
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config, synthetic_state_dict

OOM = torch.OutOfMemoryError("no memory left")


class FakeGraph:
    """As a CUDA graph: fixed memory for input and output, and the weights' memory at capture."""

    def __init__(self, encoder: nn.Module, pixels: Tensor) -> None:
        self.encoder = copy.deepcopy(encoder)
        for ours, theirs in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            ours.data = theirs.data
        self.input = pixels.clone()
        self.output = self.encoder(self.input)
        self.launches = 0
        self.launch_error: Exception | None = None

    def launch(self) -> None:
        if self.launch_error is not None:
            raise self.launch_error
        self.launches += 1
        result = self.encoder(self.input)
        time.sleep(0.001)  # room for another thread to overwrite the memory
        self.output.copy_(result)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        yield


class FakeCapturer:
    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.errors: list[Exception] = []
        self.reason: str | None = None
        self.autotune: list[bool] = []

    def refusal(self, pixels: Tensor) -> str | None:
        return self.reason

    def capture(self, run: Any, pixels: Tensor, autotune: bool) -> FakeGraph:
        self.autotune.append(autotune)
        if self.errors:
            raise self.errors.pop()
        self.graphs.append(FakeGraph(run, pixels))
        return self.graphs[-1]


class Network(nn.Module):
    """A stand-in for the encoder; `errors` are raised by the next calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 1)
        self.requires_grad_(False)
        self.errors: list[Exception] = []
        self.calls = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        if self.errors:
            raise self.errors.pop()
        return self.conv(pixels).unsqueeze(2)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def capturer() -> FakeCapturer:
    return FakeCapturer()


def pixels(seed: int = 0, size: int = 4, batch: int = 1) -> Tensor:
    return image(seed, batch, size, size, torch.float32)


def make(network: nn.Module, capturer: FakeCapturer, **options: Any) -> EncoderRunner:
    return EncoderRunner(network, capturer=capturer, **{"capture_after": 0, **options})


def test_the_first_call_is_eager_the_second_captures_the_rest_replay(
    network: Network, capturer: FakeCapturer
):
    runner = EncoderRunner(network, capturer=capturer)
    for seed in range(5):
        assert torch.equal(runner(pixels(seed)), network(pixels(seed)))
    stats = runner.stats()
    assert (stats.captured, stats.replayed, stats.eager) == (1, 3, {"the shape is new": 1})
    assert stats.graphs == ((1, 3, 4, 4),)
    assert [graph.launches for graph in capturer.graphs] == [4]


def test_warm_up_captures_ahead(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer, capture_after=3, autotune=False)
    runner.warm_up(pixels())
    runner.warm_up(pixels())
    runner(pixels())
    assert len(capturer.graphs) == 1
    assert (runner.stats().captured, runner.stats().replayed) == (1, 2)
    assert capturer.autotune == [False]


def test_each_shape_and_dtype_has_its_own_graph(network: Network, capturer: FakeCapturer):
    runner = make(network.double(), capturer)
    for each in (pixels().double(), pixels(size=8).double(), pixels(batch=2).double()):
        assert torch.equal(runner(each), network(each))
    network.float()
    runner(pixels())
    assert [graph.input.shape for graph in capturer.graphs] == [
        (1, 3, 4, 4),
        (1, 3, 8, 8),
        (2, 3, 4, 4),
        (1, 3, 4, 4),
    ]
    assert capturer.graphs[-1].input.dtype == torch.float32


def test_autocast_is_part_of_the_key(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    runner(pixels())
    with torch.autocast("cpu", torch.bfloat16):
        assert runner(pixels()).dtype == torch.bfloat16
    assert runner(pixels()).dtype == torch.float32
    assert len(capturer.graphs) == 2


def test_results_are_the_caller_s(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    first = runner(pixels(0))
    kept = first.clone()
    second = runner(pixels(1))
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()
    second.zero_()
    assert torch.equal(runner(pixels(1)), network(pixels(1)))


def test_inputs_of_any_strides(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    runner(pixels())
    strided = pixels(1, size=8)[:, :, ::2, 1::2]
    assert torch.equal(runner(strided), network(strided))
    assert runner.stats().replayed == 1


def test_the_least_recently_used_graph_goes(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer, max_graphs=2)
    for size in (1, 2, 1, 3):
        runner(pixels(size=size))
    stats = runner.stats()
    assert stats.graphs == ((1, 3, 1, 1), (1, 3, 3, 3))
    assert stats.evicted == 1
    assert torch.equal(runner(pixels(5, size=2)), network(pixels(5, size=2)))
    assert runner.stats().graphs == ((1, 3, 3, 3), (1, 3, 2, 2))


def test_shapes_seen_once_evict_nothing(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer, max_graphs=1, capture_after=1)
    runner.warm_up(pixels())
    for size in range(5, 40):
        runner(pixels(size=size))
    runner(pixels())
    assert runner.stats().evicted == 0
    assert len(capturer.graphs) == 1


def test_records_of_shapes_are_bounded(
    network: Network, capturer: FakeCapturer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("cosmos3_fast.runner._MAX_SHAPES", 3)
    runner = make(network, capturer, capture_after=1)
    for size in range(1, 9):
        runner(pixels(size=size))
    assert len(runner._shapes) == 3


def test_weights_changed_in_place_are_seen(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    before = runner(pixels())
    network.conv.weight.mul_(3)
    after = runner(pixels())
    assert torch.equal(after, network(pixels()))
    assert not torch.equal(after, before)
    assert runner.stats().invalidated == 0


def replace_by_load(network: Network) -> None:
    network.load_state_dict(Network(seed=1).state_dict(), assign=True)


def replace_by_data(network: Network) -> None:
    network.conv.weight.data = torch.randn_like(network.conv.weight)


def replace_module(network: Network) -> None:
    network.conv = Network(seed=2).conv


@pytest.mark.parametrize("replace", [replace_by_load, replace_by_data, replace_module])
def test_replaced_weights_drop_every_graph(
    replace: Callable[[Network], None], network: Network, capturer: FakeCapturer
):
    runner = make(network, capturer, capture_after=1)
    runner.warm_up(pixels())
    runner.warm_up(pixels(size=8))
    stale = capturer.graphs[0]
    replace(network)
    for _ in range(3):
        assert torch.equal(runner(pixels()), network(pixels()))
    stats = runner.stats()
    assert stats.invalidated == 2
    assert stats.graphs == ((1, 3, 4, 4),)
    # Weights that move for each request are not captured each time.
    assert stats.eager == {"the shape is new": 1}
    stale.launch()
    assert not torch.equal(stale.output, network(stale.input)), "the graph was stale"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OOM, "capture ran out of memory"), (RuntimeError("not permitted"), "capture failed")],
)
def test_a_failed_capture_falls_back_and_says_so_once(
    error: Exception, reason: str, network: Network, capturer: FakeCapturer
):
    runner = make(network, capturer)
    capturer.errors.append(error)
    with pytest.warns(RuntimeWarning, match=rf"\[1, 3, 4, 4\] .*{reason}: {error}"):
        first = runner(pixels())
    assert torch.equal(first, network(pixels()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            assert torch.equal(runner(pixels(seed)), network(pixels(seed)))
    assert runner.stats().eager == {reason: 3}
    assert not runner.stats().graphs
    runner(pixels(size=8))
    assert runner.stats().graphs == ((1, 3, 8, 8),), "other shapes go on"
    runner.clear()
    runner(pixels())
    assert runner.stats().graphs == ((1, 3, 4, 4),), "and this one after clear()"


def test_a_replay_out_of_memory_drops_its_graph(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    runner(pixels())
    runner(pixels(size=8))
    capturer.graphs[0].launch_error = OOM
    with pytest.warns(RuntimeWarning, match="replay ran out of memory"):
        assert torch.equal(runner(pixels(1)), network(pixels(1)))
    assert runner.stats().graphs == ((1, 3, 8, 8),)
    assert runner.stats().eager == {"replay ran out of memory": 1}


def test_graphs_make_room_for_an_eager_call(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer, capture_after=1)
    runner.warm_up(pixels())
    network.errors.append(OOM)
    assert torch.equal(runner(pixels(size=8)), network(pixels(size=8)))
    assert runner.stats().graphs == ()
    assert runner.stats().evicted == 1
    network.errors.append(OOM)
    with pytest.raises(torch.OutOfMemoryError):
        runner(pixels(size=16))


def test_errors_of_the_encoder_are_the_caller_s(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer, capture_after=1)
    for _ in range(2):
        network.errors.append(ValueError("wrong pixels"))
        with pytest.raises(ValueError, match="wrong pixels"):
            runner(pixels())
    assert not capturer.graphs, "a call that failed brings no capture nearer"
    network.errors.append(ValueError("wrong pixels"))
    with pytest.raises(ValueError, match="wrong pixels"):
        runner.warm_up(pixels())
    assert runner.stats().captured == 0


def test_refusals_are_counted_by_reason(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    capturer.reason = "the stream is being captured"
    runner(pixels())
    capturer.reason = None
    runner(pixels()[:0])
    with torch.enable_grad():
        wanted = pixels().requires_grad_()
        runner(wanted).sum().backward()
        assert wanted.grad is not None
        network.conv.weight.requires_grad_(True)
        assert runner(pixels()).requires_grad
    with torch.no_grad():
        runner(pixels())
    runner.use_graphs = False
    runner(pixels())
    assert runner.stats().eager == {
        "the stream is being captured": 1,
        "no pixels": 1,
        "a gradient is wanted": 2,
        "graphs are off": 1,
    }
    assert runner.stats().captured == 1


def test_the_cpu_runs_eagerly():
    encoder = ConditioningEncoder.from_state_dict(synthetic_state_dict(TINY), TINY)
    runner = EncoderRunner(encoder, capture_after=0)
    frame = image(0, 1, 32, 32, torch.float32)
    assert torch.equal(runner(frame), encoder(frame))
    assert runner.stats().eager == {"pixels on cpu": 1}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_mix(mode: Any, network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    runner(pixels())
    with mode():
        assert torch.equal(runner(pixels(1)), network(pixels(1)))
    assert torch.equal(runner(pixels(2)), network(pixels(2)))


def test_compile_traces_through(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    compiled = torch.compile(
        lambda x: runner(x * 2), backend="eager", fullgraph=True, dynamic=False
    )
    assert torch.equal(compiled(pixels()), network(pixels() * 2))
    assert not capturer.graphs
    assert runner.stats().captured == 0


def test_it_stands_in_for_the_encoder(capturer: FakeCapturer):
    encoder = ConditioningEncoder.from_state_dict(synthetic_state_dict(TINY), TINY)
    runner = make(encoder, capturer)
    assert runner.z_dim == encoder.z_dim
    assert runner.dtype == torch.float32
    assert runner.to(torch.float64) is runner
    assert runner.dtype == torch.float64
    with pytest.raises(AttributeError, match="no_such_thing"):
        runner.no_such_thing  # noqa: B018
    photograph = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
    arguments = {"num_frames": 9, "height": 32, "width": 32, "seed": 1}
    wanted = LatentPreparation(encoder)(photograph, **arguments)
    for _ in range(2):
        got = LatentPreparation(runner)(photograph, **arguments)
        assert torch.equal(got.latents, wanted.latents)
    assert (runner.stats().captured, runner.stats().replayed) == (1, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_without_graphs(duplicate: Callable[[Any], Any], network: Network):
    runner = EncoderRunner(network, max_graphs=7, use_graphs=False)
    twin = duplicate(runner)
    assert twin.encoder is not network
    assert (twin.max_graphs, twin.use_graphs) == (7, False)
    assert torch.equal(twin(pixels()), network(pixels()))
    assert runner.stats().eager == {}


@pytest.mark.parametrize("options", [{"max_graphs": 0}, {"capture_after": -1}])
def test_options_out_of_range(options: dict[str, int], network: Network):
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} is {next(iter(options.values()))}"
    ):
        EncoderRunner(network, **options)


def test_threads_share_graphs(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer, max_graphs=2, capture_after=1)
    start = threading.Barrier(6)

    def work(seed: int) -> int:
        random_order = random.Random(seed)
        start.wait()
        wrong = 0
        for i in range(25):
            frame = pixels(100 * seed + i, size=random_order.choice((2, 3, 4)))
            wrong += not torch.equal(runner(frame), network(frame))
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) == 0
    stats = runner.stats()
    assert stats.captured + stats.replayed + sum(stats.eager.values()) == 150
    assert stats.captured == len(capturer.graphs)
    assert len(stats.graphs) <= 2
    assert stats.evicted == stats.captured - len(stats.graphs)


def test_a_shape_is_captured_once_by_many_threads(network: Network, capturer: FakeCapturer):
    runner = make(network, capturer)
    start = threading.Barrier(6)

    def work(_: int) -> None:
        start.wait()
        runner(pixels())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert (runner.stats().captured, runner.stats().replayed) == (1, 5)


def test_the_benchmark_switch_is_restored(monkeypatch: pytest.MonkeyPatch):
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        with contextlib.suppress(KeyError), cudnn_benchmark(True):
            assert torch.backends.cudnn.benchmark
            raise KeyError
        assert torch.backends.cudnn.benchmark is before
        with cudnn_benchmark(False):
            assert torch.backends.cudnn.benchmark is before


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CONFIG = synthetic_config({**COSMOS3_VAE_CONFIG, "base_dim": 32})


@pytest.fixture
def cuda_encoder() -> ConditioningEncoder:
    return ConditioningEncoder.from_state_dict(
        synthetic_state_dict(CONFIG), CONFIG, torch.bfloat16, "cuda"
    )


def cuda_pixels(seed: int, height: int = 128, width: int = 192) -> Tensor:
    return image(seed, 1, height, width, torch.bfloat16).cuda()


class TestCuda:
    pytestmark = gpu

    def test_replay_equals_eager_bit_for_bit(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, capture_after=0)
        results = [runner(cuda_pixels(seed)) for seed in range(4)]
        with cudnn_benchmark(True):  # the convolutions that the capture chose
            for seed, result in enumerate(results):
                assert torch.equal(result, cuda_encoder(cuda_pixels(seed)))
        assert runner.stats().replayed == 3

    def test_bytes(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, capture_after=0)
        for seed in range(3):
            torch.manual_seed(seed)
            frame = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8, device="cuda")
            result = runner(frame)
            with cudnn_benchmark(True):
                assert torch.equal(result, cuda_encoder(frame))

    def test_streams_are_ordered(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, capture_after=0)
        runner.warm_up(cuda_pixels(0))
        streams = [torch.cuda.Stream() for _ in range(3)]
        frames = [cuda_pixels(seed) for seed in range(12)]
        torch.cuda.synchronize()
        results = []
        for i, frame in enumerate(frames):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(3_000_000 * (i % 3))
                results.append(runner(frame * 1.0))
        torch.cuda.synchronize()
        with cudnn_benchmark(True):
            for frame, result in zip(frames, results, strict=True):
                assert torch.equal(result, cuda_encoder(frame))

    def test_threads_on_streams_of_their_own(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, max_graphs=2)
        sizes = ((64, 64), (64, 128), (128, 64))
        for size in sizes:
            runner.warm_up(cuda_pixels(0, *size))
        runner.clear()

        def work(seed: int) -> list[tuple[Tensor, Tensor]]:
            done = []
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(10):
                    frame = cuda_pixels(10 * seed + i, *sizes[(seed + i) % 3])
                    done.append((frame, runner(frame)))
                torch.cuda.current_stream().synchronize()
            return done

        with ThreadPoolExecutor(4) as pool:
            done = [pair for pairs in pool.map(work, range(4)) for pair in pairs]
        with cudnn_benchmark(True):
            for frame, result in done:
                torch.testing.assert_close(result, cuda_encoder(frame), rtol=0.1, atol=0.1)
        assert not any("failed" in reason for reason in runner.stats().eager)

    def test_dropped_graphs_give_their_memory_back(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, max_graphs=1, capture_after=0)

        def reserved_after(size: int) -> int:
            runner(cuda_pixels(0, size, size))
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()

        reserved_after(256)
        first = [reserved_after(size) for size in (64, 128, 256)][-1]
        again = [reserved_after(size) for size in (64, 128, 256)][-1]
        assert again <= first
        assert runner.stats().graphs == ((1, 3, 256, 256),)

    def test_a_runner_dropped_in_flight(self, cuda_encoder: ConditioningEncoder):
        frame = cuda_pixels(1)
        runner = EncoderRunner(cuda_encoder, capture_after=0)
        runner.warm_up(frame)
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            torch.cuda._sleep(50_000_000)
            result = runner(frame)
            del runner
            torch.cuda.empty_cache()
            torch.full((64 << 20,), float("nan"), device="cuda")
        torch.cuda.synchronize()
        with cudnn_benchmark(True):
            assert torch.equal(result, cuda_encoder(frame))

    def test_an_outer_capture_records_the_encoder_itself(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, capture_after=0)
        static = cuda_pixels(0)
        runner.warm_up(static)
        outer = torch.cuda.CUDAGraph()
        with torch.cuda.graph(outer):
            latents = runner(static)
        assert runner.stats().eager == {"the stream is being captured": 1}
        runner.clear()
        for seed in range(3):
            static.copy_(cuda_pixels(seed))
            outer.replay()
            with cudnn_benchmark(True):
                torch.testing.assert_close(latents, cuda_encoder(static), rtol=0.1, atol=0.1)

    def test_weights(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder, capture_after=0)
        before = runner(cuda_pixels(0))
        cuda_encoder.conv_out.weight.mul_(2)
        after = runner(cuda_pixels(0))
        assert not torch.equal(before, after)
        state = {name: value.clone() for name, value in cuda_encoder.state_dict().items()}
        state["conv_out.weight"] /= 2
        cuda_encoder.load_state_dict(state, assign=True)
        assert torch.equal(runner(cuda_pixels(0)), before)
        assert runner.stats().invalidated == 1

    def test_memory_pressure(self, cuda_encoder: ConditioningEncoder):
        frame = cuda_pixels(0, 512, 512)
        wanted = cuda_encoder(frame)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        runner = EncoderRunner(cuda_encoder, capture_after=0, autotune=False)
        used = torch.cuda.memory_reserved() + (16 << 20)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(used / total)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                with pytest.raises(torch.OutOfMemoryError):
                    runner(frame)
            assert ["ran out of memory" in str(w.message) for w in said] == [True]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        torch.testing.assert_close(runner(frame), wanted, rtol=0.1, atol=0.1)
        assert runner.stats().eager == {"capture ran out of memory": 1}

    def test_the_benchmark_switch_is_on_during_warm_up_only(self):
        seen = []

        def run(x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            return x * 2

        before = torch.backends.cudnn.benchmark
        CudaCapturer().capture(run, cuda_pixels(0), autotune=True)
        assert seen == [True] * 3
        assert torch.backends.cudnn.benchmark is before

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_another_device_than_the_current_one(self, cuda_encoder: ConditioningEncoder):
        runner = EncoderRunner(cuda_encoder.to("cuda:1"), capture_after=0)
        frame = cuda_pixels(0).to("cuda:1")
        with torch.cuda.device(0):
            results = [runner(frame), runner(frame)]
        assert all(result.device == frame.device for result in results)
        assert torch.equal(*results)
