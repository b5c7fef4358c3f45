"""What a live VAE can compute differently without its state dict showing it."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.vae.live.exact import (
    computes_in,
    decode_sample,
    normalize_latents,
    posterior_mode,
    untiled,
)
from cosmos3_fast.vae.live.returns import EncodeReturns
from cosmos3_fast.vae.topology import Topology, UnsupportedVAEError

_NO_PADDING = (0, 0, 0, 0, 0, 0)


def check_modules(vae: Any, topology: Topology, clips: bool = False) -> None:
    """Refuse module settings for which the folded weights would give other results.

    Looks at every module under the part that `topology` describes (`vae.encoder` or `vae.decoder`)
    and at the 1x1x1 convolution outside it: convolutions (padding mode and extent, stride, groups,
    dilation), padding and up-sampling layers, norms (bias, scale), shortcuts and nonlinearities
    (evaluated and compared with SiLU).

    Args:
        vae: see `FoldedNetwork.from_vae`.
        topology: of its encoder or decoder.
        clips: check also what acts from the second frame on (`time_conv`).

    Raises:
        UnsupportedVAEError: naming the module and the setting.
    """
    part = topology.part
    root = getattr(vae, part)
    resamplers = topology.resamplers()
    modules = [(f"{part}.{n}" if n else part, m) for n, m in root.named_modules()]
    for name, module in [*modules, (topology.outer_conv, getattr(vae, topology.outer_conv))]:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            if name.endswith(".time_conv"):
                if clips and part == "encoder":
                    _check_conv(name, module, (2, 1, 1), pads_time=False)
                elif clips:
                    _check_conv(name, module, (1, 1, 1))
            elif name.removesuffix(".resample.1") not in resamplers:
                _check_conv(name, module, (1,) * len(module.kernel_size))
            elif part == "encoder":
                _check_downsampling_conv(name, module)
            else:
                _check_upsampling_conv(name, module)
        elif isinstance(module, nn.Upsample):
            _check_upsampling(name, module)
        elif isinstance(module, nn.ZeroPad2d):
            # A height-parallel layer pads the width and leaves the height to its conv.
            if tuple(module.padding) not in ((0, 1, 0, 1), (0, 1, 0, 0)):
                _refuse(name, "padding", module.padding, (0, 1, 0, 1))
        elif type(module).__module__ == "torch.nn.modules.padding":
            _refuse(name, "layer", type(module).__name__, "ZeroPad2d")
        elif isinstance(getattr(module, "gamma", None), Tensor):
            _check_norm(name, module)
        if name.endswith(".avg_shortcut") and module is not None:
            sampler = name.removesuffix(".avg_shortcut")
            stage = next((f for n, f in resamplers.items() if n.startswith(f"{sampler}.")), None)
            factors = getattr(module, "factor_t", None), getattr(module, "factor_s", None)
            wanted = (1, 1) if stage is None else (stage, 2)
            if factors != wanted:
                _refuse(name, "factors (time, space)", factors, wanted)
        if hasattr(module, "nonlinearity"):
            _check_nonlinearity(name, module.nonlinearity, root.conv_in.weight.device)


def _check_kernel(name: str, conv: nn.Conv2d | nn.Conv3d, stride: tuple[int, ...]) -> None:
    """What every convolution has: its stride, and otherwise the defaults."""
    ones = (1,) * len(conv.kernel_size)
    if conv.padding_mode != "zeros":
        _refuse(name, "padding_mode", conv.padding_mode, "zeros")
    if conv.groups != 1:
        _refuse(name, "groups", conv.groups, 1)
    if conv.dilation != ones:
        _refuse(name, "dilation", conv.dilation, ones)
    if conv.stride != stride:
        _refuse(name, "stride", conv.stride, stride)


def _height_padding(conv: nn.Conv2d | nn.Conv3d) -> tuple[int, int]:
    """Rows that height-parallel layers fetch from the neighbouring ranks."""
    return getattr(conv, "height_pad_top", 0), getattr(conv, "height_pad_bottom", 0)


def _check_conv(
    name: str, conv: nn.Conv2d | nn.Conv3d, stride: tuple[int, ...], pads_time: bool = True
) -> None:
    """A causal convolution, or one of size 1."""
    _check_kernel(name, conv, stride)
    if isinstance(conv, nn.Conv2d):
        if any(conv.padding):
            _refuse(name, "padding", conv.padding, (0, 0))
        if any(_height_padding(conv)):
            _refuse(name, "height padding", _height_padding(conv), (0, 0))
        return
    half = conv.kernel_size[1] // 2
    # TensorRT-LLM leaves the rows and columns to the convolution itself.
    own = [extent for extent in reversed(conv.padding) for _ in range(2)]
    padding = tuple(map(operator.add, getattr(conv, "_padding", _NO_PADDING), own))
    if _height_padding(conv) == (half, half):
        padding = (*padding[:2], half, half, *padding[4:])
    # The VAE itself puts the last frame of the previous chunk in front of time_conv's input.
    front = conv.kernel_size[0] - 1 if pads_time else 0
    causal = (half, half, half, half, front, 0)
    if padding != causal:
        _refuse(name, "causal padding", padding, causal)


def _check_downsampling_conv(name: str, conv: nn.Conv2d | nn.Conv3d) -> None:
    """Stride 2 on what the padding layer before it gives."""
    _check_kernel(name, conv, (2, 2))
    if any(conv.padding):
        _refuse(name, "padding", conv.padding, (0, 0))
    if _height_padding(conv) not in ((0, 0), (0, 1)):
        _refuse(name, "height padding", _height_padding(conv), (0, 0))


def _check_upsampling_conv(name: str, conv: nn.Conv2d | nn.Conv3d) -> None:
    """Stride 1 and padding 1, of which a height-parallel layer may have the rows elsewhere."""
    _check_kernel(name, conv, (1, 1))
    padding = tuple(conv.padding)
    if _height_padding(conv) == (1, 1) and padding == (0, 1):
        padding = (1, 1)
    if padding != (1, 1):
        _refuse(name, "padding", padding, (1, 1))


def _check_upsampling(name: str, layer: nn.Upsample) -> None:
    # At a factor of 2 both modes repeat each value twice.
    if layer.mode not in ("nearest", "nearest-exact"):
        _refuse(name, "mode", layer.mode, "nearest-exact")
    factor = layer.scale_factor
    if (factor if isinstance(factor, tuple) else (factor, factor)) != (2.0, 2.0):
        _refuse(name, "scale_factor", factor, (2.0, 2.0))


def _check_norm(name: str, norm: Any) -> None:
    channels = norm.gamma.numel()
    bias = getattr(norm, "bias", None)  # a tensor or a number
    if bool(bias.ne(0).any()) if isinstance(bias, Tensor) else bias:
        _refuse(name, "bias", "non-zero values", 0)
    scale = getattr(norm, "scale", None)
    if scale is None or abs(float(scale) - channels**0.5) > 1e-6 * channels**0.5:
        _refuse(name, "scale", scale, channels**0.5)
    if getattr(norm, "channel_first", True) is not True:
        _refuse(name, "channel_first", norm.channel_first, True)


def _check_nonlinearity(name: str, nonlinearity: Any, device: torch.device) -> None:
    grid = torch.linspace(-8.0, 8.0, 65, dtype=torch.float32, device=device)
    with torch.no_grad():
        error = (nonlinearity(grid.clone()) - F.silu(grid)).abs().max().item()
    if not error < 1e-5:
        _refuse(name, "nonlinearity", type(nonlinearity).__name__, "SiLU")


def _refuse(name: str, setting: str, found: object, wanted: object) -> None:
    raise UnsupportedVAEError(f"{name} must have {setting} {wanted}, got {found}")


def probe_encoder(vae: Any, encoder: Any, frames: int = 1) -> None:
    """Encode random frames of 2x2 latent cells with both and compare.

    Args:
        vae: see `exact.posterior_mode`; tiling is switched off meanwhile.
        encoder: the `FrameEncoder` or `ClipEncoder` folded from it.
        frames: 1 + 4k.

    Raises:
        UnsupportedVAEError: the VAE cannot encode the frames, or the latents differ by more than
            rounding explains.
    """
    weight = vae.encoder.conv_in.weight
    edge = 2 * encoder.spatial_factor
    pixels = _uniform((1, 3, frames, edge, edge)).to(*computes_in(vae))
    try:
        with untiled(vae):
            mode = posterior_mode(vae, pixels)
    except Exception as error:
        what = f"one {edge}x{edge} frame" if frames == 1 else f"{frames} {edge}x{edge} frames"
        raise UnsupportedVAEError(f"vae.encode failed on {what}: {error}") from error
    wanted = normalize_latents(mode.double().cpu(), vae.config)
    got = encoder(pixels.to(encoder.device)).double().cpu()
    if got.shape != wanted.shape:
        raise UnsupportedVAEError(
            f"vae.encode must give latents {list(got.shape)} for {list(pixels.shape)}, "
            f"got {list(wanted.shape)}"
        )
    dtypes = weight.dtype, *encoder.roundings
    _compare_probe("encoder", "latents", got - wanted, wanted.std(), *dtypes)


def probe_posterior(vae: Any, encoder: Any, frames: int = 1) -> EncodeReturns:
    """`probe_encoder` for an encoder of posteriors: all that `vae.encode` returns is compared.

    Returns:
        The form of what `vae.encode` returns.

    Raises:
        UnsupportedVAEError: as `probe_encoder`, or the form is not known.
    """
    weight = vae.encoder.conv_in.weight
    edge = 2 * encoder.spatial_factor
    pixels = _uniform((1, 3, frames, edge, edge)).to(*computes_in(vae))
    try:
        with torch.no_grad(), untiled(vae):
            returns, wanted = EncodeReturns.of(vae.encode(pixels))
    except Exception as error:
        what = f"one {edge}x{edge} frame" if frames == 1 else f"{frames} {edge}x{edge} frames"
        raise UnsupportedVAEError(f"vae.encode failed on {what}: {error}") from error
    got = encoder(pixels.to(encoder.device)).double().cpu()
    wanted = wanted.double().cpu()
    z_dim = encoder.z_dim
    if returns.is_tensor and wanted.shape[1] == z_dim:
        # A mean without log-variance, with or without normalisation.
        got = got[:, :z_dim]
        normalize = functools.partial(normalize_latents, config=vae.config)
        if (normalize(got) - wanted).abs().sum() < (got - wanted).abs().sum():
            got, returns = normalize(got), returns.scaled(normalize)
        returns = returns.without_variance(z_dim)
    if got.shape != wanted.shape:
        raise UnsupportedVAEError(
            f"vae.encode must give {list(got.shape)} for {list(pixels.shape)}, "
            f"got {list(wanted.shape)}"
        )
    # Mean and log-variance have scales of their own.
    for name, ours, theirs in zip(
        ("mean", "log-variance"), got.split(z_dim, 1), wanted.split(z_dim, 1), strict=False
    ):
        scale = theirs.std()
        _compare_probe("encoder", name, ours - theirs, scale, weight.dtype, *encoder.roundings)
    return returns


def probe_decoder(vae: Any, decoder: Any, frames: int = 1) -> None:
    """Decode random frames of 2x2 latent cells with both and compare.

    Args:
        vae: see `exact.decode_sample`; tiling is switched off meanwhile.
        decoder: the `FrameDecoder` or `ClipDecoder` folded from it.
        frames: latent frames.

    Raises:
        UnsupportedVAEError: the VAE cannot decode the frame, or the pixels differ by more than
            rounding explains.
    """
    weight = vae.decoder.conv_in.weight
    latents = _uniform((1, decoder.z_dim, frames, 2, 2)).to(*computes_in(vae, "decoder"))
    try:
        with untiled(vae):
            wanted = decode_sample(vae, latents).double().cpu()
    except Exception as error:
        raise UnsupportedVAEError(
            f"vae.decode failed on one frame of 2x2 cells: {error}"
        ) from error
    got = decoder.decode_unnormalized(latents.to(decoder.device)).double().cpu()
    if got.shape != wanted.shape:
        raise UnsupportedVAEError(
            f"vae.decode must give pixels {list(got.shape)} for {list(latents.shape)}, "
            f"got {list(wanted.shape)}"
        )
    # A decoder that gives one color has no deviation, but still the range [-1, 1].
    scale = wanted.std().clamp_min(0.01)
    _compare_probe("decoder", "pixels", got - wanted, scale, weight.dtype, *decoder.roundings)


def _uniform(shape: tuple[int, ...]) -> Tensor:
    """Seeded values in [-1, 1], whatever the default dtype and device."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return values * 2 - 1


def _compare_probe(
    part: str, what: str, error: Tensor, scale: Tensor, *dtypes: torch.dtype
) -> None:
    distance = (error.square().mean().sqrt() / scale).item()
    # Each side rounds its ~60 stored activations, each with a relative error of eps/√12 rms:
    # about √(2·60/12) = 3 eps apart if nothing amplifies them; 1.2 eps was measured. The second
    # term is for float32, where the order of summation over K ≤ 9216 products adds about √K eps.
    tolerance = 8 * max(torch.finfo(dtype).eps for dtype in dtypes) + 1e-5
    if not distance <= tolerance:
        raise UnsupportedVAEError(
            f"the VAE's {what} must be within {tolerance:.2g} of the 2-D {part}'s in standard "
            f"deviations, got {distance:.2g}: it computes something its weights and module "
            "settings do not show"
        )
