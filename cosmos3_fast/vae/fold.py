"""The algebra that turns a 3-D VAE into networks of 2-D convolutions.

`fold` makes the state dict of any of them. Everything is computed in float64 and rounded once, to
the target dtype; tensors that only move keep their bits. It is computed on the CPU, but for the
kernels along time of a network for clips, most of what there is to compute: on a GPU if the network
will be there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosmos3_fast.ops.cook_toom import cook_toom_tensors
from cosmos3_fast.vae.config import UnsupportedVAEError
from cosmos3_fast.vae.networks.causal import TAPS, CausalConv, Temporal
from cosmos3_fast.vae.networks.layers import phase_kernels
from cosmos3_fast.vae.topology import DecoderTopology, EncoderTopology, Topology

FLOAT16_MOST = 64000.0
"""What a product in float16 may be at most: the largest float16, 65504, less what rounding of a
kernel, of a transformed frame and of their sum can add."""
FLOAT16_LOSS = 2.0**-10
"""What a kernel may lose when it is rounded to float16, rms, as a part of its own rms: twice the
largest rounding error of a normal number, so that few of its values are subnormal."""


class Taps:
    """The tensors of one part of a VAE's 3-D state dict, read as far as they act.

    Args:
        tensors: tensors, or slices of an open safetensors file, by name.
        topology: of the part.
        device: of the taps of convolutions along time.
    """

    def __init__(
        self, tensors: Mapping[str, Any], topology: Topology, device: torch.device | str = "cpu"
    ) -> None:
        self._tensors = tensors
        self._topology = topology
        self._device = device

    def last(self, name: str) -> Tensor:
        """What acts on a single frame, on the CPU.

        A causal convolution computes `y[0] = Σ_τ W[τ] x[τ - (kT-1)]`. Frames before the first are
        zeros, so of a kernel [Cout, Cin, kT, kH, kW] only τ = kT-1 remains: [Cout, Cin, kH, kW].
        Of anything else it is all, and of both the rows that the topology names.
        """
        part, rows = self._tensors[name], self._topology.rows(name)
        if self._rank(part) == 5:
            return self._finite(name, part[rows, :, -1:])[:, :, 0]
        return self._finite(name, part[rows])

    def all(self, name: str) -> Tensor:
        """All temporal taps of a 3-D convolution, [Cout, Cin, kT, kH, kW]."""
        return self._finite(name, self._tensors[name][:], self._device)

    def _rank(self, part: Any) -> int:
        return part.dim() if isinstance(part, Tensor) else len(part.get_shape())

    def _finite(self, name: str, tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
        tensor = tensor.detach().to(device)
        if not is_finite(tensor):
            raise UnsupportedVAEError(f"{name} must be finite, got NaN or infinite values")
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are: one pass over the memory, where `isfinite` makes several."""
    if tensor.numel() == 0:
        return True
    in_memory = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    least, most = torch.aminmax(tensor.permute(in_memory))  # either is NaN where a value is
    return bool(least.isfinite()) and bool(most.isfinite())


Change = Callable[[Tensor], Tensor]


def _unchanged(kernel: Tensor) -> Tensor:
    return kernel


