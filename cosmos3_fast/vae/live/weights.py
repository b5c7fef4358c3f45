"""A network that follows the weights of a live VAE: folded at its first use, and again when due."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cosmos3_fast.vae.live.content import Content
from cosmos3_fast.vae.live.obstacles import Survey, same_traces
from cosmos3_fast.vae.topology import UnsupportedVAEError

Fold = Callable[[Any, torch.device], Any]
"""`fold(vae, device)`: a network."""
Traces = list[tuple[Any, Any, Any]]

# What torch and the libraries below it say where the exception's class does not.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


@dataclass(frozen=True)
class Snapshot:
    """What one call works with, whole and unchanging, whatever happens to the VAE meanwhile.

    Attributes:
        network: None where it cannot be folded.
        traces: of what it was folded from, with weak references.
        refusal: why there is no network, or it is not to be used.
        content: of the weights it was folded from.
        equal: the latest traces that were found equal.
    """

    network: Any
    traces: Traces
    refusal: str | None = None
    content: Content | None = None
    equal: list[Traces] = field(default_factory=list)


class Following:
    """The network of a live VAE's part, up to date with the part's weights.

    Safe for threads: each call takes one `Snapshot` and stays with it. Nothing is folded before
    the first use. Nothing refers back to who folds, so that memory is free as soon as it is unused.
    """

    def __init__(self) -> None:
        self._folding = threading.RLock()
        self._publishing = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._forgotten = 0

    def forget(self) -> None:
        """Fold again at the next use; calls that run end with what they began with."""
        with self._publishing:
            self._forgotten += 1
            self._snapshot = None

    def refuse(self, snapshot: Snapshot, reason: str) -> None:
        """Use no network of the snapshot's weights any more."""
        with self._publishing:
            if self._snapshot is snapshot:
                self._snapshot = replace(snapshot, refusal=reason)

    def snapshot(
        self,
        fold: Fold,
        vae: Any,
        seen: Survey,
        device: torch.device,
        stale: Callable[[], None] = lambda: None,
    ) -> Snapshot:
        """The network of the weights that were seen.

        Args:
            fold: gives the network, or raises UnsupportedVAEError.
            vae: what is folded.
            seen: of the part.
            device: of the network.
            stale: called where the weights hold other values than were folded, though nothing else
                shows it.

        Raises:
            UnsupportedVAEError: the part cannot be folded as it is.
            MemoryError, RuntimeError: memory does not suffice.
        """
        now = self._snapshot
        serves = now is not None and _serves(now, seen, device)
        content = now.content if serves and now is not None else None
        if content is not None and content.differs(seen.weights, seen.addresses):
            self.forget()
            stale()
            serves = False
        if not serves or now is None:
            now = None  # nothing here keeps it while another one is made
            with self._folding:
                now = self._renewed(fold, vae, seen, device)
        if now.refusal is not None:
            raise UnsupportedVAEError(now.refusal)
        return now

    def _renewed(self, fold: Fold, vae: Any, seen: Survey, device: torch.device) -> Snapshot:
        forgotten, now = self._forgotten, self._snapshot
        if now is not None and _serves(now, seen, device):  # another thread was here
            return now
        if now is not None and same_traces(now.traces, seen.traces):
            # Another thread may be using the one that is there.
            now = replace(now, network=copy.deepcopy(now.network).to(device))
        else:
            now = self._snapshot = None
            now = _folded(fold, vae, seen, device)
        with self._publishing:
            # What was forgotten meanwhile may be of weights that were changed during the fold.
            if forgotten == self._forgotten:
                self._snapshot = now
        return now


def _folded(fold: Fold, vae: Any, seen: Survey, device: torch.device) -> Snapshot:
    if device.type != "cpu":
        # An offload's copy of the weights to the host may still be under way.
        torch.get_device_module(device).synchronize(device)
    try:
        # Whatever the surroundings are, these are ordinary tensors where they should be.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device("cpu"),
        ):
            content = Content(seen.weights)
            return Snapshot(fold(vae, device), seen.traces, content=content)
    except Exception as error:
        if is_out_of_memory(error):  # which says nothing about these weights
            raise
        return Snapshot(None, seen.traces, str(error) or repr(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory could not be had, of the host or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def _serves(snapshot: Snapshot, seen: Survey, device: torch.device) -> bool:
    # Of equal calls the traces are one list: they are compared once.
    if not any(seen.traces is equal for equal in snapshot.equal):
        if not same_traces(snapshot.traces, seen.traces):
            return False
        snapshot.equal[:] = [seen.traces]
    return snapshot.refusal is not None or snapshot.network.device == device
