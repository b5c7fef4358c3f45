"""The structure of a Wan-family VAE's decoder, in the three families of `topology`.

The decoder mirrors the encoder: the lowest resolution first, one block more per stage, `up_blocks`
of one stage each in every family. Wan2.1 and Qwen-Image halve the width where they up-sample;
Wan2.2 has a shortcut around each up-sampling stage, which duplicates its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cosmos3_fast.vae.topology import (
    ConfigValues,
    Shape,
    Topology,
    UnsupportedVAEError,
    attention_shapes,
    config_int,
    conv_shapes,
    read_config,
    residual_block_shapes,
)


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

    @property
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
                    f"config: the duplicating shortcut of stage {i} cannot spread "
                    f"{stage.in_channels} channels over {width}x{4 * stage.factor_t} values"
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
