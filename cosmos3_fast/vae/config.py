"""A VAE's configuration, read value by value: what describes its networks, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_fast.arguments import LARGEST, as_int, quoted
from cosmos3_fast.frames import TEMPORAL_FACTOR

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
        if not 1 <= len(multipliers) <= _MOST_STAGES:
            raise UnsupportedVAEError(
                f"config: dim_mult must have 1 to {_MOST_STAGES} values, got {len(multipliers)}"
            )
        temporal = _sequence("temperal_downsample", values["temperal_downsample"])
        if len(temporal) < len(multipliers) - 1:
            raise UnsupportedVAEError(
                f"config: temperal_downsample must have at least {len(multipliers) - 1} values "
                f"for {len(multipliers)} stages, got {len(temporal)}"
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
                f"config: {name} must be 3·patch_size² = {3 * self.patch_size**2}, got {channels}"
            )
        return int(channels)


def config_int(name: str, value: Any, most: int = LARGEST) -> int:
    number = as_int(value)
    if number is None or not 1 <= number <= most:
        limit = "" if most == LARGEST else f" of at most {most}"
        raise UnsupportedVAEError(
            f"config: {name} must be a positive integer{limit}, got {quoted(value)}"
        )
    return number


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False or as_int(value) in (0, 1):
        return bool(value)
    raise UnsupportedVAEError(f"config: {name} must be true or false, got {quoted(value)}")


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UnsupportedVAEError(f"config: {name} must be a list, got {quoted(value)}")
    return tuple(value)


def _statistics(config: Any, name: str, z_dim: int) -> tuple[float, ...]:
    value = read_config(config, name)
    if value is None:
        raise UnsupportedVAEError(f"config: {name} must be z_dim={z_dim} numbers, got none")
    if not isinstance(value, list | tuple) or len(value) != z_dim:
        size = f"{len(value)} values" if isinstance(value, list | tuple) else quoted(value)
        raise UnsupportedVAEError(f"config: {name} must be z_dim={z_dim} numbers, got {size}")
    numbers = tuple(map(_finite, value))
    for i, number in enumerate(numbers):
        if number is None or (name == "latents_std" and number <= _LEAST_STD):
            least = f" above {_LEAST_STD:g}" if name == "latents_std" else ""
            raise UnsupportedVAEError(
                f"config: {name}[{i}] must be a finite number{least}, got {quoted(value[i])}"
            )
    return tuple(number for number in numbers if number is not None)


def _finite(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
