"""The seam: a live VAE whose `encode` and `decode` take short cuts and are otherwise its own.

    accelerate(vae, mode="fast")
    restore(vae)

The class's `encode` and `decode` are wrapped once per process. A wrapper does nothing for an
object that does not carry an `Acceleration` in its `__dict__`; that object has no reference back,
and copies and pickles to an empty one of the same mode, which folds for itself. So the VAE can be
copied, pickled, saved, dropped and inspected as before.

Each call reads the `Acceleration` once and one snapshot of a network from it, so that `refresh`,
`restore` and a change of mode beside it do not reach it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.frames import TEMPORAL_FACTOR
from cosmos3_fast.vae.live.announce import announced
from cosmos3_fast.vae.live.calls import install
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.exact import as_in_clip
from cosmos3_fast.vae.live.obstacles import why_not_shortened
from cosmos3_fast.vae.live.parts import DecoderPart, EncoderPart
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.paths import (
    Asked,
    Choice,
    Encoding,
    ask,
    choose,
    ways_to_decode,
    ways_to_encode,
)
from cosmos3_fast.vae.live.returns import EncodeReturns, Finished
from cosmos3_fast.vae.networks.decoder import ClipDecoder, FrameDecoder
from cosmos3_fast.vae.topology import EncoderTopology, UnsupportedVAEError

logger = logging.getLogger(__name__)

VAE = TypeVar("VAE")

# Own code of a VAE keeps its caches on the object: one call at a time, whatever the mode becomes.
_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps, or the module itself."""
    return getattr(module, "_orig_mod", module)


def accelerate(
    vae: VAE,
    mode: str = "fast",
    engine: Engine | None = None,
    *,
    clips: bool | None = None,
    products: str | torch.dtype | None = None,
    frozen: bool | None = None,
    graphs: bool | None = None,
) -> VAE:
    """Let a VAE of the Wan family encode and decode by 2-D networks.

    With "fast", `encode` and `decode` of one frame go through networks folded from the VAE's
    weights, and those of clips through networks that are made at the first clip; their results have
    the VAE's own types, on its own scale, mean and log-variance. With "exact", all of it stays the
    VAE's own code, on fewer frames where `wanted_frames` says that fewer are used. Anything else is
    the VAE's own code, bit for bit.

    Changes of weights and of the modules' settings are followed from the next call on. Those that
    leave no trace are found within some calls, and said; `refresh` has the list. Forward hooks,
    parametrisations, compiled parts, tiling at sizes that exceed a tile, autocast, a gradient that
    is wanted, weights that are offloaded or stored in 8 bits, memory that does not suffice for a
    clip: the VAE's own code runs, and one warning says why. Calls inside `torch.compile` are the
    VAE's own.

    Args:
        vae: diffusers' AutoencoderKLWan or AutoencoderKLQwenImage, or another with the same
            structure. Changed in place; folding neither moves it nor draws random numbers.
        mode: "fast", "exact" or "off" (as `restore`). Called again it changes the mode.
        engine: what surrounds the VAE; None: as before, and at first nothing.
        clips: whether clips too go through folded networks; None: as before, and at first as the
            engine has it, True for a VAE by itself. They cost memory: `ClipDecoder` has the sizes.
        products: torch.float16 or "float16": dtype of the products along time of clips, for a
            float32 VAE, which on a GPU halves their time (`ClipDecoder` says what it costs); None:
            as before, and at first the VAE's dtype (in bfloat16 they are float16 in any case).
        frozen: True: the weights stay as they are though they require gradients and the VAE is in
            training mode or they have some, where otherwise the VAE's own code runs. None: as
            before, and at first False.
        graphs: True: on a GPU, calls of one frame are replayed as CUDA graphs
            (`FrameEncoder.capture`), which takes the host out of their time and holds the
            activations of a call for each shape. None: as before, and at first False.

    Returns:
        `vae` itself.

    Raises:
        ValueError: an unknown mode, or products of another dtype.
        TypeError: `clips`, `frozen` or `graphs` is neither a bool nor None.
        UnsupportedVAEError: (a ValueError) the VAE is none of this family.
    """
    if choose(mode, clips, products, frozen=frozen, graphs=graphs).mode == "off":
        return restore(vae)
    plain = uncompiled(vae)
    if not isinstance(plain, nn.Module) or not callable(getattr(plain, "encode", None)):
        raise UnsupportedVAEError(f"vae must be a VAE with encode, got {type(plain).__name__}")
    if not isinstance(getattr(plain, "encoder", None), nn.Module):
        raise UnsupportedVAEError(f"vae must have an encoder, got {type(plain).__name__} without")
    if not hasattr(plain, "config"):
        raise UnsupportedVAEError(f"vae must have a config, got {type(plain).__name__} without")
    before = _state(plain)
    engine = engine or (before.engine if before else Engine())
    earlier = before.choice if before else None
    choice = choose(mode, clips, products, earlier, engine.clips, frozen, graphs)
    state = Acceleration(choice, type(plain), engine)
    state.own_code = _locks.setdefault(plain, (before or state).own_code)
    topology = state.topology(plain)
    if choice.mode == "fast":
        for part in (state.encoder, state.decoder):
            part.prepare(plain)
    with contextlib.suppress(UnsupportedVAEError):  # it is tried again, and told, where it is used
        state.encoder.learn(plain, topology)
    for name in ("encode", "decode"):
        if name in vars(plain):
            state.tell(f"vae.{name} was replaced on this object, and runs as it is")
    vars(plain)[ATTRIBUTE] = state
    return vae


