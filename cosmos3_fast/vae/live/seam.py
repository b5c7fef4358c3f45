"""The seam: a live VAE whose `encode` and `decode` take short cuts and are otherwise its own.

    accelerate(vae, mode="fast")
    restore(vae)

The class's `encode` and `decode` are wrapped once per process. A wrapper does nothing for an
object that does not carry an `_Acceleration` in its `__dict__`; that object has no reference back,
and copies and pickles to an empty one of the same mode, which folds for itself. So the VAE can be
copied, pickled, saved, dropped and inspected as before.

An engine that knows how many latent frames of a clip it will use says so with `wanted_frames`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.frames import TEMPORAL_FACTOR, latent_frames, pixel_frames
from cosmos3_fast.vae.compatibility import probe_posterior
from cosmos3_fast.vae.live.exact import as_in_clip
from cosmos3_fast.vae.live.obstacles import (
    Survey,
    same_traces,
    survey,
    why_not_at_all,
    why_not_shortened,
    why_tiled,
)
from cosmos3_fast.vae.live.returns import DecodeReturns, EncodeReturns
from cosmos3_fast.vae.networks.decoder import FrameDecoder
from cosmos3_fast.vae.networks.encoder import PosteriorEncoder
from cosmos3_fast.vae.topology import EncoderTopology, UnsupportedVAEError

logger = logging.getLogger(__name__)

Mode = Literal["exact", "fast", "off"]
MODES: tuple[Mode, ...] = ("exact", "fast", "off")

VAE = TypeVar("VAE")
Cached = Callable[[Callable[[Any, Tensor], Tensor]], Callable[[Any, Tensor], Tensor]]

_STATE = "_cosmos3_fast"
_ENCODER = ("encoder", "quant_conv")
_DECODER = ("decoder", "post_quant_conv")

# Latent frames that the caller of `encode` will use; None: all.
_wanted: ContextVar[int | None] = ContextVar("cosmos3_fast_wanted", default=None)
# Inside a VAE's own code: what it calls of itself, as `super().encode`, is its own too.
_own: ContextVar[bool] = ContextVar("cosmos3_fast_own", default=False)
# Called before a VAE's own code runs; None: nothing is.
_before_own_code: ContextVar[Callable[[], None] | None] = ContextVar(
    "cosmos3_fast_before_own_code", default=None
)
_install_lock = threading.Lock()


@dataclass(frozen=True)
class Encoding:
    """How an accelerated VAE encoded.

    Attributes:
        path: "none" (nothing was wanted), "fast" (the folded 2-D encoder), "exact" (the VAE's own
            code on a prefix of the clip) or "whole" (the VAE's own code on all of it).
        pixel_frames: frames that were encoded.
        of: frames that were given.
        reason: why the path is not the one that the mode promises; None where it is.
    """

    path: Literal["none", "fast", "exact", "whole"]
    pixel_frames: int
    of: int
    reason: str | None = None


def check_mode(mode: str, argument: str = "mode") -> Mode:
    """`mode` itself.

    Raises:
        ValueError: it is none of "exact", "fast" and "off".
    """
    for known in MODES:
        if mode == known:
            return known
    raise ValueError(f"{argument} must be one of {', '.join(MODES)}, got {mode!r}")


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps, or the module itself."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def wanted_frames(count: int | None) -> Iterator[None]:
    """Inside, `encode` of an accelerated VAE computes only the first `count` latent frames.

    The others are zeros. 0: nothing runs. None: all of them. Seen by this thread and task only.
    """
    token = _wanted.set(count)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def before_own_code(fetch: Callable[[], None]) -> Iterator[None]:
    """Inside, `fetch` is called whenever an accelerated VAE is about to run code of its own.

    For an engine that brings the VAE to the device before it encodes: where a folded network
    serves, which stays on its device, the VAE need not come.
    """
    token = _before_own_code.set(fetch)
    try:
        yield
    finally:
        _before_own_code.reset(token)


def accelerate(vae: VAE, mode: str = "fast", cached: Cached | None = None) -> VAE:
    """Let a VAE of the Wan family encode and decode single frames as 2-D networks.

    With "fast", `encode` of one frame and `decode` of one latent frame go through networks folded
    from the VAE's weights; their results have the VAE's own types, on its own scale, mean and
    log-variance. With "exact", all of it stays the VAE's own code, on fewer frames where
    `wanted_frames` says that fewer are used. Anything else is the VAE's own code, bit for bit.

    Changes of the weights are followed, but for those that leave no trace: writes through `.data`,
    or into tensors made in inference mode. After these `refresh` is to be called. Forward hooks,
    parametrisations, compiled parts, tiling at sizes that exceed a tile, autocast, a gradient that
    is wanted, weights that are offloaded or stored in 8 bits: the VAE's own code runs, and one
    warning says why. Calls inside `torch.compile` are the VAE's own.

    Args:
        vae: diffusers' AutoencoderKLWan or AutoencoderKLQwenImage, or another with the same
            structure. Changed in place; folding neither moves it nor draws random numbers.
        mode: "fast", "exact" or "off" (as `restore`). Called again it changes the mode.
        cached: decorates methods `encode(vae, frames)`, as an engine's cache of encodings
            decorates the VAE's own `encode`.

    Returns:
        `vae` itself.

    Raises:
        ValueError: an unknown mode.
        UnsupportedVAEError: (a ValueError) the VAE is none of this family.
    """
    checked = check_mode(mode)
    if checked == "off":
        return restore(vae)
    plain = uncompiled(vae)
    if not isinstance(plain, nn.Module) or not callable(getattr(plain, "encode", None)):
        raise UnsupportedVAEError(f"vae must be a VAE with encode, got {type(plain).__name__}")
    if not isinstance(getattr(plain, "encoder", None), nn.Module):
        raise UnsupportedVAEError(f"vae must have an encoder, got {type(plain).__name__} without")
    if not hasattr(plain, "config"):
        raise UnsupportedVAEError(f"vae must have a config, got {type(plain).__name__} without")
    state = _Acceleration(checked, type(plain), cached)
    state.topology(plain)
    if checked == "fast":
        state.fold(plain)
    state.learn_returns(plain)
    for name in ("encode", "decode"):
        if name in vars(plain):
            state.tell(f"vae.{name} was replaced on this object, and runs as it is")
    vars(plain)[_STATE] = state
    return vae


def restore(vae: VAE) -> VAE:
    """Undo `accelerate`; a VAE that is not accelerated is left as it is.

    Returns:
        `vae` itself.
    """
    getattr(uncompiled(vae), "__dict__", {}).pop(_STATE, None)
    return vae


def refresh(vae: VAE) -> VAE:
    """Fold again at the next use: for weights that were changed without a trace.

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


def last_encoding(vae: Any) -> Encoding | None:
    """How an accelerated VAE encoded latest; None before the first time."""
    state = _state(uncompiled(vae))
    return state.last if state else None


def _state(vae: Any) -> _Acceleration | None:
    return getattr(vae, "__dict__", {}).get(_STATE)


class _Acceleration:
    """What an accelerated VAE carries."""

    def __init__(self, mode: Mode, vae_class: type[Any], cached: Cached | None = None) -> None:
        self.mode = mode
        self._cached = cached
        self.last: Encoding | None = None
        self._vae_class = vae_class
        self._config: tuple[Any, EncoderTopology] | None = None
        self._returns: EncodeReturns | None = None
        self._told: set[str] = set()
        self._lock = threading.RLock()
        self.refresh()
        _install(vae_class)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Acceleration, (self.mode, self._vae_class, self._cached)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Acceleration:
        return _Acceleration(self.mode, self._vae_class, self._cached)

    def refresh(self) -> None:
        """Forget the networks."""
        self._encoder = _Folded(_ENCODER, _fold_encoder)
        self._decoder = _Folded(_DECODER, _fold_decoder)

    def topology(self, vae: Any) -> EncoderTopology:
        """Of the VAE's configuration.

        Raises:
            UnsupportedVAEError: it describes no encoder, or one of another factor in time.
        """
        config = vae.config
        if self._config is None or self._config[0] is not config:
            topology = EncoderTopology.from_config(config)
            if topology.temporal_factor != TEMPORAL_FACTOR:
                raise UnsupportedVAEError(
                    f"the temporal factor must be {TEMPORAL_FACTOR}, got {topology.temporal_factor}"
                )
            self._config = config, topology
        return self._config[1]

    def fold(self, vae: Any) -> None:
        """Fold both parts where they are.

        Raises:
            UnsupportedVAEError: the encoder's structure is not that of a folded one. What can
                change later, and a decoder that cannot be folded, only gives a warning.
        """
        for folded in (self._encoder, self._decoder):
            seen = survey(vae, folded.names)
            if seen.obstacle is not None:
                self._tell_own(folded, seen.obstacle)
                continue
            try:
                device = next(getattr(vae, folded.names[0]).parameters()).device
                with self._lock:
                    folded.network(vae, seen, device)
            except (UnsupportedVAEError, AttributeError, StopIteration) as error:
                if folded is self._encoder:
                    raise UnsupportedVAEError(str(error)) from error
                self.tell(str(error))

    def encode(self, vae: Any, own: Callable[..., Any], x: Tensor, return_dict: bool) -> Any:
        """What `vae.encode(x)` returns; `own(x)` is the VAE's own code."""
        topology = self.topology(vae)
        factor = topology.spatial_factor
        given = x.shape[2] if x.dim() == 5 else 0
        sizes = x.shape[3:]
        if not given or x.shape[1] != 3 or any(size < 1 or size % factor for size in sizes):
            return own(x)
        cells = [size // factor for size in sizes]
        total, announced = latent_frames(given), _wanted.get()
        wanted = total if announced is None else min(announced, total)
        reason = None
        if wanted == 0 and not (torch.is_grad_enabled() and x.requires_grad):
            returns = self.learn_returns(vae)
            if returns is not None:
                zeros = x.new_zeros(x.shape[0], 2 * topology.z_dim, total, *cells)
                result = returns.make(zeros, return_dict)
                self._report(Encoding("none", 0, given))
                return result
        one_frame = given == 1 or (announced is not None and wanted == 1)
        if self.mode == "fast" and one_frame and wanted == 1:
            shape = (x.shape[0], 2 * topology.z_dim, 1, *cells)
            parameters, reason = self._run(self._encoder, vae, x[:, :, :1], sizes, shape)
            if parameters is not None:
                parameters = F.pad(parameters, (0, 0, 0, 0, 0, total - 1))
                assert self._encoder.returns is not None
                result = self._encoder.returns.make(parameters, return_dict)
                self._report(Encoding("fast", 1, given))
                return result
        if 0 < wanted < total:
            whole_reason = why_not_shortened(vae)
            if whole_reason is None:
                head = x[:, :, : pixel_frames(wanted)]
                forms: list[EncodeReturns] = []

                def encode_head(_: Any, frames: Tensor) -> Tensor:
                    # What is hooked meanwhile is shared with the VAE's other callers.
                    with self._lock, as_in_clip(vae, frames, total, factor):
                        out = own(frames)
                    form, parameters = EncodeReturns.of(out)
                    forms.append(form)
                    return parameters

                parameters = self._through_cache(f"encode_head_of_{total}", encode_head, vae, head)
                returns = forms[0] if forms else self.learn_returns(vae)
                if returns is not None and parameters.shape[2] == wanted:
                    self._report(Encoding("exact", head.shape[2], given, reason))
                    parameters = F.pad(parameters, (0, 0, 0, 0, 0, total - wanted))
                    return returns.make(parameters, return_dict)
                whole_reason = f"the first {wanted} latent frames have another form than a clip's"
            self.tell(f"all {given} frames are encoded: {whole_reason}")
            reason = whole_reason
        with self._lock:
            out = own(x)
        self._report(Encoding("whole", given, given, reason))
        return out

    def decode(self, vae: Any, own: Callable[..., Any], z: Tensor, return_dict: bool) -> Any:
        """What `vae.decode(z)` returns; `own(z)` is the VAE's own code."""
        topology = self.topology(vae)
        if self.mode != "fast" or z.dim() != 5 or z.shape[1:3] != (topology.z_dim, 1):
            return own(z)
        sizes = [size * topology.spatial_factor for size in z.shape[3:]]
        pixels, _ = self._run(self._decoder, vae, z, sizes, (z.shape[0], 3, 1, *sizes))
        if pixels is None:
            return own(z)
        assert self._decoder.returns is not None
        return self._decoder.returns.make(pixels, return_dict)

    def _run(
        self, folded: _Folded, vae: Any, x: Tensor, sizes: Any, shape: tuple[int, ...]
    ) -> tuple[Tensor | None, str | None]:
        """The folded network's result, or None and why the VAE's own code has to run.

        Args:
            sizes: height and width in pixels.
            shape: that the VAE's own result would have; another one ends the network's use.
        """
        reason = why_not_at_all(vae, x, folded.methods) or why_tiled(vae, *sizes)
        seen = None if reason else survey(vae, folded.names)
        if seen is not None:
            reason = seen.obstacle
            if torch.is_grad_enabled() and (x.requires_grad or seen.trainable):
                reason = reason or "a gradient is wanted"
        if reason is None and seen is not None:
            weight = getattr(vae, folded.names[0]).conv_in.weight
            moved = hasattr(vae, "_hf_hook") or _before_own_code.get() is not None
            if x.dtype != weight.dtype or (x.device != weight.device and not moved):
                # The VAE's own code says what is wrong, or copes with it.
                return None, f"the input is {x.dtype} on {x.device}, the VAE is not"
            try:
                with self._lock:
                    network = folded.network(vae, seen, x.device)

                def run(_: Any, given: Tensor) -> Tensor:
                    if getattr(vae, "use_slicing", False) and given.shape[0] > 1:
                        return torch.cat([network(each) for each in given.split(1)])
                    return network(given)

                with torch.no_grad():
                    if folded is self._encoder:
                        result = self._through_cache("encode_folded", run, vae, x)
                    else:
                        result = run(vae, x)
                if result.shape == shape and result.dtype == x.dtype:
                    return result, None
                reason = f"the folded network gave {list(result.shape)} in {result.dtype}"
                folded.refuse(reason)
            except Exception as error:  # never stop a run that the VAE's own code can make
                reason = str(error) or repr(error)
        self._tell_own(folded, reason)
        return None, reason

    def _through_cache(
        self, name: str, encode: Callable[[Any, Tensor], Tensor], vae: Any, frames: Tensor
    ) -> Tensor:
        """`encode(vae, frames)`; an engine's cache tells methods apart by their names."""
        if self._cached is None:
            return encode(vae, frames)
        encode.__name__ = name
        return self._cached(encode)(vae, frames)

    def learn_returns(self, vae: Any) -> EncodeReturns | None:
        """What `vae.encode` returns, learnt from the smallest frame; None where that fails."""
        if self._encoder.returns is not None:
            return self._encoder.returns
        if self._returns is None:
            edge = self.topology(vae).spatial_factor
            try:
                weight = next(p for p in vae.encoder.parameters())
                device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
                bare = _bare(vae)
                if weight.is_meta:
                    weight = torch.empty(0, device=device or "cpu", dtype=weight.dtype)
                with torch.no_grad(), self._lock:
                    out = bare.encode(weight.new_zeros(1, 3, 1, edge, edge))
                returns, parameters = EncodeReturns.of(out)
                if parameters.shape[1] != 2 * self.topology(vae).z_dim:
                    returns = returns.without_variance(parameters.shape[1])
                self._returns = returns
            except Exception as error:
                self.tell(f"all frames are encoded: what encode returns is not known ({error})")
        return self._returns

    def _report(self, encoding: Encoding) -> None:
        self.last = encoding
        logger.info(
            "encode: %s, %d of %d frames", encoding.path, encoding.pixel_frames, encoding.of
        )

    def _tell_own(self, folded: _Folded, reason: str | None) -> None:
        self.tell(f"the VAE's own {folded.methods[0]} runs: {reason}")

    def tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("cosmos3_fast: %s", message)


class _Folded:
    """The network of one part of a VAE, up to date with its weights.

    Args:
        names: the VAE's modules that it is folded from.
        fold: gives the network, as a function, and the form of the VAE's results.
    """

    def __init__(
        self, names: tuple[str, ...], fold: Callable[[Any, torch.device], tuple[Any, Any]]
    ) -> None:
        self.names = names
        self.methods = ("encode", "_encode") if names is _ENCODER else ("decode", "_decode")
        self.returns: Any = None
        self._fold = fold
        self._network: Any = None
        self._refusal: str | None = None
        self._seen: list[tuple[Any, Any, Any]] | None = None

    def refuse(self, reason: str) -> None:
        """Use no network of these weights any more."""
        self._refusal = reason

    def network(self, vae: Any, seen: Survey, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Maps frames or latents on `device` to the VAE's result.

        Raises:
            UnsupportedVAEError: the part cannot be folded as it is.
        """
        if not same_traces(self._seen, seen.traces):
            self._network, self._refusal = None, None
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
                    self._network, self.returns = self._fold(vae, device)
            except UnsupportedVAEError as error:
                self._refusal = str(error)
            self._seen = [(weakref.ref(thing), *rest) for thing, *rest in seen.traces]
        if self._refusal is not None:
            raise UnsupportedVAEError(self._refusal)
        if self._network.device != device:
            # Another thread may be using the present one.
            self._network = copy.deepcopy(self._network).to(device)
        network = self._network
        return network if self.names is _ENCODER else network.decode_unnormalized


def _fold_encoder(vae: Any, device: torch.device) -> tuple[Any, EncodeReturns]:
    bare = _bare(vae)
    network = PosteriorEncoder.from_vae(bare, device=device, probe=False)
    return network, probe_posterior(bare, network)


def _fold_decoder(vae: Any, device: torch.device) -> tuple[Any, DecodeReturns]:
    bare = _bare(vae)
    network = FrameDecoder.from_vae(bare, device=device)
    weight = vae.decoder.conv_in.weight
    out = bare.decode(weight.new_zeros(1, network.z_dim, 1, 1, 1))
    return network, DecodeReturns.of(out, weight.dtype)


def _bare(vae: Any) -> Any:
    """The VAE's own code and modules, without what moves, shortens or replaces its methods."""
    bare = object.__new__(type(vae))
    hidden = {"_hf_hook", _STATE, "encode", "decode"}
    vars(bare).update({name: value for name, value in vars(vae).items() if name not in hidden})
    return bare


def _install(vae_class: type[Any]) -> None:
    """Wrap `encode` and `decode` of the class, or of the base that defines them, once."""
    with _install_lock:
        for name, short_cut in (("encode", _Acceleration.encode), ("decode", _Acceleration.decode)):
            owner = next((c for c in vae_class.__mro__ if name in vars(c)), None)
            method = None if owner is None else vars(owner)[name]
            if inspect.isfunction(method) and not hasattr(method, _STATE):
                setattr(owner, name, _inert(method, _signature(method, name), short_cut))


def _signature(method: Any, name: str) -> inspect.Signature:
    """Of `encode` or `decode`, also where a decorator of the engine's hides it."""
    signature = inspect.signature(method)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return signature
    first = {"encode": "x", "decode": "z"}[name]
    plain = {"self": inspect.Parameter.empty, first: inspect.Parameter.empty, "return_dict": True}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(n, kind, default=v) for n, v in plain.items()])


def _inert(original: Any, signature: inspect.Signature, short_cut: Callable[..., Any]) -> Any:
    """`original`, but for objects that carry an `_Acceleration`."""
    receiver, first = list(signature.parameters)[:2]
    known = {receiver, first, "return_dict"}

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        state = self.__dict__.get(_STATE)
        if state is None or _own.get():
            return original(self, *args, **kwargs)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:  # its own words for it
            return original(self, *args, **kwargs)
        given = bound.arguments
        x = given.get(first)

        def own(tensor: Any) -> Any:
            given[first] = tensor
            fetch = _before_own_code.get()
            if fetch is not None:
                fetch()
            token = _own.set(True)
            try:
                return original(*bound.args, **bound.kwargs)
            finally:
                _own.reset(token)

        others = [value for name, value in given.items() if name not in known]
        if not isinstance(x, Tensor) or any(value is not None for value in others):
            return own(x)
        return short_cut(state, self, own, x, given.get("return_dict", True))

    setattr(wrapper, _STATE, True)
    return wrapper
