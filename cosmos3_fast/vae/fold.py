"""The algebra that turns the 3-D VAE encoder into 2-D networks, and what the decoder's shares.

`fold_encoder` is for one frame, `fold_clip` adds what later frames need; the decoder's fold is
`decoder_fold`. Every fold is computed in fp64 on the CPU and rounded once, to the target dtype;
tensors that only move keep their bits. `read(name)` returns a tensor of the 3-D state dict; a
reader may return only the part that is used (the last temporal slice, the mean half of
`quant_conv`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cosmos3_fast.vae.topology import EncoderTopology

Read = Callable[[str], Tensor]


class Fold:
    """Collects a folded state dict, and folds the blocks that both networks have.

    Args:
        read: see the module.
        dtype: of the result.

    Attributes:
        tensors: the state dict so far.
        read: as given.
    """

    def __init__(self, read: Read, dtype: torch.dtype) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.read = read
        self._dtype = dtype

    def put(self, name: str, tensor: Tensor) -> None:
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        self.tensors[name] = tensor.to(self._dtype, copy=True, memory_format=layout)

    def conv(self, source: str, target: str) -> None:
        """A causal or 2-D convolution."""
        self.put(f"{target}.weight", spatial_taps(self.read(f"{source}.weight")))
        self.put(f"{target}.bias", self.read(f"{source}.bias"))

    def residual_block(self, source: str, target: str, has_shortcut: bool = False) -> None:
        """To a `layers.ResidualBlock`; the bias of a shortcut goes into that of `conv2`."""
        for norm in ("norm1", "norm2"):
            self.put(f"{target}.{norm}.weight", self.read(f"{source}.{norm}.gamma").flatten())
        self.conv(f"{source}.conv1", f"{target}.conv1")
        self.put(f"{target}.conv2.weight", spatial_taps(self.read(f"{source}.conv2.weight")))
        bias = self.read(f"{source}.conv2.bias")
        if has_shortcut:
            weight = spatial_taps(self.read(f"{source}.conv_shortcut.weight"))
            self.put(f"{target}.shortcut.weight", weight)
            bias = bias.double() + self.read(f"{source}.conv_shortcut.bias").double()
        self.put(f"{target}.conv2.bias", bias)

    def attention(self, source: str, target: str) -> None:
        """To a `layers.Attention`."""
        weight, bias = attention(
            self.read(f"{source}.norm.gamma"),
            self.read(f"{source}.to_qkv.weight"),
            self.read(f"{source}.to_qkv.bias"),
            self.read(f"{source}.proj.weight"),
            self.read(f"{source}.proj.bias"),
        )
        self.put(f"{target}.qkv.weight", weight)
        self.put(f"{target}.qkv.bias", bias)

    def middle(self, part: str) -> None:
        """The block between the stages of `part`, "encoder" or "decoder"."""
        self.residual_block(f"{part}.mid_block.resnets.0", "middle.0")
        self.attention(f"{part}.mid_block.attentions.0", "middle.1")
        self.residual_block(f"{part}.mid_block.resnets.1", "middle.2")


def fold_encoder(topology: EncoderTopology, read: Read, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of `FrameEncoder(topology)`, on the CPU, in `dtype`."""
    fold = Fold(read, dtype)
    fold.put("conv_in.weight", packed_order(spatial_taps(read("encoder.conv_in.weight")), topology))
    fold.put("conv_in.bias", read("encoder.conv_in.bias"))
    for i, (stage, (blocks, downsampler)) in enumerate(
        zip(topology.stages, topology.block_names(), strict=True)
    ):
        changes_width = stage.in_channels != stage.out_channels
        for j, source in enumerate(blocks):
            target = f"stages.{i}.blocks.{j}"
            if stage.attention and j % 2:
                fold.attention(source, target)
            else:
                fold.residual_block(source, target, j == 0 and changes_width)
        if downsampler is not None:
            fold.conv(f"{downsampler}.resample.1", f"stages.{i}.downsample.conv")
    fold.middle("encoder")
    fold.put("norm_out.weight", read("encoder.norm_out.gamma").flatten())
    weight, bias = head(
        read("encoder.conv_out.weight"),
        read("encoder.conv_out.bias"),
        read("quant_conv.weight"),
        read("quant_conv.bias"),
        *topology.output_statistics,
    )
    fold.put("conv_out.weight", weight)
    fold.put("conv_out.bias", bias)
    return fold.tensors


