"""`EncoderRunner`: the conditioning encoder behind CUDA graphs, for serving.

One frame is a few milliseconds of GPU time in about a hundred launches, so that the launches can
cost more than the work. A graph replays them with one call. The blend that follows stays outside:
it is one launch already, and in a graph its noise and result would each be copied once more.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]
# (shape, dtype, device, autocast dtype or None) of the pixels; (address, dtype) of each weight.
_Key = tuple[torch.Size, torch.dtype, torch.device, torch.dtype | None]
_Weights = tuple[tuple[int, torch.dtype], ...]

# Graph captures and changes of cuDNN's process-wide switch, of every runner.
_CAPTURE = threading.Lock()
# Records of shapes seen, which are small; the graphs have a bound of their own.
_MAX_SHAPES = 1024


class Graph(Protocol):
    """A captured call: `launch()` reads `input` and writes `output`, always the same memory."""

    input: Tensor
    output: Tensor

    def launch(self) -> None:
        """Enqueue the captured work."""

    def ordered(self) -> AbstractContextManager[None]:
        """Whatever is enqueued inside comes after what earlier `ordered()` blocks enqueued."""


class Capturer(Protocol):
    """What makes graphs: CUDA's, or a stand-in that tests can run anywhere."""

    def refusal(self, pixels: Tensor) -> str | None:
        """Why a call on `pixels` can be neither captured nor replayed now; None if it can."""

    def capture(self, run: Run, pixels: Tensor, autotune: bool) -> Graph:
        """Warm `run` up on memory shaped like `pixels` and record it."""


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """`torch.backends.cudnn.benchmark`, process-wide as it is, on inside the block if `enabled`."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Pool:
    """Memory for captures on `stream`; `anchor` keeps its handle valid while no graph uses it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.anchor = torch.cuda.CUDAGraph()
        with _capturing(self.anchor, stream, None):
            torch.zeros(1, device=stream.device)


