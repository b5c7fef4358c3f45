"""The encoder and the decoder of a live VAE: their modules, their networks, what they return."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cosmos3_fast.frames import latent_frames, pixel_frames
from cosmos3_fast.vae.compatibility import probe_posterior
from cosmos3_fast.vae.live.engine import Encode, Engine
from cosmos3_fast.vae.live.exact import computes_in
from cosmos3_fast.vae.live.obstacles import Survey, survey, why_not_at_all, why_tiled
from cosmos3_fast.vae.live.patch import ATTRIBUTE
from cosmos3_fast.vae.live.returns import DecodeReturns, EncodeReturns, Finished
from cosmos3_fast.vae.live.watch import Watch
from cosmos3_fast.vae.live.weights import Fold, Following, is_out_of_memory
from cosmos3_fast.vae.networks.decoder import ClipDecoder, FrameDecoder
from cosmos3_fast.vae.networks.encoder import ClipEncoder, FrameEncoder
from cosmos3_fast.vae.topology import EncoderTopology, UnsupportedVAEError

_REFRESH = "after refresh(vae) it is tried again"


class Part(ABC):
    """One direction of a live VAE.

    A subclass says which modules and methods it is, how its networks are folded and called, and
    what shape a result has.

    Args:
        engine: what surrounds the VAE.
        tell: warns, once per message; a function that does not refer back to the part.
        products: of the network for clips, see `ClipDecoder`.
        frozen: the user vouches for the weights, see `Choice`.
        graphs: the network for one frame replays its calls, see `Choice`.

    Attributes:
        returns: the form of what the VAE's own method returns; None until it is learnt, and from
            then on there: it depends on the VAE's class and configuration, not on its weights.
    """

    modules: ClassVar[tuple[str, ...]]
    """Names of the VAE's modules that the part consists of; the first has `conv_in`."""
    methods: ClassVar[tuple[str, ...]]
    """Of the VAE; the first is the one that users call."""

    def __init__(
        self,
        engine: Engine,
        tell: Callable[[str], None],
        products: torch.dtype | None = None,
        frozen: bool = False,
        graphs: bool = False,
    ) -> None:
        self.returns: Any = None
        self._frozen, self._graphs = frozen, graphs
        self._engine = engine
        self._tell = tell
        self._products = products
        self._frame = Following()
        self._clip = Following()
        # Values of the smallest clip that did not fit into memory.
        self._too_large: int | None = None
        self._watch: Watch | None = None

    @abstractmethod
    def _fold_frame(self, vae: Any, device: torch.device) -> Any:
        """The network for one frame; `returns` is known afterwards."""

    @abstractmethod
    def _fold_clip(self, vae: Any, device: torch.device) -> Any:
        """The network for clips; `returns` is known afterwards."""

    @abstractmethod
    def _call(self, network: Any, x: Tensor) -> Tensor:
        """What the VAE's own method computes, by a network."""

    @abstractmethod
    def _sizes(self, topology: EncoderTopology, x: Tensor) -> tuple[Sequence[int], tuple[int, ...]]:
        """Height and width in pixels, and the shape of the VAE's own result for `x`."""

    @abstractmethod
    def _refused(self, error: Exception) -> None:
        """The part cannot be folded while the VAE is being accelerated."""

    def _hand_on(self, network: Any, x: Tensor, finished: Finished) -> Tensor:
        """`_call`; `finished` is called with the frames of the result as they come."""
        raise NotImplementedError

    def _cached(self, run: Encode) -> Encode:
        """`run` through the engine's cache, where it has one for this part."""
        return run

    def _network_for(self, frames: int) -> tuple[Following, Fold]:
        """What serves so many frames; `paths.serves_fast` has said that something does."""
        return (self._frame, self._fold_frame) if frames == 1 else (self._clip, self._fold_clip)

    def forget(self) -> None:
        """Fold again at the next use."""
        self._frame.forget()
        self._clip.forget()
        self._too_large = None

    def prepare(self, vae: Any) -> None:
        """Fold the network for one frame where the VAE is; what speaks against it is told."""
        seen = self._survey(vae)
        if seen.obstacle is not None:
            self._tell_own(seen.obstacle)
            return
        try:
            device = next(getattr(vae, self.modules[0]).parameters()).device
            self._frame.snapshot(self._fold_frame, vae, seen, device)
        except (UnsupportedVAEError, AttributeError, StopIteration) as error:
            self._refused(error)

    def network(self, vae: Any, frames: int, device: torch.device) -> Any:
        """The folded network for so many latent frames, also for calls past the VAE's own method.

        Args:
            vae: the live VAE.
            frames: 1, or more for clips.
            device: of the network.

        Returns:
            None where something speaks against it.

        Raises:
            UnsupportedVAEError: the part cannot be folded as it is.
            MemoryError, RuntimeError: memory does not suffice.
        """
        seen = self._survey(vae)
        if seen.obstacle is not None or (seen.training is not None and not self._frozen):
            return None
        following, fold = self._network_for(frames)
        return following.snapshot(fold, vae, seen, device, self._was_stale).network

    def run(
        self, vae: Any, x: Tensor, topology: EncoderTopology, finished: Finished | None = None
    ) -> tuple[Tensor, None] | tuple[None, str]:
        """The result of a folded network, or None and why the VAE's own code has to run.

        Args:
            vae: the live VAE.
            x: what its own method takes, [B, C, T, H, W].
            topology: of its encoder.
            finished: called with the frames of a result, as they come.
        """
        sizes, shape = self._sizes(topology, x)
        reason = why_not_at_all(vae, x, self.methods) or why_tiled(vae, *sizes)
        if reason is None:
            seen = self._survey(vae)
            reason = seen.obstacle
            if torch.is_grad_enabled() and (x.requires_grad or seen.trainable):
                reason = reason or "a gradient is wanted"
            if not self._frozen and seen.training is not None:
                reason = reason or f"{seen.training} (frozen=True says that they stay as they are)"
        is_clip = x.shape[2] > 1
        if reason is None and is_clip and self._is_too_large(x):
            reason = f"clips of this size have not fitted into memory; {_REFRESH}"
        if reason is None:
            weight = getattr(vae, self.modules[0]).conv_in.weight
            moved = "_hf_hook" in vars(vae) or self._engine.pending_fetch() is not None
            if x.dtype != weight.dtype or (x.device != weight.device and not moved):
                # The VAE's own code says what is wrong, or copes with it.
                return None, f"the input is {x.dtype} on {x.device}, the VAE is not"
            try:
                return self._through_network(vae, x, shape, seen, finished), None
            except Exception as error:  # never stop a run that the VAE's own code can make
                if finished is not None and finished.failed:
                    raise
                reason = str(error) or repr(error)
                if is_clip and is_out_of_memory(error):
                    # The error holds the frames of the call, and goes with this block.
                    self._clip.forget()
                    self._too_large = min(x.numel(), self._too_large or x.numel())
                    reason = f"memory does not suffice for this clip ({reason}); {_REFRESH}"
        self._tell_own(reason)
        return None, reason

    def _is_too_large(self, x: Tensor) -> bool:
        return self._too_large is not None and x.numel() >= self._too_large

    def _through_network(
        self,
        vae: Any,
        x: Tensor,
        shape: tuple[int, ...],
        seen: Survey,
        finished: Finished | None,
    ) -> Tensor:
        following, fold = self._network_for(x.shape[2])
        snapshot = following.snapshot(fold, vae, seen, x.device, self._was_stale)

        def run(_: Any, given: Tensor) -> Tensor:
            if finished is not None:  # of the whole batch
                return self._hand_on(snapshot.network, given, finished)
            if getattr(vae, "use_slicing", False) and given.shape[0] > 1:
                return torch.cat([self._call(snapshot.network, each) for each in given.split(1)])
            return self._call(snapshot.network, given)

        with torch.no_grad():
            result = self._cached(run)(vae, x)
        if result.shape != shape or result.dtype != x.dtype:
            reason = f"the folded network gave {list(result.shape)} in {result.dtype}"
            following.refuse(snapshot, reason)
            raise UnsupportedVAEError(reason)
        return result

    def _survey(self, vae: Any) -> Survey:
        cls = type(vae)
        # Another function of the class is seen as another weight is.
        of_class = [(cls, getattr(cls, name, None)) for name in self.methods[1:]]
        watch = self._watch
        seen = None if watch is None else watch.again(vae, of_class)
        if seen is not None:
            return seen
        self._watch = watch = None
        seen = survey(vae, self.modules, self._engine.is_equivalent)
        if seen.obstacle is None:
            watch = Watch(vae, self.modules, of_class)
            # What changes from here on is other than the watch has it, if not than the survey.
            seen = survey(vae, self.modules, self._engine.is_equivalent)
        seen.traces.extend((weakref.ref(cls), function, None) for cls, function in of_class)
        if watch is not None and seen.obstacle is None:
            watch.seen = seen._replace(weights=[])
            self._watch = watch
        return seen

    def _was_stale(self) -> None:
        # The network that did not notice is of the same weights.
        self._frame.forget()
        self._clip.forget()
        self._tell(
            f"the weights for vae.{self.methods[0]} were changed without a trace, and are folded "
            "again; calls since then may have had those of before: see refresh"
        )

    def _tell_own(self, reason: str) -> None:
        self._tell(f"the VAE's own {self.methods[0]} runs: {reason}")


