"""An engine's own method, run on a tiny VAE with and without this package, and compared.

It decides about releases that the tests have not run on, in the process that serves. The cases are
the engine modules'; here is what counts as the same.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.vae.config import read_config
from cosmos3_fast.vae.live.engine import Engine
from cosmos3_fast.vae.live.exact import decode_sample
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.paths import Choice, ask, ways_to_encode
from cosmos3_fast.vae.live.seam import accelerate, last_encoding, restore
from cosmos3_fast.vae.verify import FLOAT32_BOUND

# Of the folded encoder in 16 bits, against a VAE in 16 bits: it is a wrong scale, order or place
# that shows here, and those are off by the size of the values. Rounding is the tests' business.
_HALF_BOUND = 2.0**-4


@dataclass(frozen=True)
class Case:
    """One request to an engine's method.

    Attributes:
        name: for the message.
        run: runs the method on this VAE; gives all that it leaves behind, by name.
        encoded: pixel frames that need to be encoded; the engine's own code may encode fewer.
    """

    name: str
    run: Callable[[Any], dict[str, Any]]
    encoded: int


def why_not(
    make_vae: Callable[[torch.dtype], Any],
    cases: Iterable[Case],
    choice: Choice,
    engine: Engine | None = None,
) -> str | None:
    """The first difference between the engine's method with and without this package.

    Everything that the method leaves is compared: types, dtypes, shapes, strides and values, in
    fast mode up to the rounding of what was encoded. So are the number of frames that reach the
    encoder, which has to shrink, and the states of the random generators. One flipped bit has to
    be seen, and nothing is left behind.

    Args:
        make_vae: a tiny VAE of the engine's own class; of float32 and of bfloat16.
        cases: at least one.
        choice: of the user; with clips their decoding is tried as well.
        engine: what surrounds the VAE.

    Returns:
        None where nothing differs.
    """
    # In a context of its own, caches and announcements of the request that waits are out of sight.
    return contextvars.Context().run(_why_not, make_vae, list(cases), choice, engine)


def _why_not(
    make_vae: Callable[[torch.dtype], Any],
    cases: list[Case],
    choice: Choice,
    engine: Engine | None,
) -> str | None:
    state = _random_state()
    defaults = torch.get_default_dtype(), torch.get_default_device()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            reason = _compare(cases, make_vae(dtype), dtype, choice, engine)
            if reason is not None:
                return f"{reason} ({str(dtype).removeprefix('torch.')})"
    finally:
        _set_random_state(state)
    if defaults != (torch.get_default_dtype(), torch.get_default_device()):
        return "the default dtype or device has changed"
    return None


def _compare(
    cases: list[Case], vae: Any, dtype: torch.dtype, choice: Choice, engine: Engine | None
) -> str | None:
    # The latents of a float32 VAE are rounded to 16 bits in most engines.
    rounding = FLOAT32_BOUND + 2.0**-8 if dtype == torch.float32 else _HALF_BOUND
    own = [_counted(case, vae) for case in cases]
    pixels = _decoded(vae, dtype) if choice.mode == "fast" and choice.clips else None
    accelerate(
        vae, choice.mode, engine, clips=choice.clips, products=choice.products, graphs=choice.graphs
    )
    try:
        if pixels is not None:
            # The networks for clips are made at the first, by comparison with the VAE's own code.
            vae.encode(pixels.new_zeros(1, 3, 5, *pixels.shape[3:]).to(dtype))
            reason = difference(_decoded(vae, dtype), pixels, rounding, "a decoded clip")
            with frames_through(vae.decoder.conv_in) as own_frames:
                _decoded(vae, dtype)  # the network is there by now
            if reason is None and own_frames:
                reason = "a clip is decoded by the VAE's own code"
            if reason is not None:
                return reason
        for case, (theirs, frames, drawn) in zip(cases, own, strict=True):
            ours, ours_frames, ours_drawn = _counted(case, vae)
            encoding = last_encoding(vae)
            if encoding is None:
                return f"{case.name}: the VAE is not asked to encode"
            folded = encoding.path == "fast"
            asked = ask(case.encoded) if case.encoded else ask(1, 0)
            if "fast" in ways_to_encode(choice.mode, asked, choice.clips) and not folded:
                return f"{case.name}: the folded encoder is not used: {encoding.reason}"
            wanted = 0 if folded else min(frames, case.encoded)
            if ours_frames != wanted:
                return f"{case.name}: {ours_frames} of {frames} frames are encoded, not {wanted}"
            reason = difference(ours, theirs, rounding if folded else 0.0)
            reason = reason or difference(ours_drawn, drawn, where="the random state")
            if reason is None and _flip_one_bit(ours) and difference(ours, theirs) is None:
                reason = "the comparison does not see a flipped bit"
            if reason is not None:
                return f"{case.name}: {reason}"
    finally:
        restore(vae)
    return None


def _decoded(vae: Any, dtype: torch.dtype) -> Tensor:
    """What the VAE makes of a seeded clip of three latent frames."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, read_config(vae.config, "z_dim"), 3, 1, 2)
    latents = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return decode_sample(vae, latents.to(vae.decoder.conv_in.weight.device, dtype))


