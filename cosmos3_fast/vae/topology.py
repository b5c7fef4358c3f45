"""The structure of a Wan-family VAE's encoder, and what it shares with that of the decoder.

`Topology` is the shared part: names and shapes of blocks, and the check that a state dict has
exactly the tensors that its configuration describes. Three families share the tensor names used
here (those of diffusers, SGLang and vLLM-Omni):

- Wan2.2, which Cosmos3 uses: `is_residual=True`, `patch_size=2`; one `down_blocks.i` per stage.
- Wan2.1: `is_residual=False`, no patches; `down_blocks` is a flat list of blocks.
- Qwen-Image: as Wan2.1, its configuration calls the input channels `input_channels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self

from cosmos3_fast.arguments import LARGEST, as_int, quoted
from cosmos3_fast.frames import TEMPORAL_FACTOR

Shape = tuple[int, ...]

# The class defaults of AutoencoderKLWan in diffusers 0.42, for keys a configuration leaves out.
# The latent statistics have no default here: guessed statistics are wrong latents.
_CONFIG_DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),
    "temperal_downsample": (False, True, True),
    "is_residual": False,
    "patch_size": None,
}

_LISTED = 4
_NAME = 120
# Far beyond every VAE of the family, and little enough to be listed at once.
_MOST_STAGES = 16
_MOST_BLOCKS = 64
# Smaller deviations make latents that no 16-bit number holds.
_LEAST_STD = 1e-6


class UnsupportedVAEError(ValueError):
    """The VAE is not one that the 2-D networks reproduce; the message names what differs."""


def read_config(config: Any, name: str, default: Any = None) -> Any:
    """`config[name]` of a mapping or `config.name` of any other object, else `default`."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def read_factors(config: Any) -> tuple[int, int]:
    """Pixels per latent cell and pixel frames per latent frame, as the structure makes them.

    Configurations also state them (`scale_factor_spatial`), but not all do, and a class default may
    be another family's. What is stated counts only where there is no structure.
    """
    multipliers = read_config(config, "dim_mult")
    if multipliers is None:
        return (
            int(read_config(config, "scale_factor_spatial", 16)),
            int(read_config(config, "scale_factor_temporal", TEMPORAL_FACTOR)),
        )
    default = _CONFIG_DEFAULTS["temperal_downsample"]
    halvings = len(multipliers) - 1
    temporal = list(read_config(config, "temperal_downsample") or default)[:halvings]
    patch_size = read_config(config, "patch_size") or 1
    return int(patch_size) * 2**halvings, 2 ** sum(map(bool, temporal))


