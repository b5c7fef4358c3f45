"""The structure of a Wan-family VAE's encoder and decoder.

`Topology` is what the two share: names and shapes of blocks, and the check that a state dict has
exactly the tensors that its configuration describes. Three families share the tensor names used
here (those of diffusers, SGLang and vLLM-Omni):

- Wan2.2, which Cosmos3 uses: `is_residual=True`, `patch_size=2`; one `down_blocks.i` per stage.
- Wan2.1: `is_residual=False`, no patches; `down_blocks` is a flat list of blocks.
- Qwen-Image: as Wan2.1, its configuration calls the input channels `input_channels`.

The decoder mirrors the encoder: the lowest resolution first, one block more per stage, `up_blocks`
of one stage each in every family. Wan2.1 and Qwen-Image halve the width where they up-sample;
Wan2.2 has a shortcut around each up-sampling stage, which duplicates its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from cosmos3_fast.arguments import quoted
from cosmos3_fast.vae.config import ConfigValues, UnsupportedVAEError, config_int, read_config

if TYPE_CHECKING:
    from typing import Self

Shape = tuple[int, ...]

_LISTED = 4
_NAME = 120


@dataclass(frozen=True)
class Topology:
    """What the encoder and the decoder of a VAE have in common.

    Attributes:
        part: the VAE's attribute that holds the network.
        outer_conv: the VAE's attribute that holds the 1x1x1 convolution on its latent side.
        patch_size: edge of a patch in pixels, 1 for none.
        z_dim: latent channels.
        residual: stages have parameter-free shortcuts (Wan2.2).
        latents_mean, latents_std: `z_dim` values each.
    """

    part: ClassVar[str]
    outer_conv: ClassVar[str]

    patch_size: int
    z_dim: int
    residual: bool
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def holds(cls, name: str) -> bool:
        """Whether an entry of the VAE's state dict belongs to this part."""
        return name.startswith((f"{cls.part}.", f"{cls.outer_conv}."))

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read a VAE configuration: a mapping, or an object with the same names as attributes.

        Raises:
            UnsupportedVAEError: a value is missing or makes no such network.
        """
        raise NotImplementedError

    def tensor_shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor of this part in the 3-D VAE's state dict."""
        raise NotImplementedError

    def resamplers(self) -> dict[str, int]:
        """3-D names of the modules that change the resolution, and their factor in time."""
        raise NotImplementedError

    def rows(self, name: str) -> slice:
        """The output channels of a tensor that act on the result."""
        return slice(None)

    @cached_property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return math.prod(self.resamplers().values())

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, Shape], config: Any) -> Self:
        """The topology that both the configuration and the tensors describe.

        Args:
            shapes: shape per name of the 3-D VAE's state dict; names of other parts are ignored.
            config: see `from_config`.

        Raises:
            UnsupportedVAEError: a tensor is missing, misshapen or unexpected. The message gives
                its name, its shape and the wanted shape.
        """
        topology = cls.from_config(config)
        wanted = topology.tensor_shapes()
        found = {name: tuple(s) for name, s in shapes.items() if cls.holds(name)}
        faults = [
            f"{name} must have shape {list(wanted[name])}, got no such tensor"
            for name in wanted.keys() - found.keys()
        ]
        faults += [
            f"{name} must have shape {list(wanted[name])}, got {quoted(list(found[name]))}"
            for name in wanted.keys() & found.keys()
            if found[name] != wanted[name]
        ]
        faults += [
            f"{name[:_NAME]} must be absent, got shape {quoted(list(found[name]))}"
            for name in found.keys() - wanted.keys()
        ]
        if faults:
            faults.sort()
            more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
            raise UnsupportedVAEError(
                f"the {cls.part}'s tensors must be those of its config: "
                + "; ".join(faults[:_LISTED])
                + more
            )
        return topology


