"""The algebra that turns the 3-D VAE decoder into a 2-D network for one frame.

As in `fold`: computed in fp64 on the CPU and rounded once. On the first frame the decoder skips
every `time_conv`, so nothing of those is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos3_fast.vae.decoder_topology import DecoderTopology
from cosmos3_fast.vae.fold import Fold, Read, float64, spatial_taps


def fold_decoder(topology: DecoderTopology, read: Read, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of `FrameDecoder(topology)`, on the CPU, in `dtype`."""
    fold = Fold(read, dtype)
    weight, bias = denormalize(
        read("post_quant_conv.weight"),
        read("post_quant_conv.bias"),
        topology.latents_mean,
        topology.latents_std,
    )
    fold.put("denormalize.weight", weight)
    fold.put("denormalize.bias", bias)
    fold.conv("post_quant_conv", "post_quant")
    fold.conv("decoder.conv_in", "conv_in")
    fold.middle("decoder")
    for i, (stage, (blocks, upsampler)) in enumerate(
        zip(topology.stages, topology.block_names(), strict=True)
    ):
        changes_width = stage.in_channels != stage.out_channels
        for j, source in enumerate(blocks):
            fold.residual_block(source, f"stages.{i}.blocks.{j}", j == 0 and changes_width)
        if upsampler is not None:
            fold.conv(f"{upsampler}.resample.1", f"stages.{i}.upsample")
    fold.put("norm_out.weight", read("decoder.norm_out.gamma").flatten())
    weight = spatial_taps(read("decoder.conv_out.weight"))
    fold.put("conv_out.weight", shuffle_order(weight, topology.patch_size))
    fold.put("conv_out.bias", shuffle_order(read("decoder.conv_out.bias"), topology.patch_size))
    return fold.tensors


def denormalize(
    weight: Tensor, bias: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """`z·std + mean` and `post_quant_conv` as one 1x1 convolution.

    Weight `W diag(std)`, bias `W mean + b`. It goes no further: `conv_in` pads its input with
    zeros, and a bias folded through it would be added outside the image too.

    Args:
        weight: [z, z, 1, 1, 1]; bias: [z].
        mean, std: z values each.

    Returns:
        Weight [z, z, 1, 1] and bias [z] in fp64.
    """
    matrix = spatial_taps(weight).double()
    return (
        matrix * float64(std).view(-1, 1, 1),
        matrix.flatten(1) @ float64(mean) + bias.double(),
    )


def shuffle_order(tensor: Tensor, patch_size: int) -> Tensor:
    """Reorder output channels for `torch.nn.functional.pixel_shuffle`.

    The VAE's patches are laid out (channel, column, row), pixel_shuffle's (channel, row, column).

    Args:
        tensor: [C·p², …], a weight or a bias.
    """
    cells = tensor.unflatten(0, (-1, patch_size, patch_size))
    return cells.transpose(1, 2).flatten(0, 2)
