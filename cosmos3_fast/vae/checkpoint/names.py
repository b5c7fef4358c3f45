"""The tensor names of the original Wan VAEs (also ComfyUI's files), and what such files leave out.

Wan 2.1 and Qwen-Image list the blocks of all stages in one sequence, Wan 2.2 one sequence per
stage. A file without `config.json` says nothing about its latent statistics: those are the
family's, which is told by the number of latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cosmos3_fast.vae.topology import Shape, UnsupportedVAEError

_MARK = "encoder.conv1.weight"

_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_WHOLE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_ENDS = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}
# Per stage of the Wan 2.1 decoder: num_res_blocks + 1 residual blocks, then the up-sampler.
_DECODER_STAGE = 4
_RESAMPLING = re.compile(r"(resample|time_conv)\b")

_WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
_WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
_FAMILIES: dict[int, dict[str, Any]] = {
    16: {"latents_mean": list(_WAN21_MEAN), "latents_std": list(_WAN21_STD)},
    48: {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "decoder_base_dim": 256,
        "latents_mean": list(_WAN22_MEAN),
        "latents_std": list(_WAN22_STD),
    },
}


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """By each name of a checkpoint, diffusers' name; the same where it has those already."""
    names = list(names)
    original = _MARK in names
    return {name: _diffusers_name(name) if original else name for name in names}


def _diffusers_name(name: str) -> str:
    network, _, rest = name.partition(".")
    if network in _WHOLE:
        return f"{_WHOLE[network]}.{rest}"
    if network not in ("encoder", "decoder"):
        return name
    for old, new in _ENDS.items():
        if rest.startswith(f"{old}."):
            return f"{network}.{new}.{_in_block(rest.removeprefix(f'{old}.'))}"
    match = re.fullmatch(r"(down|up)samples\.(\d+)\.(?:\1samples\.(\d+)\.)?(.+)", rest)
    if match is None:
        return name
    way, i, j, last = match[1], int(match[2]), match[3], match[4]
    blocks = f"{network}.{way}_blocks"
    resampling = _RESAMPLING.match(last) is not None
    if j is not None:
        return (
            f"{blocks}.{i}.{way}sampler.{last}"
            if resampling
            else (f"{blocks}.{i}.resnets.{j}.{_in_block(last)}")
        )
    if way == "down":
        return f"{blocks}.{i}.{last if resampling else _in_block(last)}"
    stage, place = divmod(i, _DECODER_STAGE)
    if resampling:
        return f"{blocks}.{stage}.upsamplers.0.{last}"
    return f"{blocks}.{stage}.resnets.{place}.{_in_block(last)}"


def _in_block(rest: str) -> str:
    for old, new in _BLOCK.items():
        if rest.startswith(f"{old}."):
            return f"{new}.{rest.removeprefix(f'{old}.')}"
    return rest


def family_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The configuration of a checkpoint that has none, by its number of latent channels.

    Widths are the file's own: smaller VAEs of a family share its latents.

    Args:
        shapes: by diffusers' names.

    Raises:
        UnsupportedVAEError: it is of no family that is known.
    """
    quant, first = shapes.get("quant_conv.weight"), shapes.get("encoder.conv_in.weight")
    z_dim = quant[0] // 2 if quant else None
    if not first or z_dim not in _FAMILIES:
        found = "no quant_conv.weight" if z_dim is None else f"{z_dim} latent channels"
        raise UnsupportedVAEError(
            f"a file without config.json must be of Wan 2.1 (16 latent channels) or Wan 2.2 (48), "
            f"got {found}"
        )
    return {"base_dim": first[0], "z_dim": z_dim, **_FAMILIES[z_dim]}