class Fold:
    """Collects a folded state dict.

    Args:
        network: whose state dict it is, also on the meta device: its modules say what they take.
        taps: of the VAE.
        dtype: of the result.

    Attributes:
        tensors: the state dict so far.
        read: `taps.last`.
    """

    def __init__(self, network: nn.Module, taps: Taps, dtype: torch.dtype) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.read = taps.last
        self._taps = taps
        self._modules = dict(network.named_modules())
        self._dtype = dtype

    def put(self, name: str, tensor: Tensor) -> None:
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        self.tensors[name] = tensor.to(self._dtype, copy=True, memory_format=layout)

    def conv(self, source: str, target: str) -> None:
        """A convolution in two dimensions."""
        self.put(f"{target}.weight", self.read(f"{source}.weight"))
        self.put(f"{target}.bias", self.read(f"{source}.bias"))

    def norm(self, source: str, target: str) -> Tensor:
        """The norm's scale, which the convolution after it is given."""
        gamma = self.read(f"{source}.gamma").flatten()
        self.put(f"{target}.weight", gamma)
        return gamma

    def causal(
        self, source: str, target: str, gamma: Tensor | None = None, change: Change = _unchanged
    ) -> None:
        """The kernels of a `CausalConv`.

        Args:
            gamma: of the norm in front of it, if there is one.
            change: of the taps, [Cout, Cin, 3, 3] of the last or [Cout, Cin, 3, 3, 3] of all.
        """
        conv = self._modules[target]
        assert isinstance(conv, CausalConv)
        if conv.temporal is None:
            self.put(f"{target}.weight", change(self.read(f"{source}.weight")))
        else:
            taps = self._taps.all(f"{source}.weight")
            # On the CPU, as a network for single frames has it.
            self.put(f"{target}.weight", change(taps[:, :, -1].cpu()))
            try:
                earlier, exponents = fitted(change(taps), conv.temporal, gamma, self._dtype)
            except UnsupportedVAEError as error:
                raise UnsupportedVAEError(f"{source}.weight {error}") from None
            self.tensors[f"{target}.earlier"] = earlier
            self.tensors[f"{target}.exponents"] = exponents

    def upsample(self, source: str, target: str) -> None:
        """What a `layers.Upsample` takes."""
        weight = self.read(f"{source}.weight")
        if self._modules[target].weight is None:
            self.put(f"{target}.phases", torch.cat(phase_kernels(weight.double())))
        else:
            self.put(f"{target}.weight", weight)
        self.put(f"{target}.bias", self.read(f"{source}.bias"))

    def time_conv(self, source: str, target: str) -> None:
        """A convolution along time alone, as one on three frames side by side."""
        if target in self._modules:
            self.put(f"{target}.weight", side_by_side(self._taps.all(f"{source}.weight")))
            self.put(f"{target}.bias", self.read(f"{source}.bias"))

    def residual_block(self, source: str, target: str, has_shortcut: bool = False) -> None:
        """What a `layers.ResidualBlock` takes; the bias of a shortcut goes into that of `conv2`."""
        gamma = self.norm(f"{source}.norm1", f"{target}.norm1")
        self.causal(f"{source}.conv1", f"{target}.conv1", gamma)
        self.put(f"{target}.conv1.bias", self.read(f"{source}.conv1.bias"))
        gamma = self.norm(f"{source}.norm2", f"{target}.norm2")
        self.causal(f"{source}.conv2", f"{target}.conv2", gamma)
        bias = self.read(f"{source}.conv2.bias")
        if has_shortcut:
            self.put(f"{target}.shortcut.weight", self.read(f"{source}.conv_shortcut.weight"))
            bias = bias.double() + self.read(f"{source}.conv_shortcut.bias").double()
        self.put(f"{target}.conv2.bias", bias)

    def attention(self, source: str, target: str) -> None:
        """What a `layers.Attention` takes."""
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


def fold(
    network: Any, tensors: Mapping[str, Any], device: torch.device | str | int = "cpu"
) -> dict[str, Tensor]:
    """The state dict of an encoder or decoder.

    Args:
        network: has a `topology` and a `folded_dtype`; may be on the meta device.
        tensors: see `Taps`.
        device: where the network will be. The result is on the CPU; what is computed on a GPU
            stays there.

    Raises:
        UnsupportedVAEError: a tensor is not finite, as it is or once folded.
    """
    topology = network.topology
    place = torch.device(device)
    if place.type != "cuda":
        place = torch.device("cpu")
    made = Fold(network, Taps(tensors, topology, place), network.folded_dtype)
    with torch.device("cpu"):  # whatever the default device is
        if isinstance(topology, EncoderTopology):
            _fold_encoder(made, topology)
        else:
            _fold_decoder(made, topology)
    for name, tensor in made.tensors.items():
        if not is_finite(tensor):
            raise UnsupportedVAEError(
                f"{name}, once folded, must be finite in {tensor.dtype}, got NaN or infinite values"
            )
    return made.tensors


def _fold_encoder(fold: Fold, topology: EncoderTopology) -> None:
    fold.causal("encoder.conv_in", "conv_in", None, lambda w: packed_order(w, topology))
    fold.put("conv_in.bias", fold.read("encoder.conv_in.bias"))
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
            fold.time_conv(f"{downsampler}.time_conv", f"stages.{i}.time_conv")
    fold.middle("encoder")
    gamma = fold.norm("encoder.norm_out", "norm_out")
    quant, (mean, std) = fold.read("quant_conv.weight"), topology.output_statistics
    fold.causal("encoder.conv_out", "conv_out", gamma, lambda w: head_weight(w, quant, std))
    bias = head_bias(
        fold.read("encoder.conv_out.bias"), quant, fold.read("quant_conv.bias"), mean, std
    )
    fold.put("conv_out.bias", bias)