def _counted(case: Case, vae: Any) -> tuple[dict[str, Any], int, list[Tensor]]:
    """What a case leaves, the pixel frames it encodes, and the random state after it."""
    before = _random_state()
    with frames_through(vae.encoder.conv_in) as frames:
        left = case.run(vae)
    after = _random_state()
    _set_random_state(before)
    return left, sum(frames), after


@contextmanager
def frames_through(conv: nn.Module) -> Iterator[list[int]]:
    """Collect the pixel frames of each call of `conv` inside the block, without a hook: with one,
    the VAE would not be folded."""
    frames: list[int] = []
    own: Any = type(conv)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        frames.append(x.shape[2])
        return own.forward(self, x, *args, **kwargs)

    # A look at the VAE sees through it to the class's own.
    functools.update_wrapper(forward, own.forward)
    setattr(forward, ATTRIBUTE, True)
    conv.__class__ = type(own.__name__, (own,), {"forward": forward})
    try:
        yield frames
    finally:
        conv.__class__ = own


def difference(ours: Any, theirs: Any, bound: float = 0.0, where: str = "result") -> str | None:
    """Where and how two results differ; None where they do not. The sign of zeros is ignored.

    Args:
        ours: tensors, generators, containers and objects of these, to any depth.
        theirs: likewise.
        bound: of |ours - theirs| in floating-point tensors, relative to the largest of `theirs`.
    """
    if type(ours) is not type(theirs):
        return f"{where} is a {type(ours).__name__} instead of a {type(theirs).__name__}"
    if isinstance(ours, Tensor):
        return _tensor_difference(ours, theirs, bound, where)
    if isinstance(ours, torch.Generator):
        ours, theirs = ours.get_state(), theirs.get_state()
        return _tensor_difference(ours, theirs, 0.0, f"the state of {where}")
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{where} has the keys {sorted(ours)} instead of {sorted(theirs)}"
        pairs = [(f"{where}.{key}", ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{where} has {len(ours)} entries instead of {len(theirs)}"
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif hasattr(ours, "__dict__") and type(ours).__eq__ is object.__eq__:
        pairs = [(where, vars(ours), vars(theirs))]
    else:
        return None if ours == theirs else f"{where} is {ours!r} instead of {theirs!r}"
    found = (difference(a, b, bound, name) for name, a, b in pairs)
    return next((reason for reason in found if reason is not None), None)


def _tensor_difference(ours: Tensor, theirs: Tensor, bound: float, where: str) -> str | None:
    for name in ("dtype", "device", "shape"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            return f"{where} has {name} {mine} instead of {other}"
    if ours.stride() != theirs.stride():
        return f"{where} has strides {ours.stride()} instead of {theirs.stride()}"
    if torch.equal(ours, theirs):
        return None
    if not bound or not ours.is_floating_point():
        return f"{where} has other values"
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return None if error <= bound else f"{where} is off by {error:.2g} of its largest value"


def _flip_one_bit(left: Any) -> bool:
    """Flip a bit of the first tensor in 16-bit or 32-bit floating point; whether there is one."""
    if isinstance(left, Tensor) and left.is_floating_point() and left.numel():
        kind = {2: torch.int16, 4: torch.int32}.get(left.element_size())
        if kind is not None:
            with torch.inference_mode(left.is_inference()):
                left.view(kind)[(0,) * left.dim()] ^= 1
            return True
    if isinstance(left, dict):
        left = list(left.values())
    return isinstance(left, list | tuple) and any(map(_flip_one_bit, left))


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