def restore(vae: VAE) -> VAE:
    """Undo `accelerate`; a VAE that is not accelerated is left as it is.

    Returns:
        `vae` itself.
    """
    getattr(uncompiled(vae), "__dict__", {}).pop(ATTRIBUTE, None)
    return vae


def refresh(vae: VAE) -> VAE:
    """Fold again at the next use: for weights that were changed without a trace.

    What torch counts (in-place operations, `load_state_dict`, other tensors in their place) and
    weights that have moved in memory are seen at the next call without it. Not counted are fused
    optimizers, collectives as `torch.distributed.broadcast`, writes through `.data` or by pointer
    (8-bit optimizers, kernels of one's own), in-place operations on tensors made in inference
    mode. Each call compares samples of two weights, so that a change of all weights is found at
    the next call on the CPU and the one after on a device; that of a single one within half as many
    calls of the network (for frames, or for clips) as there are weights. A change of so
    few values that no sample has one is never seen: 64 to 127 of a large weight are in the sample.

    Returns:
        `vae` itself.
    """
    state = _state(uncompiled(vae))
    if state is not None:
        state.refresh()
    return vae


def is_accelerated(vae: Any) -> bool:
    """Whether `accelerate` is in force."""
    return _state(uncompiled(vae)) is not None


def engine_of(vae: Any) -> Engine | None:
    """What an accelerated VAE was accelerated with; None where it is not accelerated."""
    state = _state(uncompiled(vae))
    return state.engine if state else None


def choice_of(vae: Any) -> Choice | None:
    """What was chosen for an accelerated VAE; None where it is not accelerated."""
    state = _state(uncompiled(vae))
    return state.choice if state else None


def last_encoding(vae: Any) -> Encoding | None:
    """How an accelerated VAE encoded latest; None before the first time."""
    state = _state(uncompiled(vae))
    return state.last if state else None


def folded_decoder(
    vae: Any, frames: int, device: torch.device
) -> FrameDecoder | ClipDecoder | None:
    """What decodes so many latent frames of an accelerated VAE, folded where it is not yet.

    Args:
        vae: accelerated or not.
        frames: 1, or more for clips.
        device: of the network.

    Returns:
        None where the VAE is not accelerated, or decodes them by itself.

    Raises:
        UnsupportedVAEError: the decoder cannot be folded as it is.
        MemoryError, RuntimeError: memory does not suffice.
    """
    plain = uncompiled(vae)
    state = _state(plain)
    if state is None:
        return None
    if "fast" not in ways_to_decode(state.choice.mode, frames, state.choice.clips):
        return None
    return state.decoder.network(plain, frames, device)


def _state(vae: Any) -> Acceleration | None:
    return getattr(vae, "__dict__", {}).get(ATTRIBUTE)


class _Attempt(NamedTuple):
    """Of one way of encoding: parameters of at least the wanted frames and the form of the result,
    or why there are none."""

    parameters: Tensor | None
    returns: EncodeReturns | None
    reason: str | None = None


_FAILED = _Attempt(None, None)