@dataclass(frozen=True)
class Stage:
    """One resolution of the encoder.

    Attributes:
        in_channels, out_channels: widths at its entry and exit.
        num_blocks: residual blocks; the first one changes the width.
        attention: an attention block follows each residual block.
        downsample: a stride-2 convolution ends the stage.
        factor_t: 2 where the down-sampling also halves time (a `time_conv` is present). On one
            frame this changes nothing but the average shortcut of the residual family.
    """

    in_channels: int
    out_channels: int
    num_blocks: int
    attention: bool
    downsample: bool
    factor_t: int


@dataclass(frozen=True)
class EncoderTopology(Topology):
    """All that is needed to build the 2-D encoder, and the constants that normalise its latents.

    Attributes:
        in_channels: channels after patches are folded in (12 for Cosmos3).
        stages: from the highest resolution to the lowest; with `residual`, each has an
            average-pooling shortcut.
        posterior: the result has all `2 z_dim` channels, mean and log-variance, on the VAE's own
            scale; otherwise the mean alone, normalised.
    """

    part = "encoder"
    outer_conv = "quant_conv"

    in_channels: int
    stages: tuple[Stage, ...]
    posterior: bool = False

    @cached_property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        downsamplings = sum(stage.downsample for stage in self.stages)
        return int(self.patch_size * 2**downsamplings)

    @property
    def packed_channels(self) -> int:
        """`in_channels`, and zeros to whole vectors of 16 bytes in 16 bits, which a GPU's
        convolution would make for itself. Plain colors are left as they are."""
        return self.in_channels if self.patch_size == 1 else -(-self.in_channels // 8) * 8

    @classmethod
    def from_config(cls, config: Any) -> EncoderTopology:
        values = ConfigValues.read(config)
        in_channels = values.pixel_channels(config, "in_channels")
        widths = [values.base_dim * m for m in (1, *values.multipliers)]
        last = len(values.multipliers) - 1
        stages = tuple(
            Stage(
                in_channels=widths[i],
                out_channels=widths[i + 1],
                num_blocks=values.num_blocks,
                attention=not values.residual and 0.5**i in values.attention_scales,
                downsample=i != last,
                factor_t=2 if i != last and values.temporal[i] else 1,
            )
            for i in range(len(values.multipliers))
        )
        if values.residual:
            for i, stage in enumerate(stages):
                factor = stage.factor_t * (4 if stage.downsample else 1)
                if stage.in_channels * factor % stage.out_channels:
                    raise UnsupportedVAEError(
                        f"config: the average shortcut of stage {i} must divide its values evenly, "
                        f"got {stage.in_channels}x{factor} for {stage.out_channels} channels"
                    )
        return cls(
            in_channels=in_channels,
            patch_size=values.patch_size,
            z_dim=values.z_dim,
            residual=values.residual,
            stages=stages,
            latents_mean=values.latents_mean,
            latents_std=values.latents_std,
        )

    def block_names(self) -> list[tuple[list[str], str | None]]:
        """Per stage, the 3-D names of its blocks in order and of its down-sampler."""
        names: list[tuple[list[str], str | None]] = []
        flat = 0
        for i, stage in enumerate(self.stages):
            if self.residual:
                root = f"encoder.down_blocks.{i}"
                blocks = [f"{root}.resnets.{j}" for j in range(stage.num_blocks)]
                names.append((blocks, f"{root}.downsampler" if stage.downsample else None))
                continue
            count = stage.num_blocks * (2 if stage.attention else 1)
            blocks = [f"encoder.down_blocks.{flat + j}" for j in range(count)]
            flat += count
            names.append((blocks, f"encoder.down_blocks.{flat}" if stage.downsample else None))
            flat += stage.downsample
        return names

    def resamplers(self) -> dict[str, int]:
        pairs = zip(self.block_names(), self.stages, strict=True)
        return {name: stage.factor_t for (_, name), stage in pairs if name is not None}

    def rows(self, name: str) -> slice:
        # Of the mean and the log-variance, the mean is the latent.
        mean_only = not self.posterior and name.startswith("quant_conv.")
        return slice(0, self.z_dim if mean_only else None)

    @property
    def output_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the network's output channels are normalised with."""
        if self.posterior:
            return (0.0,) * (2 * self.z_dim), (1.0,) * (2 * self.z_dim)
        return self.latents_mean, self.latents_std

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes = dict(
            conv_shapes("encoder.conv_in", self.in_channels, self.stages[0].in_channels, 3)
        )
        for stage, (blocks, downsampler) in zip(self.stages, self.block_names(), strict=True):
            width = stage.in_channels
            for j, name in enumerate(blocks):
                if stage.attention and j % 2:
                    shapes.update(attention_shapes(name, width))
                else:
                    shapes.update(residual_block_shapes(name, width, stage.out_channels))
                    width = stage.out_channels
            if downsampler is not None:
                shapes[f"{downsampler}.resample.1.weight"] = (width, width, 3, 3)
                shapes[f"{downsampler}.resample.1.bias"] = (width,)
                if stage.factor_t == 2:
                    shapes[f"{downsampler}.time_conv.weight"] = (width, width, 3, 1, 1)
                    shapes[f"{downsampler}.time_conv.bias"] = (width,)
        width = self.stages[-1].out_channels
        shapes.update(residual_block_shapes("encoder.mid_block.resnets.0", width, width))
        shapes.update(attention_shapes("encoder.mid_block.attentions.0", width))
        shapes.update(residual_block_shapes("encoder.mid_block.resnets.1", width, width))
        shapes["encoder.norm_out.gamma"] = (width, 1, 1, 1)
        shapes.update(conv_shapes("encoder.conv_out", width, 2 * self.z_dim, 3))
        shapes.update(conv_shapes("quant_conv", 2 * self.z_dim, 2 * self.z_dim, 1))
        return shapes


@dataclass(frozen=True)
class UpStage:
    """One resolution of the decoder.

    Attributes:
        in_channels, out_channels: widths of its residual blocks at entry and exit.
        num_blocks: residual blocks; the first one changes the width.
        up_channels: width after the up-sampling that ends the stage; None where nothing does.
        factor_t: 2 where the up-sampling also doubles time (a `time_conv` is present). On one
            frame this changes nothing but the duplicating shortcut of the residual family.
    """

    in_channels: int
    out_channels: int
    num_blocks: int
    up_channels: int | None
    factor_t: int


@dataclass(frozen=True)
class DecoderTopology(Topology):
    """All that is needed to build the 2-D decoder, and the constants that denormalise latents.

    Attributes:
        out_channels: channels before patches are unfolded (12 for Cosmos3).
        stages: from the lowest resolution to the highest; with `residual`, each that up-samples
            has a duplicating shortcut.
    """

    part = "decoder"
    outer_conv = "post_quant_conv"

    out_channels: int
    stages: tuple[UpStage, ...]

    @cached_property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        upsamplings = sum(stage.up_channels is not None for stage in self.stages)
        return int(self.patch_size * 2**upsamplings)

    @classmethod
    def from_config(cls, config: Any) -> DecoderTopology:
        values = ConfigValues.read(config)
        out_channels = values.pixel_channels(config, "out_channels")
        base_dim = read_config(config, "decoder_base_dim")
        base_dim = values.base_dim if base_dim is None else config_int("decoder_base_dim", base_dim)
        multipliers = values.multipliers[::-1]
        widths = [base_dim * m for m in (multipliers[0], *multipliers)]
        temporal = values.temporal[::-1]
        stages: list[UpStage] = []
        for i, (entry, width) in enumerate(pairwise(widths)):
            upsamples = i != len(multipliers) - 1
            stage = UpStage(
                in_channels=entry if values.residual or i == 0 else entry // 2,
                out_channels=width,
                num_blocks=values.num_blocks + 1,
                up_channels=(width if values.residual else width // 2) if upsamples else None,
                factor_t=2 if upsamples and temporal[i] else 1,
            )
            if values.residual and upsamples and 4 * stage.factor_t * width % stage.in_channels:
                raise UnsupportedVAEError(
                    f"config: the duplicating shortcut of stage {i} must repeat its channels "
                    f"evenly, got {stage.in_channels} for {width}x{4 * stage.factor_t} values"
                )
            stages.append(stage)
        return cls(
            out_channels=out_channels,
            patch_size=values.patch_size,
            z_dim=values.z_dim,
            residual=values.residual,
            stages=tuple(stages),
            latents_mean=values.latents_mean,
            latents_std=values.latents_std,
        )

    def block_names(self) -> list[tuple[list[str], str | None]]:
        """Per stage, the 3-D names of its blocks in order and of its up-sampler."""
        names: list[tuple[list[str], str | None]] = []
        for i, stage in enumerate(self.stages):
            root = f"decoder.up_blocks.{i}"
            blocks = [f"{root}.resnets.{j}" for j in range(stage.num_blocks)]
            upsampler = f"{root}.upsampler" if self.residual else f"{root}.upsamplers.0"
            names.append((blocks, None if stage.up_channels is None else upsampler))
        return names

    def resamplers(self) -> dict[str, int]:
        pairs = zip(self.block_names(), self.stages, strict=True)
        return {name: stage.factor_t for (_, name), stage in pairs if name is not None}

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes = dict(conv_shapes("post_quant_conv", self.z_dim, self.z_dim, 1))
        width = self.stages[0].in_channels
        shapes.update(conv_shapes("decoder.conv_in", self.z_dim, width, 3))
        shapes.update(residual_block_shapes("decoder.mid_block.resnets.0", width, width))
        shapes.update(attention_shapes("decoder.mid_block.attentions.0", width))
        shapes.update(residual_block_shapes("decoder.mid_block.resnets.1", width, width))
        for stage, (blocks, upsampler) in zip(self.stages, self.block_names(), strict=True):
            width = stage.in_channels
            for name in blocks:
                shapes.update(residual_block_shapes(name, width, stage.out_channels))
                width = stage.out_channels
            if upsampler is not None and stage.up_channels is not None:
                shapes[f"{upsampler}.resample.1.weight"] = (stage.up_channels, width, 3, 3)
                shapes[f"{upsampler}.resample.1.bias"] = (stage.up_channels,)
                if stage.factor_t == 2:
                    shapes[f"{upsampler}.time_conv.weight"] = (2 * width, width, 3, 1, 1)
                    shapes[f"{upsampler}.time_conv.bias"] = (2 * width,)
        width = self.stages[-1].out_channels
        shapes["decoder.norm_out.gamma"] = (width, 1, 1, 1)
        shapes.update(conv_shapes("decoder.conv_out", width, self.out_channels, 3))
        return shapes


def conv_shapes(
    name: str, in_channels: int, out_channels: int, k: int
) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_channels, in_channels, k, k, k)
    yield f"{name}.bias", (out_channels,)


def residual_block_shapes(
    name: str, in_channels: int, out_channels: int
) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm1.gamma", (in_channels, 1, 1, 1)
    yield from conv_shapes(f"{name}.conv1", in_channels, out_channels, 3)
    yield f"{name}.norm2.gamma", (out_channels, 1, 1, 1)
    yield from conv_shapes(f"{name}.conv2", out_channels, out_channels, 3)
    if in_channels != out_channels:
        yield from conv_shapes(f"{name}.conv_shortcut", in_channels, out_channels, 1)


def attention_shapes(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a norm and the 1x1 convolutions around single-head attention."""
    yield f"{name}.norm.gamma", (channels, 1, 1)
    yield f"{name}.to_qkv.weight", (3 * channels, channels, 1, 1)
    yield f"{name}.to_qkv.bias", (3 * channels,)
    yield f"{name}.proj.weight", (channels, channels, 1, 1)
    yield f"{name}.proj.bias", (channels,)
