"""CUDA graphs that a network keeps of its calls, and a stream of a clip of its steps.

One frame through an encoder is 61 launches, which take the host longer than the device. A graph is
one. It reads the addresses that were captured, so what a call depends on is its key; and cuDNN's
plans are chosen before the capture, in the thread that captures, since they are kept by thread.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosmos3_fast.arguments import positive_int
from cosmos3_fast.ops.registry import unobserved
from cosmos3_fast.vae.networks.base import FoldedNetwork

if TYPE_CHECKING:
    from typing import Self

Call = Callable[[Tensor], Tensor]

_capturing = threading.Lock()
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """For captures alone: torch's own streams are shared, and what another thread would launch on
    this one meanwhile would become part of the graph."""
    if device not in _streams:
        handle = ctypes.c_void_p()
        status = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(handle), 1)  # non-blocking
        if status or handle.value is None:
            raise RuntimeError(f"cuStreamCreate must return 0, got {status}")
        _streams[device] = torch.cuda.ExternalStream(handle.value, device)
    return _streams[device]


@contextmanager
def unchanged(state: Sequence[Tensor]) -> Iterator[None]:
    """On the way out, `state` has the values that it had, also after an error."""
    before = [each.clone() for each in state]
    try:
        yield
    finally:
        for each, values in zip(state, before, strict=True):
            each.copy_(values)


class CudaGraph:
    """A graph of `run(given)`, replayed on the current stream of any thread, one after the other.

    Args:
        run: what is captured, after one call that is not.
        given: its argument; another one must have the same shape, strides, dtype and device.
        state: what `run` writes besides, and a replay too.
    """

    def __init__(self, run: Call, given: Tensor, state: Sequence[Tensor] = ()) -> None:
        # Outside of inference mode: to its tensors only inference mode may write.
        with _capturing, torch.cuda.device(given.device), torch.inference_mode(False):
            self._given = given.clone()  # which gives this thread the context for what follows
            current, own = torch.cuda.current_stream(), _own_stream(given.device)
            own.wait_stream(current)
            with torch.cuda.stream(own), torch.no_grad():
                with unchanged(state):
                    run(self._given)
                self._graph = torch.cuda.CUDAGraph()
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._result = run(self._given)
                finally:
                    self._graph.capture_end()
            current.wait_stream(own)
            self._done = current.record_event()

    @staticmethod
    def serves(given: Tensor) -> bool:
        """Whether a call may capture or replay here: on a GPU, in no capture of the caller's."""
        if given.device.type != "cuda":
            return False
        with torch.cuda.device(given.device):
            return not torch.cuda.is_current_stream_capturing()

    def __call__(self, given: Tensor) -> Tensor:
        with torch.cuda.device(given.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            with torch.no_grad():
                self._given.copy_(given)
            self._given.record_stream(stream)
            self._graph.replay()
            result = self._result.clone()
            self._done.record(stream)
            return result


class Graphs:
    """The graphs of one network; a copy or a pickle of it starts with none.

    Args:
        keep: at most so many, the least recently used first out.
        graph: captures one; a test's takes its place.
    """

    def __init__(self, keep: int, graph: Any = CudaGraph) -> None:
        self.keep, self._graph = keep, graph
        self._lock = threading.Lock()
        # By key a lock and a graph: None: not yet; False: it could not be captured.
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._weights: list[Any] = []

    def __reduce__(self) -> Any:
        return Graphs, (self.keep, self._graph)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def call(
        self,
        name: str,
        run: Call,
        given: Tensor,
        tensors: list[Tensor],
        *options: Any,
        state: Sequence[Tensor] = (),
    ) -> Any:
        """`run(given)`, replayed where it can be.

        Args:
            name: of the network, for a warning.
            run: what a graph is made of.
            given: its argument.
            tensors: all others that it reads.
            options: what else it depends on.
            state: what it reads and writes in place.
        """
        if not self._graph.serves(given):
            return run(given)
        weights = _versions(tensors)
        places = tuple(each.data_ptr() for each in state)
        layout = given.shape, given.stride(), given.dtype, given.device
        key = options, layout, places, _settings()
        with self._lock:
            if weights != self._weights:
                self._entries.clear()
                self._weights = weights
            new = SimpleNamespace(lock=threading.Lock(), graph=None)
            entry = self._entries.setdefault(key, new)
            self._entries.move_to_end(key)
            while len(self._entries) > self.keep:
                self._entries.popitem(last=False)
        with entry.lock:
            if entry.graph is None:
                try:
                    entry.graph = self._graph(run, given, state)
                except RuntimeError as error:  # out of memory, or of what cannot be captured
                    entry.graph = False
                    warnings.warn(
                        f"{name}: calls with {list(given.shape)}, {given.dtype}, "
                        f"are not captured but launched one by one, got {error}",
                        stacklevel=2,
                    )
            if entry.graph:
                return entry.graph(given)
        return run(given)


def _versions(tensors: list[Tensor]) -> list[Any]:
    """Where tensors lie and how often they were written to."""
    try:
        return [(x.data_ptr(), x._version) for x in tensors]
    except RuntimeError:  # of inference tensors, which have no version
        return [x.data_ptr() for x in tensors]


def _settings() -> Hashable:
    """Those of torch that choose what a convolution or a product computes with."""
    cudnn: Any = torch.backends.cudnn
    products = torch.backends.cuda.matmul
    return (
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision),
        *(products.fp32_precision, torch.are_deterministic_algorithms_enabled()),
    )


class Captures(FoldedNetwork):
    """What a network for single frames has besides: graphs of its calls, where it is asked to."""

    _graphs: Graphs | None = None

    def capture(self, keep: int = 4) -> Self:
        """From now on, replay calls as CUDA graphs, which takes the host out of their time.

        The first call of a shape, layout and dtype captures, which takes a few times as long; in
        its memory the graph holds all activations of one call until it is dropped. Results are the
        caller's own, calls from several threads and streams take turns on a graph, and changed
        weights or settings of torch are noticed. A call runs as without graphs on a CPU, under
        `torch.compile` or the caller's own capture, with gradients or hooks of inner modules; and,
        with a warning, where a capture fails, as for want of memory.

        Args:
            keep: graphs held at most, the least recently used dropped first.

        Returns:
            The network. Copies and pickles of it capture anew.

        Raises:
            ValueError: `keep` is no positive integer.
        """
        self._graphs = Graphs(positive_int("keep", keep))
        return self

    def release(self) -> Self:
        """Drop the graphs and capture no more."""
        self._graphs = None
        return self

    def _replayed(self, run: Call, given: Tensor, *options: Hashable) -> Tensor:
        tensors = None if torch.compiler.is_compiling() else self._read(given)
        if tensors is None:
            return run(given)
        with unobserved(given.device):
            if self._graphs is None:
                return run(given)
            name = type(self).__name__
            result: Tensor = self._graphs.call(name, run, given, tensors, *options)
            return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._graphs is not None:
            self._graphs.clear()
        return super()._apply(fn, recurse)