@dataclass(frozen=True)
class ConfigValues:
    """The values of a VAE configuration that describe its networks, checked one by one.

    Attributes:
        base_dim: width of the encoder.
        multipliers: of the width, per stage of the encoder.
        num_blocks: residual blocks per stage of the encoder.
        temporal: per stage but the last, whether the encoder halves time there.
        attention_scales: resolutions of the encoder with attention, 1 for the first stage.
        z_dim, patch_size, residual, latents_mean, latents_std: see `Topology`.
    """

    base_dim: int
    multipliers: tuple[int, ...]
    num_blocks: int
    temporal: tuple[bool, ...]
    attention_scales: tuple[Any, ...]
    z_dim: int
    patch_size: int
    residual: bool
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def read(cls, config: Any) -> ConfigValues:
        """Take them from a mapping, or from an object with the same names as attributes.

        Raises:
            UnsupportedVAEError: a value is missing or cannot be used.
        """
        values = {key: read_config(config, key, value) for key, value in _CONFIG_DEFAULTS.items()}
        z_dim = config_int("z_dim", values["z_dim"])
        patch_size = values["patch_size"]
        multipliers = _sequence("dim_mult", values["dim_mult"])
        if not multipliers:
            raise UnsupportedVAEError("config: dim_mult is empty")
        if len(multipliers) > _MOST_STAGES:
            raise UnsupportedVAEError(
                f"config: dim_mult has {len(multipliers)} values, wanted at most {_MOST_STAGES}"
            )
        temporal = _sequence("temperal_downsample", values["temperal_downsample"])
        if len(temporal) < len(multipliers) - 1:
            raise UnsupportedVAEError(
                f"config: temperal_downsample has {len(temporal)} values for "
                f"{len(multipliers)} stages, wanted at least {len(multipliers) - 1}"
            )
        return cls(
            base_dim=config_int("base_dim", values["base_dim"]),
            multipliers=tuple(config_int("dim_mult", m) for m in multipliers),
            num_blocks=config_int("num_res_blocks", values["num_res_blocks"], _MOST_BLOCKS),
            temporal=tuple(_flag("temperal_downsample", each) for each in temporal),
            attention_scales=_sequence("attn_scales", values["attn_scales"]),
            z_dim=z_dim,
            patch_size=1 if patch_size is None else config_int("patch_size", patch_size),
            residual=_flag("is_residual", values["is_residual"]),
            latents_mean=_statistics(config, "latents_mean", z_dim),
            latents_std=_statistics(config, "latents_std", z_dim),
        )

    def pixel_channels(self, config: Any, name: str) -> int:
        """`config[name]` (Qwen-Image: `input_channels`), which must be the colors of a patch."""
        channels = read_config(config, name, read_config(config, "input_channels", 3))
        if config_int(name, channels) != 3 * self.patch_size**2:
            raise UnsupportedVAEError(
                f"config: {name}={channels}, wanted 3·patch_size² = {3 * self.patch_size**2}"
            )
        return int(channels)


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
            f"{name} is missing, wanted {list(wanted[name])}"
            for name in wanted.keys() - found.keys()
        ]
        faults += [
            f"{name} has shape {quoted(list(found[name]))}, wanted {list(wanted[name])}"
            for name in wanted.keys() & found.keys()
            if found[name] != wanted[name]
        ]
        faults += [
            f"{name[:_NAME]} with shape {quoted(list(found[name]))} is unexpected"
            for name in found.keys() - wanted.keys()
        ]
        if faults:
            faults.sort()
            more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
            raise UnsupportedVAEError(
                f"the {cls.part}'s tensors do not match its config: "
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
    """

    part = "encoder"
    outer_conv = "quant_conv"

    in_channels: int
    stages: tuple[Stage, ...]

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        downsamplings = sum(stage.downsample for stage in self.stages)
        return int(self.patch_size * 2**downsamplings)

    @property
    def packed_channels(self) -> int:
        """`in_channels`, and zeros to whole vectors of 16 bytes in 16 bits, which a GPU's
        convolution would make for itself. Plain colors are left as they are."""
        return self.in_channels if self.patch_size == 1 else -(-self.in_channels // 8) * 8

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return math.prod(stage.factor_t for stage in self.stages)

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
                        f"config: the average shortcut of stage {i} cannot spread "
                        f"{stage.in_channels}x{factor} values over {stage.out_channels} channels"
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
        return slice(0, self.z_dim if name.startswith("quant_conv.") else None)

    @property
    def output_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the network's output channels are normalised with."""
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
class PosteriorTopology(EncoderTopology):
    """The encoder with all `2 z_dim` channels of its posterior, on the VAE's own scale."""

    def rows(self, name: str) -> slice:
        return slice(None)

    @property
    def output_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * (2 * self.z_dim), (1.0,) * (2 * self.z_dim)


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
    """Of a norm and the 1x1 convolutions around single-head attention."""
    yield f"{name}.norm.gamma", (channels, 1, 1)
    yield f"{name}.to_qkv.weight", (3 * channels, channels, 1, 1)
    yield f"{name}.to_qkv.bias", (3 * channels,)
    yield f"{name}.proj.weight", (channels, channels, 1, 1)
    yield f"{name}.proj.bias", (channels,)


def config_int(name: str, value: Any, most: int = LARGEST) -> int:
    number = as_int(value)
    if number is None or not 1 <= number <= most:
        limit = "" if most == LARGEST else f" of at most {most}"
        raise UnsupportedVAEError(
            f"config: {name}={quoted(value)}, wanted a positive integer{limit}"
        )
    return number


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False or as_int(value) in (0, 1):
        return bool(value)
    raise UnsupportedVAEError(f"config: {name} holds {quoted(value)}, wanted true or false")


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UnsupportedVAEError(f"config: {name}={quoted(value)}, wanted a list")
    return tuple(value)


def _statistics(config: Any, name: str, z_dim: int) -> tuple[float, ...]:
    value = read_config(config, name)
    if value is None:
        raise UnsupportedVAEError(f"config: {name} is missing, wanted {z_dim} numbers")
    if not isinstance(value, list | tuple) or len(value) != z_dim:
        size = f"{len(value)} values" if isinstance(value, list | tuple) else quoted(value)
        raise UnsupportedVAEError(f"config: {name} has {size}, wanted z_dim={z_dim} numbers")
    numbers = tuple(map(_finite, value))
    for i, number in enumerate(numbers):
        if number is None or (name == "latents_std" and number <= _LEAST_STD):
            wanted = f", wanted more than {_LEAST_STD:g}" if name == "latents_std" else ""
            raise UnsupportedVAEError(
                f"config: {name}[{i}]={quoted(value[i])} is not a usable number{wanted}"
            )
    return tuple(number for number in numbers if number is not None)


def _finite(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
