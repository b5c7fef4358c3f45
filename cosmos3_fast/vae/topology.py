"""The structure of a Wan-family VAE encoder, and the check that a state dict has exactly it.

Three families share the tensor names used here (those of diffusers, SGLang and vLLM-Omni):

- Wan2.2, which Cosmos3 uses: `is_residual=True`, `patch_size=2`; one `down_blocks.i` per stage.
- Wan2.1: `is_residual=False`, no patches; `down_blocks` is a flat list of blocks.
- Qwen-Image: as Wan2.1, its configuration calls the input channels `input_channels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
    """The VAE is not one that the 2-D encoder reproduces; the message names what differs."""


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


def is_encoder_tensor(name: str) -> bool:
    """Whether a VAE's state-dict entry takes part in encoding."""
    return name.startswith(("encoder.", "quant_conv."))


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
class EncoderTopology:
    """All that is needed to build the 2-D encoder, and the constants that normalise its latents.

    Attributes:
        in_channels: channels after patches are folded in (12 for Cosmos3).
        patch_size: edge of a patch in pixels, 1 for none.
        z_dim: latent channels.
        residual: each stage has an average-pooling shortcut (Wan2.2).
        stages: from the highest resolution to the lowest.
        latents_mean, latents_std: `z_dim` values each.
    """

    in_channels: int
    patch_size: int
    z_dim: int
    residual: bool
    stages: tuple[Stage, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, along height and along width."""
        downsamplings = sum(stage.downsample for stage in self.stages)
        return int(self.patch_size * 2**downsamplings)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return math.prod(stage.factor_t for stage in self.stages)

    @classmethod
    def from_config(cls, config: Any) -> EncoderTopology:
        """Read a VAE configuration: a mapping, or an object with the same names as attributes.

        Raises:
            UnsupportedVAEError: a value is missing or makes no encoder.
        """
        values = {key: read_config(config, key, value) for key, value in _CONFIG_DEFAULTS.items()}
        base_dim = _positive_int("base_dim", values["base_dim"])
        z_dim = _positive_int("z_dim", values["z_dim"])
        num_blocks = _positive_int("num_res_blocks", values["num_res_blocks"], _MOST_BLOCKS)
        patch_size = values["patch_size"]
        patch_size = 1 if patch_size is None else _positive_int("patch_size", patch_size)
        in_channels = _positive_int(
            "in_channels",
            read_config(config, "in_channels", read_config(config, "input_channels", 3)),
        )
        if in_channels != 3 * patch_size**2:
            raise UnsupportedVAEError(
                f"config: in_channels={in_channels}, wanted 3·patch_size² = {3 * patch_size**2}"
            )
        multipliers = _sequence("dim_mult", values["dim_mult"])
        if not multipliers:
            raise UnsupportedVAEError("config: dim_mult is empty")
        if len(multipliers) > _MOST_STAGES:
            raise UnsupportedVAEError(
                f"config: dim_mult has {len(multipliers)} values, wanted at most {_MOST_STAGES}"
            )
        residual = _flag("is_residual", values["is_residual"])
        temporal = _sequence("temperal_downsample", values["temperal_downsample"])
        if len(temporal) < len(multipliers) - 1:
            raise UnsupportedVAEError(
                f"config: temperal_downsample has {len(temporal)} values for "
                f"{len(multipliers)} stages, wanted at least {len(multipliers) - 1}"
            )
        attention_scales = _sequence("attn_scales", values["attn_scales"])
        widths = [base_dim] + [base_dim * _positive_int("dim_mult", m) for m in multipliers]
        last = len(multipliers) - 1
        stages = tuple(
            Stage(
                in_channels=widths[i],
                out_channels=widths[i + 1],
                num_blocks=num_blocks,
                attention=not residual and 0.5**i in attention_scales,
                downsample=i != last,
                factor_t=2 if i != last and _flag("temperal_downsample", temporal[i]) else 1,
            )
            for i in range(len(multipliers))
        )
        if residual:
            for i, stage in enumerate(stages):
                factor = stage.factor_t * (4 if stage.downsample else 1)
                if stage.in_channels * factor % stage.out_channels:
                    raise UnsupportedVAEError(
                        f"config: the average shortcut of stage {i} cannot spread "
                        f"{stage.in_channels}x{factor} values over {stage.out_channels} channels"
                    )
        return cls(
            in_channels=in_channels,
            patch_size=patch_size,
            z_dim=z_dim,
            residual=residual,
            stages=stages,
            latents_mean=_statistics(config, "latents_mean", z_dim),
            latents_std=_statistics(config, "latents_std", z_dim),
        )

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, Shape], config: Any) -> EncoderTopology:
        """The topology that both the configuration and the tensors describe.

        Args:
            shapes: shape per name of the 3-D VAE's state dict; names outside `encoder.` and
                `quant_conv.` are ignored.
            config: see `from_config`.

        Raises:
            UnsupportedVAEError: a tensor is missing, misshapen or unexpected. The message gives
                its name, its shape and the wanted shape.
        """
        topology = cls.from_config(config)
        wanted = topology.tensor_shapes()
        found = {name: tuple(s) for name, s in shapes.items() if is_encoder_tensor(name)}
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
                "the encoder's tensors do not match its config: "
                + "; ".join(faults[:_LISTED])
                + more
            )
        return topology

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

    def tensor_shapes(self) -> dict[str, Shape]:
        """Name and shape of every encoder tensor in the 3-D VAE's state dict."""
        shapes = dict(_conv("encoder.conv_in", self.in_channels, self.stages[0].in_channels, 3))
        for stage, (blocks, downsampler) in zip(self.stages, self.block_names(), strict=True):
            width = stage.in_channels
            for j, name in enumerate(blocks):
                if stage.attention and j % 2:
                    shapes.update(_attention(name, width))
                else:
                    shapes.update(_residual_block(name, width, stage.out_channels))
                    width = stage.out_channels
            if downsampler is not None:
                shapes[f"{downsampler}.resample.1.weight"] = (width, width, 3, 3)
                shapes[f"{downsampler}.resample.1.bias"] = (width,)
                if stage.factor_t == 2:
                    shapes[f"{downsampler}.time_conv.weight"] = (width, width, 3, 1, 1)
                    shapes[f"{downsampler}.time_conv.bias"] = (width,)
        width = self.stages[-1].out_channels
        shapes.update(_residual_block("encoder.mid_block.resnets.0", width, width))
        shapes.update(_attention("encoder.mid_block.attentions.0", width))
        shapes.update(_residual_block("encoder.mid_block.resnets.1", width, width))
        shapes["encoder.norm_out.gamma"] = (width, 1, 1, 1)
        shapes.update(_conv("encoder.conv_out", width, 2 * self.z_dim, 3))
        shapes.update(_conv("quant_conv", 2 * self.z_dim, 2 * self.z_dim, 1))
        return shapes


def _conv(name: str, in_channels: int, out_channels: int, k: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out_channels, in_channels, k, k, k)
    yield f"{name}.bias", (out_channels,)


def _residual_block(name: str, in_channels: int, out_channels: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm1.gamma", (in_channels, 1, 1, 1)
    yield from _conv(f"{name}.conv1", in_channels, out_channels, 3)
    yield f"{name}.norm2.gamma", (out_channels, 1, 1, 1)
    yield from _conv(f"{name}.conv2", out_channels, out_channels, 3)
    if in_channels != out_channels:
        yield from _conv(f"{name}.conv_shortcut", in_channels, out_channels, 1)


def _attention(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm.gamma", (channels, 1, 1)
    yield f"{name}.to_qkv.weight", (3 * channels, channels, 1, 1)
    yield f"{name}.to_qkv.bias", (3 * channels,)
    yield f"{name}.proj.weight", (channels, channels, 1, 1)
    yield f"{name}.proj.bias", (channels,)


def _positive_int(name: str, value: Any, most: int = LARGEST) -> int:
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