def _fold_decoder(fold: Fold, topology: DecoderTopology) -> None:
    weight, bias = denormalize(
        fold.read("post_quant_conv.weight"),
        fold.read("post_quant_conv.bias"),
        topology.latents_mean,
        topology.latents_std,
    )
    fold.put("denormalize.weight", weight)
    fold.put("denormalize.bias", bias)
    fold.conv("post_quant_conv", "post_quant")
    fold.causal("decoder.conv_in", "conv_in")
    fold.put("conv_in.bias", fold.read("decoder.conv_in.bias"))
    fold.middle("decoder")
    for i, (stage, (blocks, upsampler)) in enumerate(
        zip(topology.stages, topology.block_names(), strict=True)
    ):
        changes_width = stage.in_channels != stage.out_channels
        for j, source in enumerate(blocks):
            fold.residual_block(source, f"stages.{i}.blocks.{j}", j == 0 and changes_width)
        if upsampler is not None:
            fold.upsample(f"{upsampler}.resample.1", f"stages.{i}.upsample")
            fold.time_conv(f"{upsampler}.time_conv", f"stages.{i}.time_conv")
    gamma = fold.norm("decoder.norm_out", "norm_out")
    fold.causal(
        "decoder.conv_out", "conv_out", gamma, lambda w: shuffle_order(w, topology.patch_size)
    )
    bias = shuffle_order(fold.read("decoder.conv_out.bias"), topology.patch_size)
    fold.put("conv_out.bias", bias)