class _Device:
    """What all graphs of one device share: the memory of their activations and a capture stream.

    That stream's cuBLAS workspace is in all of them, too, so that no two may run at once: `done`
    is recorded behind each replay and awaited before the next, whose enqueueing `lock` keeps whole.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(device)
        with torch.cuda.device(device):
            self.done = torch.cuda.Event()
        self._pool: Callable[[], _Pool | None] = lambda: None

    def pool(self) -> _Pool:
        """The pool of the graphs that are alive, or a new one."""
        pool = self._pool()
        if pool is None:
            pool = _Pool(self.stream)
            self._pool = weakref.ref(pool)
        return pool


_device = functools.cache(_Device)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> Iterator[None]:
    # torch.cuda.graph enters the stream too, but leaves it current if the capture fails. Other
    # threads may go on allocating meanwhile.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        yield


class _CudaGraph:
    def __init__(self, run: Run, pixels: Tensor) -> None:
        self.shared = _device(pixels.device)
        self.graph = torch.cuda.CUDAGraph()
        self.pool = self.shared.pool()
        self.input = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
        self.input.copy_(pixels)
        # Tunes and compiles; the second time allocates what a settled run allocates.
        for _ in range(2):
            run(self.input)
        with _capturing(self.graph, self.shared.stream, self.pool.anchor.pool()):
            self.output = run(self.input)
        # The memory must outlive a replay that is still running when the last reference goes.
        weakref.finalize(self, self.shared.done.synchronize).atexit = False

    def launch(self) -> None:
        self.graph.replay()

    @contextmanager
    def ordered(self) -> Iterator[None]:
        with self.shared.lock, torch.cuda.device(self.input.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.shared.done)
            try:
                yield
            finally:
                self.shared.done.record(stream)


class CudaCapturer:
    """CUDA graphs that share one memory pool per device and never overlap on it."""

    def refusal(self, pixels: Tensor) -> str | None:
        if pixels.device.type != "cuda":
            return f"pixels on {pixels.device.type}"
        with torch.cuda.device(pixels.device):
            if torch.cuda.is_current_stream_capturing():
                return "the stream is being captured"
        return None

    def capture(self, run: Run, pixels: Tensor, autotune: bool) -> Graph:
        # Tensors made in inference mode could not be written outside it later.
        with (
            torch.cuda.device(pixels.device),
            torch.inference_mode(False),
            torch.no_grad(),
            cudnn_benchmark(autotune),
        ):
            return _CudaGraph(run, pixels)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers. `Module.parameters()` takes four times as long, for each request."""
    modules: list[nn.Module | None] = [module]
    while modules:
        if (each := modules.pop()) is None:
            continue
        modules.extend(each._modules.values())
        for tensors in (each._parameters, each._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    yield tensor


@dataclass
class _Shape:
    """What is known of the calls of one key; `lock` orders those that use the graph."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    weights: _Weights | None = None
    calls: int = 0
    graph: Graph | None = None
    failure: str | None = None


@dataclass(frozen=True)
class RunnerStats:
    """What served the calls of an `EncoderRunner` so far.

    Attributes:
        captured: calls that captured a graph and were served by its first replay.
        replayed: calls served by a graph captured before.
        eager: calls served without a graph, by reason.
        evicted: graphs dropped for newer ones.
        invalidated: graphs dropped because the weights they pointed to had been replaced.
        graphs: shapes of the pixels that have a graph now, least recently used first.
    """

    captured: int
    replayed: int
    eager: dict[str, int]
    evicted: int
    invalidated: int
    graphs: tuple[tuple[int, ...], ...]


class EncoderRunner:
    """A `ConditioningEncoder` (or any module from pixels to latents) served by CUDA graphs.

    Calls and attributes are the encoder's: a `LatentPreparation` takes either. A graph belongs to
    one shape and dtype of the pixels on one device. A shape's first `capture_after` calls run
    eagerly, the next one tunes cuDNN's convolutions for it and captures, and all later ones
    replay; `warm_up` does that ahead of the first request.

    Runs eagerly, and counts why: on the CPU, under `torch.compile`, inside another graph's
    capture (which then records the encoder's own launches), where a gradient is wanted, and for a
    shape whose capture failed, most likely for want of memory (one RuntimeWarning; `clear` allows
    it to be tried again). A call that runs out of memory while graphs hold some drops them all
    and tries once more.

    Results belong to the caller; no later call writes to them. Any thread may call, on any
    stream: a replay is enqueued on the caller's current stream behind the previous replay.
    Weights changed in place are seen by the next replay. Weights replaced (`.to`,
    `load_state_dict(assign=True)`) are noticed by address and dtype, and their shapes start over.
    Global settings (TF32, determinism) and module hooks count as they are at capture. While one
    thread captures, PyTorch refuses others random numbers from the device's default generator:
    `warm_up` first, or give each request a generator of its own.

    The graphs of a device share the memory of their activations, which is that of the largest one
    and goes with the last one; their replays never overlap. Tuned convolutions may round
    differently from the untuned ones that served the first calls.

    Args:
        encoder: anything like `ConditioningEncoder`; its parameters and buffers are the weights.
        use_graphs: False: everything runs eagerly.
        max_graphs: graphs kept, at least 1; the least recently used goes first.
        capture_after: eager calls of a shape with the same weights before it is captured, so that
            a shape seen once, or weights that move for each request, cost no capture.
        autotune: `torch.backends.cudnn.benchmark` during warm-up and capture; restored afterwards.
        capturer: what captures; default: `CudaCapturer()`.

    Raises:
        ValueError: `max_graphs` below 1 or `capture_after` below 0.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        use_graphs: bool = True,
        max_graphs: int = 4,
        capture_after: int = 1,
        autotune: bool = True,
        capturer: Capturer | None = None,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs is {max_graphs}, wanted at least 1")
        if capture_after < 0:
            raise ValueError(f"capture_after is {capture_after}, wanted at least 0")
        self.encoder = encoder
        self.use_graphs = use_graphs
        self.max_graphs = max_graphs
        self.capture_after = capture_after
        self.autotune = autotune
        self._capturer = capturer or CudaCapturer()
        self._lock = threading.Lock()
        self._shapes: OrderedDict[_Key, _Shape] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._eager: Counter[str] = Counter()

    def __call__(self, pixels: Tensor) -> Tensor:
        """`encoder(pixels)`, by the graph of its shape where there is one.

        Raises whatever the encoder raises.
        """
        # Before anything that a tracer would have to follow.
        if torch.compiler.is_compiling():
            return self.encoder(pixels)
        return self._serve(pixels, self.capture_after)

    def warm_up(self, pixels: Tensor) -> None:
        """Tune and capture for the shape, dtype and device of `pixels`, unless done already."""
        self._serve(pixels, 0)

    def stats(self) -> RunnerStats:
        """What served the calls so far (`warm_up` counts as one)."""
        with self._lock:
            return RunnerStats(
                captured=self._counts["captured"],
                replayed=self._counts["replayed"],
                eager=dict(self._eager),
                evicted=self._counts["evicted"],
                invalidated=self._counts["invalidated"],
                graphs=tuple(tuple(key[0]) for key in self._captured()),
            )

    def clear(self) -> None:
        """Drop every graph, and what is known of shapes whose capture failed."""
        with self._lock:
            self._shapes.clear()

    def to(self, *args: Any, **kwargs: Any) -> EncoderRunner:
        """`encoder.to(...)`, as `torch.nn.Module.to`; returns the runner."""
        self.encoder.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "encoder" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.encoder, name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy starts without graphs.
        options = ("use_graphs", "max_graphs", "capture_after", "autotune")
        make = functools.partial(
            EncoderRunner,
            capturer=self._capturer,
            **{name: getattr(self, name) for name in options},
        )
        return make, (self.encoder,)

    def _serve(self, pixels: Tensor, capture_after: int) -> Tensor:
        if (reason := self._refusal(pixels)) is not None:
            return self._run_eagerly(pixels, reason)
        weights = tuple((tensor.data_ptr(), tensor.dtype) for tensor in _tensors(self.encoder))
        shape = self._shape(self._key(pixels), weights)
        with shape.lock:
            if shape.weights != weights:
                shape.weights, shape.calls = weights, 0
            graph, reason, served = shape.graph, shape.failure, "replayed"
            if graph is None and reason is None and shape.calls < capture_after:
                reason = "the shape is new"
            if graph is None and reason is None:
                graph, served = self._capture(shape, pixels), "captured"
                reason = shape.failure
            if graph is not None:
                try:
                    with graph.ordered(), torch.no_grad():
                        graph.input.copy_(pixels)
                        graph.launch()
                        result = graph.output.clone()
                except torch.OutOfMemoryError as error:
                    shape.graph = graph = None
                    reason = shape.failure = self._say_failed(pixels, "replay", error)
                else:
                    self._count(served)
                    return result
        assert reason is not None
        result = self._run_eagerly(pixels, reason)
        # Only calls that the encoder accepted bring a capture nearer.
        shape.calls += 1
        return result

    def _refusal(self, pixels: Tensor) -> str | None:
        if not self.use_graphs:
            return "graphs are off"
        if type(pixels) is not Tensor or torch.jit.is_tracing():
            return "not a plain tensor"
        if torch.is_grad_enabled() and (
            pixels.requires_grad or any(tensor.requires_grad for tensor in _tensors(self.encoder))
        ):
            return "a gradient is wanted"
        if pixels.numel() == 0:
            return "no pixels"
        return self._capturer.refusal(pixels)

    def _key(self, pixels: Tensor) -> _Key:
        kind = pixels.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return pixels.shape, pixels.dtype, pixels.device, autocast

    def _shape(self, key: _Key, weights: _Weights) -> _Shape:
        with self._lock:
            shape = self._shapes.setdefault(key, _Shape())
            self._shapes.move_to_end(key)
            if len(self._shapes) > _MAX_SHAPES:
                self._shapes.popitem(last=False)
            # All of them at once: what they point to may have been freed.
            for other in self._captured().values():
                if other.weights != weights:
                    other.graph = None
                    self._counts["invalidated"] += 1
            return shape

    def _captured(self) -> dict[_Key, _Shape]:
        return {key: shape for key, shape in self._shapes.items() if shape.graph is not None}

    def _capture(self, shape: _Shape, pixels: Tensor) -> Graph | None:
        with _CAPTURE:
            with self._lock:
                captured = self._captured()
                for key in list(captured)[: len(captured) - self.max_graphs + 1]:
                    captured[key].graph = None
                    self._counts["evicted"] += 1
            try:
                shape.graph = self._capturer.capture(self.encoder, pixels, self.autotune)
            except RuntimeError as error:
                shape.failure = self._say_failed(pixels, "capture", error)
            return shape.graph

    def _say_failed(self, pixels: Tensor, what: str, error: Exception) -> str:
        # Ending the capture it broke may raise an error of its own.
        causes = (error, error.__context__)
        out_of_memory = any(isinstance(cause, torch.OutOfMemoryError) for cause in causes)
        reason = f"{what} {'ran out of memory' if out_of_memory else 'failed'}"
        warnings.warn(
            f"EncoderRunner: pixels {list(pixels.shape)} {pixels.dtype} run without a CUDA graph "
            f"until clear() is called: {reason}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason

    def _run_eagerly(self, pixels: Tensor, reason: str) -> Tensor:
        try:
            result = self.encoder(pixels)
        except torch.OutOfMemoryError:
            with self._lock:
                captured = self._captured()
                for shape in captured.values():
                    shape.graph = None
                    self._counts["evicted"] += 1
            if not captured:
                raise
            captured.clear()
            result = None
        if result is None:
            # Outside the handler, whose traceback keeps the failed call's activations alive.
            result = self.encoder(pixels)
        with self._lock:
            self._eager[reason] += 1
        return result

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1
