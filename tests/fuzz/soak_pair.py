"""An accelerated VAE and a twin that is not: calls of both, compared by what the seam promises."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos3_fast import accelerate
from cosmos3_fast.vae.live.announce import wanted_frames
from cosmos3_fast.vae.live.parts import DecoderPart, EncoderPart, Part
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae
from cosmos3_fast.vae.verify import compare

FAMILIES = ("wan22", "wan21", "qwen")
PARTS = {"encode": ("encoder", "quant_conv"), "decode": ("decoder", "post_quant_conv")}
CELLS = (2, 3)

_served = threading.local()


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """Inside, a call of `Pair` knows whether a folded network has served it."""
    originals: dict[type[Part], Any] = {cls: cls._call for cls in (EncoderPart, DecoderPart)}

    def seeing(original: Any) -> Any:
        def call(self: Any, network: Any, x: Tensor) -> Tensor:
            result = original(self, network, x)
            _served.fast = True
            return result

        return call

    for cls, original in originals.items():
        cls._call = seeing(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls._call = original  # type: ignore[method-assign]


def make_vae(family: str, seed: int) -> Any:
    import diffusers

    torch.manual_seed(seed)
    if family == "wan22":
        config = {**COSMOS3_VAE_CONFIG, "base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
        vae = synthetic_vae(config, seed, decoder_base_dim=8)
    else:
        kind = diffusers.AutoencoderKLWan if family == "wan21" else diffusers.AutoencoderKLQwenImage
        vae = kind(base_dim=8, num_res_blocks=1)
    return vae.requires_grad_(False).eval()


class Call(NamedTuple):
    """What is asked of both VAEs.

    Attributes:
        method: "encode" or "decode".
        frames: latent frames.
        batch: samples.
        wanted: of an encode: latent frames that are announced as used; None: nothing is.
        mode: torch's: "no_grad", "inference", "grad" (which is wanted of the input) or "autocast".
        strided: the input has strides of its own.
        in_tuple: `return_dict=False`.
        seed: of the input.
    """

    method: str
    frames: int
    batch: int
    wanted: int | None
    mode: str
    strided: bool
    in_tuple: bool
    seed: int

    @classmethod
    def drawn(cls, rng: random.Random) -> Call:
        method = rng.choice(list(PARTS))
        frames = rng.choice((1, 1, 2, 3))
        wanted = rng.choice((0, 1, 2)) if method == "encode" and rng.random() < 0.2 else None
        modes = ["no_grad"] * 12 + ["inference", "autocast", "grad"]
        return cls(
            method=method,
            frames=frames,
            batch=rng.choice((1, 1, 1, 2)),
            wanted=wanted,
            # Frames that are not wanted have no gradient.
            mode=rng.choice(modes if wanted is None else modes[:-1]),
            strided=rng.random() < 0.2,
            in_tuple=rng.random() < 0.2,
            seed=rng.randrange(2**31),
        )

    def __str__(self) -> str:
        method, *others = self._asdict().items()
        return ", ".join([method[1], *(f"{name}={value}" for name, value in others)])

    def input(self, vae: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.method == "encode":
            sides = (side * _factor(vae) for side in CELLS)
            x = torch.rand(self.batch, 3, 4 * self.frames - 3, *sides, generator=generator) * 2 - 1
        else:
            z_dim = vae.config.z_dim
            x = torch.randn(self.batch, z_dim, self.frames, *CELLS, generator=generator)
        x = x.to(vae.dtype)
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if self.strided else x

    def run(self, vae: Any) -> tuple[Tensor, Tensor | None, bool]:
        """The result, the gradient of the input where it is wanted, and whether it was folded."""
        x = self.input(vae).requires_grad_(self.mode == "grad")
        surroundings = {
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
            "grad": contextlib.nullcontext,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }[self.mode]
        _served.fast = False
        torch.manual_seed(self.seed)  # for dropout
        with surroundings(), wanted_frames(self.wanted):
            out = getattr(vae, self.method)(x, return_dict=not self.in_tuple)
        fast = _served.fast
        out = out[0] if self.in_tuple else out
        if self.method == "encode":
            result = (out if self.in_tuple else out.latent_dist).parameters
        else:
            result = out if self.in_tuple else out.sample
        if self.mode == "grad":
            result.float().square().mean().backward()
        return result.detach(), x.grad, fast


def _factor(vae: Any) -> int:
    return 16 if getattr(vae.config, "patch_size", None) == 2 else 8


class Pair:
    """An accelerated VAE and a twin that gets the same events.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights.

    Attributes:
        rng: every choice is drawn from it.
        undo: what takes back a state that is on, by its name.
        calls, fast: how many calls there were, and those that folded networks have served.
    """

    def __init__(self, family: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.twin = make_vae(family, seed)
        self.ours = accelerate(copy.deepcopy(self.twin))
        self.undo: dict[str, Callable[[], None]] = {}
        self.calls = self.fast = 0
        # Calls in which a network may still hold weights that were changed without a trace.
        self._stale: dict[tuple[str, bool], int] = {}

    @property
    def both(self) -> tuple[Any, Any]:
        return self.ours, self.twin

    def weights(self, method: str) -> list[tuple[Tensor, ...]]:
        """The weights that act in `method`, ours and the twin's."""
        parts = [
            [p for name in PARTS[method] for p in getattr(vae, name).parameters()]
            for vae in self.both
        ]
        return list(zip(*parts, strict=True))

    def changed_without_a_trace(self, method: str) -> None:
        """One weight at least; `refresh` says within how many calls of a network it is found."""
        for is_clip in (False, True):
            self._stale[method, is_clip] = -(-len(self.weights(method)) // 2)

    def check_weights(self) -> None:
        """Raises AssertionError where the two have not got the same: the soak itself is wrong."""
        for method in PARTS:
            assert all(torch.equal(*each) for each in self.weights(method)), "the twins differ"

    def call(self, call: Call) -> None:
        """Raises AssertionError where the results differ by more than the seam promises."""
        theirs, their_grad, _ = call.run(self.twin)
        ours, our_grad, fast = call.run(self.ours)
        self.judge(call, ours, theirs, fast)
        if their_grad is not None:
            assert our_grad is not None
            assert torch.equal(our_grad, their_grad), "another gradient"

    def judge(self, call: Call, ours: Tensor, theirs: Tensor, fast: bool) -> None:
        self.calls += 1
        self.fast += fast
        network = call.method, fast and min(call.frames, call.wanted or call.frames) > 1
        may_be_stale = fast and self._stale.get(network, 0) > 0
        if fast:
            self._stale[network] = self._stale.get(network, 0) - 1
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if call.wanted is not None and call.wanted < call.frames:
            # Of a VAE that runs its own code, all of it may be there.
            rest = ours[:, :, call.wanted :]
            assert not rest.any() or torch.equal(rest, theirs[:, :, call.wanted :])
            ours, theirs = ours[:, :, : call.wanted], theirs[:, :, : call.wanted]
        if not fast:
            assert torch.equal(ours, theirs), f"own code is off by {_off(ours, theirs)}"
        elif not may_be_stale:
            exact = None
            if ours.dtype in (torch.bfloat16, torch.float16):
                exact, _, _ = call._replace(wanted=None).run(copy.deepcopy(self.twin).double())
                exact = exact[:, :, : ours.shape[2]]
            found = compare(ours, theirs, exact)
            # In 16 bits two errors are compared, each the rms of few values: over eight seeds the
            # ratio had medians of 0.72 to 0.91 by network, and 1.12 at most.
            chance = 1.0 if exact is None else 1 + 4 / ours.numel() ** 0.5
            assert found.error <= chance * found.bound, str(found)


def _off(ours: Tensor, theirs: Tensor) -> str:
    return f"{(ours.double() - theirs.double()).abs().max():.3g} of {theirs.abs().max():.3g}"