class EncoderPart(Part):
    """Pixels to the posterior's parameters. A VAE whose encoder cannot be folded is refused."""

    modules = ("encoder", "quant_conv")
    methods = ("encode", "_encode")
    returns: EncodeReturns | None

    def _fold_frame(self, vae: Any, device: torch.device) -> Any:
        own = bare(vae)
        network = FrameEncoder.from_vae(own, device=device, probe=False, posterior=True)
        self.returns = probe_posterior(own, network)
        return network.capture() if self._graphs else network

    def _fold_clip(self, vae: Any, device: torch.device) -> Any:
        own = bare(vae)
        network = ClipEncoder.from_vae(
            own, device=device, probe=False, posterior=True, products=self._products
        )
        # Nine frames reach every state there is, as in `ClipEncoder`.
        self.returns = probe_posterior(own, network, frames=9)
        return network

    def _call(self, network: Any, x: Tensor) -> Tensor:
        return network(x)

    def _sizes(self, topology: EncoderTopology, x: Tensor) -> tuple[Sequence[int], tuple[int, ...]]:
        sizes, factor = x.shape[3:], topology.spatial_factor
        frames = latent_frames(x.shape[2], topology.temporal_factor)
        cells = (size // factor for size in sizes)
        return sizes, (x.shape[0], 2 * topology.z_dim, frames, *cells)

    def _refused(self, error: Exception) -> None:
        raise UnsupportedVAEError(str(error)) from error

    def _cached(self, run: Encode) -> Encode:
        return self._engine.cached("encode_folded", run)

    def learn(self, vae: Any, topology: EncoderTopology) -> EncodeReturns:
        """`returns`, from the smallest frame where it is not known.

        Raises:
            UnsupportedVAEError: the VAE does not encode it, or returns something unknown.
        """
        if self.returns is None:
            edge = topology.spatial_factor
            own = bare(vae)
            try:
                device, dtype = computes_in(own)
                with torch.no_grad():
                    out = own.encode(torch.zeros(1, 3, 1, edge, edge, device=device, dtype=dtype))
                returns, parameters = EncodeReturns.of(out)
            except Exception as error:
                raise UnsupportedVAEError(f"what encode returns is not known ({error})") from error
            if parameters.shape[1] != 2 * topology.z_dim:
                returns = returns.without_variance(parameters.shape[1])
            self.returns = returns
        return self.returns


class DecoderPart(Part):
    """Latents to pixels. A VAE whose decoder cannot be folded decodes by itself, with a warning."""

    modules = ("decoder", "post_quant_conv")
    methods = ("decode", "_decode")
    returns: DecodeReturns | None

    def _fold_frame(self, vae: Any, device: torch.device) -> Any:
        own = bare(vae)
        network = self._learnt(own, FrameDecoder.from_vae(own, device=device))
        return network.capture() if self._graphs else network

    def _fold_clip(self, vae: Any, device: torch.device) -> Any:
        own = bare(vae)
        return self._learnt(own, ClipDecoder.from_vae(own, device=device, products=self._products))

    def _learnt(self, own: Any, network: Any) -> Any:
        weight = own.decoder.conv_in.weight
        out = own.decode(weight.new_zeros(1, network.z_dim, 1, 1, 1))
        self.returns = DecodeReturns.of(out, weight.dtype)
        return network

    def _call(self, network: Any, x: Tensor) -> Tensor:
        return network.decode_unnormalized(x)

    def _hand_on(self, network: Any, x: Tensor, finished: Finished) -> Tensor:
        returns = self.returns or DecodeReturns()
        if x.shape[2] == 1:
            pixels = self._call(network, x)
            finished(returns.cast(pixels.clone()))
            return pixels
        sizes = (size * network.spatial_factor for size in x.shape[3:])
        pixels = x.new_empty(x.shape[0], 3, pixel_frames(x.shape[2]), *sizes)
        done = 0
        for part in network.frames(x, normalized=False):
            pixels[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
            finished(returns.cast(part))  # which may change it
        return pixels

    def _sizes(self, topology: EncoderTopology, x: Tensor) -> tuple[Sequence[int], tuple[int, ...]]:
        sizes = [size * topology.spatial_factor for size in x.shape[3:]]
        frames = pixel_frames(x.shape[2], topology.temporal_factor)
        return sizes, (x.shape[0], 3, frames, *sizes)

    def _refused(self, error: Exception) -> None:
        self._tell(str(error))


def bare(vae: Any) -> Any:
    """The VAE's own code and modules, without what moves, shortens or replaces its methods."""
    own = object.__new__(type(vae))
    hidden = {"_hf_hook", ATTRIBUTE, "encode", "decode"}
    vars(own).update({name: value for name, value in vars(vae).items() if name not in hidden})
    return own