class Acceleration:
    """What an accelerated VAE carries.

    Args:
        choice: of the user.
        vae_class: whose methods are wrapped.
        engine: what surrounds the VAE.

    Attributes:
        encoder, decoder: the parts.
        tell: warns, once per message.
        own_code: held while the VAE's own `encode` or `decode` runs.
        last: how the VAE encoded latest.
    """

    def __init__(self, choice: Choice, vae_class: type[Any], engine: Engine) -> None:
        self.choice = choice
        self.engine = engine
        self.tell = _teller()
        asked = choice.products, choice.frozen, choice.graphs
        self.encoder = EncoderPart(engine, self.tell, *asked)
        self.decoder = DecoderPart(engine, self.tell, *asked)
        self.own_code = threading.RLock()
        self.last: Encoding | None = None
        self._vae_class = vae_class
        self._config: tuple[Any, EncoderTopology] | None = None
        install(vae_class)

    def __reduce__(self) -> tuple[Any, ...]:
        return Acceleration, (self.choice, self._vae_class, self.engine)

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        return Acceleration(self.choice, self._vae_class, self.engine)

    def refresh(self) -> None:
        """Forget the networks."""
        self.encoder.forget()
        self.decoder.forget()

    def topology(self, vae: Any) -> EncoderTopology:
        """Of the VAE's configuration.

        Raises:
            UnsupportedVAEError: it describes no encoder, or one of another factor in time.
        """
        known, config = self._config, vae.config
        if known is None or known[0] is not config:
            topology = EncoderTopology.from_config(config)
            if topology.temporal_factor != TEMPORAL_FACTOR:
                raise UnsupportedVAEError(
                    f"the temporal factor must be {TEMPORAL_FACTOR}, got {topology.temporal_factor}"
                )
            self._config = known = config, topology
        return known[1]

    def encode(self, vae: Any, own: Callable[..., Any], x: Tensor, return_dict: bool) -> Any:
        """What `vae.encode(x)` returns; `own(x)` is the VAE's own code."""
        factor = self.topology(vae).spatial_factor
        given = x.shape[2] if x.dim() == 5 else 0
        if not given or x.shape[1] != 3 or any(size < 1 or size % factor for size in x.shape[3:]):
            return own(x)
        asked = ask(given, announced())
        reason = None
        attempts = {"none": self._none, "fast": self._fast, "exact": self._exact}
        *ways, _ = ways_to_encode(self.choice.mode, asked, self.choice.clips)
        for way in ways:
            attempt = attempts[way](vae, own, x, asked)
            if attempt.parameters is not None and attempt.returns is not None:
                parameters = attempt.parameters
                if missing := asked.total - parameters.shape[2]:
                    parameters = F.pad(parameters, (0, 0, 0, 0, 0, missing))
                result = attempt.returns.make(parameters, return_dict)
                self._report(Encoding(way, asked.needed, given, reason))
                return result
            reason = attempt.reason or reason
        with self.own_code:
            out = own(x)
        self._report(Encoding("whole", given, given, reason))
        return out

    def _none(self, vae: Any, own: Callable[..., Any], x: Tensor, asked: Asked) -> _Attempt:
        if torch.is_grad_enabled() and x.requires_grad:
            return _FAILED
        topology = self.topology(vae)
        cells = (size // topology.spatial_factor for size in x.shape[3:])
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        zeros = x.new_zeros(x.shape[0], 2 * topology.z_dim, asked.total, *cells, dtype=dtype)
        try:
            return _Attempt(zeros, self.encoder.learn(vae, topology))
        except UnsupportedVAEError as error:
            return self._all_frames(str(error))

    def _fast(self, vae: Any, own: Callable[..., Any], x: Tensor, asked: Asked) -> _Attempt:
        parameters, reason = self.encoder.run(vae, x[:, :, : asked.needed], self.topology(vae))
        return _Attempt(parameters, self.encoder.returns, reason)

    def _exact(self, vae: Any, own: Callable[..., Any], x: Tensor, asked: Asked) -> _Attempt:
        reason = why_not_shortened(vae)
        if reason is None:
            topology = self.topology(vae)
            forms: list[EncodeReturns] = []

            def encode_head(_: Any, frames: Tensor) -> Tensor:
                with self.own_code, as_in_clip(vae, frames, asked.total, topology.spatial_factor):
                    out = own(frames)
                form, parameters = EncodeReturns.of(out)
                forms.append(form)
                return parameters

            encode = self.engine.cached(f"encode_head_of_{asked.total}", encode_head)
            parameters = encode(vae, x[:, :, : asked.needed])
            try:
                returns = forms[0] if forms else self.encoder.learn(vae, topology)
            except UnsupportedVAEError as error:
                return self._all_frames(str(error))
            if parameters.shape[2] == asked.wanted:
                return _Attempt(parameters, returns)
            reason = "the first latent frames have another form than a clip's"
        return self._all_frames(reason)

    def _all_frames(self, reason: str) -> _Attempt:
        self.tell(f"all frames of a clip are encoded: {reason}")
        return _Attempt(None, None, reason)

    def decode(
        self,
        vae: Any,
        own: Callable[..., Any],
        z: Tensor,
        return_dict: bool,
        finished: Finished | None = None,
    ) -> Any:
        """What `vae.decode(z)` returns; `own(z)` is the VAE's own code, which calls `finished`."""
        topology = self.topology(vae)
        if z.dim() != 5 or z.shape[1] != topology.z_dim:
            return own(z)
        if "fast" in ways_to_decode(self.choice.mode, z.shape[2], self.choice.clips):
            pixels, _ = self.decoder.run(vae, z, topology, finished)
            if pixels is not None and self.decoder.returns is not None:
                return self.decoder.returns.make(pixels, return_dict)
        with self.own_code:
            return own(z)

    def _report(self, encoding: Encoding) -> None:
        self.last = encoding
        logger.info(
            "encode: %s, %d of %d frames", encoding.path, encoding.pixel_frames, encoding.of
        )


def _teller() -> Callable[[str], None]:
    told: set[str] = set()
    telling = threading.Lock()

    def tell(message: str) -> None:
        with telling:
            if message in told:
                return
            told.add(message)
        logger.warning("cosmos3_fast: %s", message)

    return tell
