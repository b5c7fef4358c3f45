"""Whether weights still hold what was folded, by a sample of their values.

Versions and addresses do not show every change: fused optimizers, collectives and writes by pointer
leave none. So each call looks at a few weights, in turn: on the CPU at once, on a device by a flag
that is read at a later call, so that nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# At least, where a weight has as many; less than twice as many.
_VALUES = 64
_WEIGHTS_A_CALL = 2


def sample(tensor: Tensor) -> Tensor:
    """Up to 127 values, spread over the memory of the tensor: a view where that is dense."""
    total = tensor.numel()
    step = max(1, total // _VALUES) | 1
    if not (tensor.is_contiguous() or _is_dense(tensor)):
        return tensor.detach().reshape(-1)[::step]
    count = (total - 1) // step + 1 if total else 0
    return tensor.detach().as_strided((count,), (step,), tensor.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return extent == tensor.numel()


class Content:
    """Samples of some weights at one time, and what is known of them since.

    Args:
        weights: tensors with values.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        # Outside of any graph or mode that the first call runs in.
        with torch.inference_mode(False), torch.no_grad():
            self._samples = [sample(weight).clone() for weight in weights]
        self._addresses = [weight.data_ptr() for weight in weights]
        self._next = 0
        self._flags: list[tuple[Tensor, Any]] = []
        self._looking = threading.Lock()

    def differs(self, weights: Sequence[Tensor], addresses: list[int] | None = None) -> bool:
        """Whether a weight is seen to hold other values than at first.

        All that have moved in memory are looked at, and the next few of the others.

        Args:
            weights: the same as at first.
            addresses: theirs, where they are known.
        """
        if not weights or not self._looking.acquire(blocking=False):
            return False  # another thread looks
        try:
            return self._differs(weights, addresses)
        finally:
            self._looking.release()

    def _differs(self, weights: Sequence[Tensor], addresses: list[int] | None) -> bool:
        if len(weights) != len(self._samples) or _is_capturing(weights[0]):
            return False
        addresses = addresses or [weight.data_ptr() for weight in weights]
        if addresses is not self._addresses and addresses != self._addresses:
            for i, weight in enumerate(weights):
                if addresses[i] != self._addresses[i] and self._is_other(i, weight):
                    return True
        self._addresses = addresses
        for _ in range(min(_WEIGHTS_A_CALL, len(weights))):
            i = self._next = (self._next + 1) % len(weights)
            if weights[i].device.type == "cpu":
                if self._is_other(i, weights[i]):
                    return True
            else:
                self._ask(i, weights[i])
        return self._was_other()

    def _is_other(self, i: int, weight: Tensor) -> bool:
        if weight.dtype != self._samples[i].dtype:
            return True
        if weight.device != self._samples[i].device:
            self._samples[i] = self._samples[i].to(weight.device)
        return not torch.equal(sample(weight), self._samples[i])

    def _ask(self, i: int, weight: Tensor) -> None:
        """A flag on its way from the device; a few at most, should nobody get to read them."""
        if len(self._flags) >= 8 or weight.device != self._samples[i].device:
            return
        flag = (sample(weight) != self._samples[i]).any()
        with contextlib.suppress(RuntimeError):  # no pinned memory: it would wait
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = torch.Event(weight.device.type)
            event.record()
            self._flags.append((host, event))

    def _was_other(self) -> bool:
        """Whether a flag that has arrived says so."""
        while self._flags and self._flags[0][1].query():
            host, _ = self._flags.pop(0)
            if bool(host):
                self._flags.clear()
                return True
        return False


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
