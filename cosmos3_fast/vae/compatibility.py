"""What a live VAE can compute differently without its state dict showing it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_fast.vae.exact import encode_mode, normalize_latents, untiled
from cosmos3_fast.vae.topology import EncoderTopology, UnsupportedVAEError

_NO_PADDING = (0, 0, 0, 0, 0, 0)


def check_modules(vae: Any, topology: EncoderTopology, clips: bool = False) -> None:
    """Refuse module settings for which the folded weights would give other latents.

    Looks at every module under `vae.encoder` and at `vae.quant_conv`: convolutions (padding mode
    and extent, stride, groups, dilation), padding layers, norms (bias, scale) and
    nonlinearities (evaluated and compared with SiLU).

    Args:
        vae: see `FrameEncoder.from_vae`.
        topology: of its encoder.
        clips: check also what acts from the second frame on (`time_conv`).

    Raises:
        UnsupportedVAEError: naming the module and the setting.
    """
    device = vae.encoder.conv_in.weight.device
    downsamplers = {f"{name}.resample.1" for _, name in topology.block_names() if name}
    modules = [(f"encoder.{n}" if n else "encoder", m) for n, m in vae.encoder.named_modules()]
    for name, module in [*modules, ("quant_conv", vae.quant_conv)]:
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            if clips or not name.endswith(".time_conv"):
                _check_conv(name, module, is_downsampler=name in downsamplers)
        elif isinstance(module, nn.ZeroPad2d):
            # SGLang's height-parallel layer pads the width and leaves the height to its conv.
            if tuple(module.padding) not in ((0, 1, 0, 1), (0, 1, 0, 0)):
                _refuse(name, "padding", module.padding, (0, 1, 0, 1))
        elif type(module).__module__ == "torch.nn.modules.padding":
            _refuse(name, "layer", type(module).__name__, "ZeroPad2d")
        elif isinstance(getattr(module, "gamma", None), Tensor):
            _check_norm(name, module)
        if name.endswith(".avg_shortcut"):
            stage = topology.stages[int(name.split(".")[-2])]
            factors = getattr(module, "factor_t", None), getattr(module, "factor_s", None)
            wanted = stage.factor_t, 2 if stage.downsample else 1
            if factors != wanted:
                _refuse(name, "factors (time, space)", factors, wanted)
        if hasattr(module, "nonlinearity"):
            _check_nonlinearity(name, module.nonlinearity, device)


def _check_conv(name: str, conv: nn.Conv2d | nn.Conv3d, is_downsampler: bool) -> None:
    ones = (1,) * len(conv.kernel_size)
    if conv.padding_mode != "zeros":
        _refuse(name, "padding_mode", conv.padding_mode, "zeros")
    if conv.groups != 1:
        _refuse(name, "groups", conv.groups, 1)
    if conv.dilation != ones:
        _refuse(name, "dilation", conv.dilation, ones)
    is_time_conv = name.endswith(".time_conv")
    stride: tuple[int, ...] = (2, 2) if is_downsampler else ones
    if is_time_conv:
        stride = (2, 1, 1)
    if conv.stride != stride:
        _refuse(name, "stride", conv.stride, stride)
    # SGLang's height-parallel layers fetch their height padding from the neighbouring ranks.
    top_bottom = getattr(conv, "height_pad_top", 0), getattr(conv, "height_pad_bottom", 0)
    if any(conv.padding):
        _refuse(name, "padding", conv.padding, (0,) * len(ones))
    if isinstance(conv, nn.Conv2d):
        # 1x1 kernels, and the down-sampler, which a padding layer precedes.
        if top_bottom not in ((0, 0), (0, 1)) or (any(top_bottom) and not is_downsampler):
            _refuse(name, "height padding", top_bottom, (0, 0))
        return
    half = conv.kernel_size[1] // 2
    padding = tuple(getattr(conv, "_padding", _NO_PADDING))
    if top_bottom == (half, half):
        padding = (*padding[:2], half, half, *padding[4:])
    # The VAE itself puts the last frame of the previous chunk in front of time_conv's input.
    front = 0 if is_time_conv else conv.kernel_size[0] - 1
    causal = (half, half, half, half, front, 0)
    if padding != causal:
        _refuse(name, "causal padding", padding, causal)


def _check_norm(name: str, norm: Any) -> None:
    channels = norm.gamma.numel()
    bias = getattr(norm, "bias", None)
    if bias is not None and bool(torch.as_tensor(bias).ne(0).any()):
        _refuse(name, "bias", "non-zero values", 0)
    scale = getattr(norm, "scale", None)
    if scale is None or abs(float(scale) - channels**0.5) > 1e-6 * channels**0.5:
        _refuse(name, "scale", scale, channels**0.5)
    if getattr(norm, "channel_first", True) is not True:
        _refuse(name, "channel_first", norm.channel_first, True)


def _check_nonlinearity(name: str, nonlinearity: Any, device: torch.device) -> None:
    grid = torch.linspace(-8.0, 8.0, 65, device=device)
    with torch.no_grad():
        error = (nonlinearity(grid.clone()) - F.silu(grid)).abs().max().item()
    if not error < 1e-5:
        _refuse(name, "nonlinearity", type(nonlinearity).__name__, "SiLU")


def _refuse(name: str, setting: str, found: object, wanted: object) -> None:
    raise UnsupportedVAEError(f"{name} has {setting} {found}, wanted {wanted}")


def probe_against(vae: Any, encoder: Any, frames: int = 1) -> None:
    """Encode random frames of 2x2 latent cells with both and compare.

    Args:
        vae: see `exact.encode_mode`; tiling is switched off meanwhile.
        encoder: the `FrameEncoder` or `ClipEncoder` folded from it.
        frames: 1 + 4k. Nine reach every state there is: from the third chunk on, each convolution
            looks back on two frames.

    Raises:
        UnsupportedVAEError: the VAE cannot encode the frames, or the latents differ by more than
            rounding explains.
    """
    weight = vae.encoder.conv_in.weight
    edge = 2 * encoder.spatial_factor
    shape = (1, 3, frames, edge, edge)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = pixels.to(weight.device, weight.dtype)
    try:
        with untiled(vae):
            mode = encode_mode(vae, pixels)
    except Exception as error:
        what = f"one {edge}x{edge} frame" if frames == 1 else f"{frames} {edge}x{edge} frames"
        raise UnsupportedVAEError(f"vae.encode failed on {what}: {error}") from error
    wanted = normalize_latents(mode.double().cpu(), vae.config)
    got = encoder(pixels.to(encoder.device)).double().cpu()
    if got.shape != wanted.shape:
        raise UnsupportedVAEError(
            f"vae.encode gives latents {list(wanted.shape)} for {list(shape)}, "
            f"the 2-D encoder {list(got.shape)}"
        )
    distance = ((got - wanted).square().mean().sqrt() / wanted.std()).item()
    # Each side rounds its ~60 stored activations, each with a relative error of eps/√12 rms:
    # about √(2·60/12) = 3 eps apart if nothing amplifies them; 1.2 eps was measured. The second
    # term is for fp32, where the order of summation over K ≤ 5760 products adds about √K eps.
    eps = max(torch.finfo(weight.dtype).eps, torch.finfo(encoder.dtype).eps)
    tolerance = 8 * eps + 1e-5
    if not distance <= tolerance:
        raise UnsupportedVAEError(
            f"the VAE's latents differ from the 2-D encoder's by {distance:.2g} of their standard "
            f"deviation, wanted at most {tolerance:.2g}: it computes something its weights and "
            "module settings do not show"
        )