def fitted(
    taps: Tensor, temporal: Temporal, gamma: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The kernels before the last one of a `CausalConv`, and the exponents of all.

    With a block of m frames they are `G taps` of F(m, 3) (`ops.cook_toom`), times a power of two
    where they are held in float16, so that no product overflows, whatever the latents: what the
    convolution reads are RMS-normalised frames, whose vector over C channels is at most
    √C·max|gamma| long (SiLU makes it no longer), a transformed one at most the sum of |B^T|'s row
    times that. So a product is at most that, times the sum over the nine taps of a kernel's length
    over its input channels. Blocks of two that share kernels with blocks of four have smaller rows.

    A convolution whose kernels or frames float16 does not hold (`FLOAT16_LOSS`, `FLOAT16_MOST`)
    keeps them in the network's dtype.

    Args:
        taps: [Cout, Cin, 3, 3, 3].
        temporal: how frames are taken.
        gamma: [Cin], of the norm in front; None: there is none.
        dtype: of the network.

    Returns:
        [(m + 1)·Cout, Cin, 3, 3] (two taps where m is 1); and m + 2 integers (three).

    Raises:
        UnsupportedVAEError: float16 does not hold them, and the network's dtype is float16.
    """
    count = temporal.kernels
    out_channels, in_channels = taps.shape[:2]
    exponents = [0] * count
    held = temporal.dtype
    if held == torch.float16 and temporal.block > 1:
        assert gamma is not None
        exponents, fits = _float16_exponents(taps, temporal.block, gamma, dtype)
        if not fits:
            if dtype == torch.float16:
                raise UnsupportedVAEError(
                    "must fit float16 as kernels along time, got values that it loses or "
                    "that overflow: take bfloat16 or float32"
                )
            held, exponents = dtype, [0] * count
    # As it lies in memory: the channels of the input are last.
    shape = count - 1, out_channels, 9, in_channels
    earlier = torch.empty(shape, dtype=held, device=taps.device)
    if temporal.block == 1:
        earlier.copy_(taps[:, :, :-1].flatten(3).permute(2, 0, 3, 1))
    else:
        scales = float64(tuple(2.0**e for e in exponents), taps.device).view(-1, 1, 1, 1)
        for rows, kernels in _transformed(taps, temporal.block):
            earlier[:, rows].copy_(kernels[:-1].mul_(scales[:-1]))
    earlier = earlier.view((count - 1) * out_channels, 3, 3, in_channels)
    return earlier.permute(0, 3, 1, 2), torch.tensor(exponents, dtype=torch.int64)


# Taps that are transformed at a time, for each of torch's threads: few enough to stay in a cache.
_TAPS_AT_ONCE = 1 << 17
# On a GPU: 100 MB in all.
_TAPS_AT_ONCE_ON_GPU = 1 << 22


def _transformed(taps: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """`G taps`, a few output channels at a time.

    Yields:
        Which output channels, and their kernels [block + 2, n, 9, Cin] in float64, which the next
        ones overwrite. The last kernel is the last tap.
    """
    out_channels, in_channels = taps.shape[:2]
    device = taps.device
    at_once = torch.get_num_threads() * _TAPS_AT_ONCE
    if device.type != "cpu":
        at_once = _TAPS_AT_ONCE_ON_GPU
    size = min(max(1, at_once // (TAPS * 9 * in_channels)), out_channels)
    _, matrix, _ = cook_toom_tensors(block, taps)
    source = torch.empty(TAPS * size * 9 * in_channels, dtype=torch.float64, device=device)
    result = torch.empty(len(matrix) * size * 9 * in_channels, dtype=torch.float64, device=device)
    for start in range(0, out_channels, size):
        rows = slice(start, min(start + size, out_channels))
        shape = (rows.stop - start, 9, in_channels)
        count = math.prod(shape)
        window = source[: TAPS * count].view(TAPS, *shape)
        window.copy_(taps[rows].flatten(3).permute(2, 0, 3, 1))
        kernels = result[: len(matrix) * count].view(len(matrix), count)
        torch.mm(matrix, window.view(TAPS, count), out=kernels)
        yield rows, kernels.view(len(matrix), *shape)


def _float16_exponents(
    taps: Tensor, block: int, gamma: Tensor, dtype: torch.dtype
) -> tuple[list[int], bool]:
    """The exponents of `fitted` in float16, and whether it then holds kernels and frames."""
    _, _, inputs = cook_toom_tensors(block, gamma)
    longest = gamma.numel() ** 0.5 * gamma.double().abs().max().item()
    frames = [row.abs().sum().item() * longest for row in inputs]
    if max(frames) > FLOAT16_MOST:
        return [], False
    # Of each kernel, by tap in space, its length over the input channels.
    lengths = torch.cat([kernels.norm(dim=3) for _, kernels in _transformed(taps, block)], 1)
    exponents = [
        math.floor(math.log2(FLOAT16_MOST / (a * b))) if a * b else 0
        for a, b in zip(frames, lengths.sum(2).amax(1).tolist(), strict=True)
    ]
    if dtype == torch.float16:
        exponents[-1] = min(exponents[-1], 0)  # its last tap is held unscaled
    scales = float64(tuple(2.0**e for e in exponents), taps.device)
    scaled = lengths.flatten(1) * scales[:, None]
    # No rounding of a normal number loses that much, and one of a subnormal at most 2^-25.
    rms = scaled.norm(dim=1) * (taps[:, :, 0].numel() ** -0.5)
    if bool((rms >= 2.0**-14).all()) and bool((scaled.amax(1) <= FLOAT16_MOST).all()):
        return exponents, True
    lost = torch.zeros_like(scales)
    for _, kernels in _transformed(taps, block):
        kernels.mul_(scales.view(-1, 1, 1, 1))
        lost += (kernels - kernels.half().double()).flatten(1).norm(dim=1) ** 2
    return exponents, not bool((lost.sqrt() > FLOAT16_LOSS * scaled.norm(dim=1)).any())


def float64(values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
    """The values as a tensor, whatever the default device."""
    return torch.tensor(values, dtype=torch.float64, device=device)


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
        Weight [3C, C] and bias [3C] in float64.
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


def head_bias(
    conv_bias: Tensor,
    quant_weight: Tensor,
    quant_bias: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """The bias of `conv_out`, the mean half of `quant_conv`, and `(z - mean) / std` as one.

    With Wq, bq the first `z_dim` rows of the 1x1x1 `quant_conv` and W, b a tap of `conv_out`:
    weight `diag(1/std) Wq W` (`head_weight`), bias `(Wq b + bq - mean) / std`. Exact at the
    borders too: `conv_out` pads its input, which comes before all of this.

    Args:
        conv_bias: [2z].
        quant_weight: [2z or z, 2z, 1, 1]; quant_bias: [2z or z].
        mean, std: z values each.

    Returns:
        [z] in float64.
    """
    channels = len(mean)
    quant = quant_weight[:channels].double().flatten(1)
    shift = quant @ conv_bias.double() + quant_bias[:channels].double()
    return (shift - float64(mean)) / float64(std)


def head_weight(taps: Tensor, quant_weight: Tensor, std: tuple[float, ...]) -> Tensor:
    """`diag(1/std) Wq W` for one or all temporal taps W of `conv_out`.

    Args:
        taps: [2z, C, 3, 3] or [2z, C, kT, 3, 3].
        quant_weight: [2z or z, 2z, 1, 1].
        std: z values.

    Returns:
        `taps`' shape with z instead of 2z, in float64.
    """
    quant = quant_weight[: len(std)].double().flatten(1)
    scale = quant / float64(std)[:, None]
    return torch.einsum("zk,k...->z...", scale.to(taps.device), taps.double())


def side_by_side(weight: Tensor) -> Tensor:
    """The 2-D kernel that acts as a 3-D one on the frames of a window concatenated by channel.

    `Σ_τ W[τ] x[τ] = [W[0] W[1] …] [x[0]; x[1]; …]`.

    Args:
        weight: [Cout, Cin, kT, kH, kW].

    Returns:
        [Cout, kT·Cin, kH, kW].
    """
    return weight.transpose(1, 2).flatten(1, 2)


def denormalize(
    weight: Tensor, bias: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """`z·std + mean` and `post_quant_conv` as one 1x1 convolution.

    Weight `W diag(std)`, bias `W mean + b`. It goes no further: `conv_in` pads its input with
    zeros, and a bias folded through it would be added outside the image too.

    Args:
        weight: [z, z, 1, 1]; bias: [z].
        mean, std: z values each.

    Returns:
        Weight [z, z, 1, 1] and bias [z] in float64.
    """
    matrix = weight.double()
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