def fold_clip(
    topology: EncoderTopology, read: Read, read_earlier: Read, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The state dict of `ClipEncoder(topology)`, on the CPU, in `dtype`.

    Args:
        topology: the structure.
        read: as for `fold_encoder`.
        read_earlier: the temporal taps before the last one, [Cout, Cin, kT-1, kH, kW], of a 3-D
            convolution.
        dtype: of the result.
    """
    fold = Fold(read, dtype)

    def earlier(target: str, weight: Tensor) -> None:
        for i, tap in enumerate(weight.unbind(2)):
            fold.put(f"{target}.earlier.{i}.weight", tap)

    def residual_block(source: str, target: str) -> None:
        for conv in ("conv1", "conv2"):
            earlier(f"{target}.{conv}", read_earlier(f"{source}.{conv}.weight"))

    earlier("conv_in", packed_order(read_earlier("encoder.conv_in.weight"), topology))
    for i, (stage, (blocks, downsampler)) in enumerate(
        zip(topology.stages, topology.block_names(), strict=True)
    ):
        for j, source in enumerate(blocks[:: 2 if stage.attention else 1]):
            residual_block(source, f"stages.{i}.blocks.{j}")
        if stage.factor_t == 2:
            name = f"{downsampler}.time_conv"
            taps = torch.cat([read_earlier(f"{name}.weight"), read(f"{name}.weight")[:, :, -1:]], 2)
            fold.put(f"stages.{i}.time_conv.weight", side_by_side(taps))
            fold.put(f"stages.{i}.time_conv.bias", read(f"{name}.bias"))
    for j in range(2):
        residual_block(f"encoder.mid_block.resnets.{j}", f"middle.{j}")
    weight = read_earlier("encoder.conv_out.weight")
    earlier("conv_out", head_weight(weight, read("quant_conv.weight"), topology.latents_std))
    first = fold_encoder(topology, read, dtype)
    return {**{f"first.{name}": tensor for name, tensor in first.items()}, **fold.tensors}


def float64(values: tuple[float, ...]) -> Tensor:
    """On the CPU, whatever the default device."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def spatial_taps(weight: Tensor) -> Tensor:
    """The 2-D kernel that a causal 3-D kernel is on the first frame.

    A causal convolution computes `y[0] = Σ_τ W[τ] * x[τ - (kT-1)]`. Frames before the first are
    zeros, so only τ = kT-1 remains: `y[0] = W[kT-1] * x[0]`.

    Args:
        weight: [Cout, Cin, kT, kH, kW]; a 2-D kernel [Cout, Cin, kH, kW] is returned as it is.

    Returns:
        [Cout, Cin, kH, kW], a view.
    """
    return weight[:, :, -1] if weight.dim() == 5 else weight


def unshuffle_order(weight: Tensor, patch_size: int) -> Tensor:
    """Reorder input channels for `torch.nn.functional.pixel_unshuffle`.

    The VAE's patches are laid out (channel, column, row), pixel_unshuffle's (channel, row,
    column); permuting the first convolution's input channels lets the latter serve.

    Args:
        weight: [Cout, C·p², kH, kW], or [Cout, C·p², kT, kH, kW].
    """
    cells = weight.unflatten(1, (-1, patch_size, patch_size))
    return cells.transpose(2, 3).flatten(1, 3)


def packed_order(weight: Tensor, topology: EncoderTopology) -> Tensor:
    """`unshuffle_order`, and zeros for the channels that packing adds."""
    ordered = unshuffle_order(weight, topology.patch_size)
    missing = topology.packed_channels - ordered.shape[1]
    return torch.cat([ordered, torch.zeros_like(ordered[:, :1]).repeat_interleave(missing, 1)], 1)


def attention(
    gamma: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """One linear layer in place of norm scale, to_qkv, the scale of the scores and proj.

    With n = x/‖x‖, D = diag(√C·gamma) and softmax weights P whose rows sum to one:
    `to_qkv(D n) = (W D) n + b`, and
    `Wp (P (Wv D n + bv)) + bp = P ((Wp Wv D) n + (Wp bv + bp))`. The scores q·k/√C are those of
    q/√C.

    Args:
        gamma: [C, 1, 1]; qkv_weight: [3C, C, 1, 1]; proj_weight: [C, C, 1, 1]; biases to match.

    Returns:
        Weight [3C, C] and bias [3C] in fp64.
    """
    scale = gamma.double().flatten()
    weight = qkv_weight.double().flatten(1) * (scale * scale.numel() ** 0.5)
    bias = qkv_bias.to(torch.float64, copy=True)
    channels = weight.shape[1]
    weight[:channels] /= channels**0.5
    bias[:channels] /= channels**0.5
    proj = proj_weight.double().flatten(1)
    value_weight = proj @ weight[2 * channels :]
    value_bias = proj @ bias[2 * channels :] + proj_bias.double()
    return (
        torch.cat([weight[: 2 * channels], value_weight]),
        torch.cat([bias[: 2 * channels], value_bias]),
    )


def head(
    conv_weight: Tensor,
    conv_bias: Tensor,
    quant_weight: Tensor,
    quant_bias: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """`conv_out`, the mean half of `quant_conv`, and `(z - mean) / std` as one convolution.

    With Wq, bq the first `z_dim` rows of the 1x1x1 `quant_conv` and W, b the last temporal tap of
    `conv_out`: weight `diag(1/std) Wq W`, bias `(Wq b + bq - mean) / std`. Exact at the borders
    too: `conv_out` pads its input, which comes before all of this.

    Args:
        conv_weight: [2z, C, kT, 3, 3]; conv_bias: [2z].
        quant_weight: [2z or z, 2z, 1, 1, 1]; quant_bias: [2z or z].
        mean, std: z values each.

    Returns:
        Weight [z, C, 3, 3] and bias [z] in fp64.
    """
    channels = len(mean)
    mean64 = float64(mean)
    std64 = float64(std)
    quant = quant_weight[:channels].double().flatten(1)
    weight = head_weight(spatial_taps(conv_weight), quant_weight, std)
    bias = (quant @ conv_bias.double() + quant_bias[:channels].double() - mean64) / std64
    return weight, bias


def head_weight(taps: Tensor, quant_weight: Tensor, std: tuple[float, ...]) -> Tensor:
    """`diag(1/std) Wq W` for one or all temporal taps W of `conv_out`.

    Args:
        taps: [2z, C, 3, 3] or [2z, C, kT, 3, 3].
        quant_weight: [2z or z, 2z, 1, 1, 1].
        std: z values.

    Returns:
        `taps`' shape with z instead of 2z, in fp64.
    """
    quant = quant_weight[: len(std)].double().flatten(1)
    scale = quant / float64(std)[:, None]
    return torch.einsum("zk,k...->z...", scale, taps.double())


def side_by_side(weight: Tensor) -> Tensor:
    """The 2-D kernel that acts as a 3-D one on the frames of a window concatenated by channel.

    `Σ_τ W[τ] x[τ] = [W[0] W[1] …] [x[0]; x[1]; …]`.

    Args:
        weight: [Cout, Cin, kT, kH, kW].

    Returns:
        [Cout, kT·Cin, kH, kW].
    """
    return weight.transpose(1, 2).flatten(1, 2)
