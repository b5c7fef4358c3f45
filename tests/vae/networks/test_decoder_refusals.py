"""VAEs that a folded network would get wrong are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_cases import FAMILIES, TINY, WAN22
from encoder_cases import TINY as TINY_ENCODER
from torch import Tensor, nn

from cosmos3_fast import FrameDecoder, FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.synthetic import (
    synthetic_decoder_state_dict,
    synthetic_state_dict,
    synthetic_vae,
)

STATE = synthetic_decoder_state_dict(TINY)
CONV1 = "decoder.up_blocks.1.resnets.0.conv1.weight"


def refuse(tensors: dict[str, Tensor], message: str, **config: Any) -> None:
    with pytest.raises(UnsupportedVAEError) as caught:
        FrameDecoder.from_state_dict(tensors, {**TINY, **config})
    assert message in str(caught.value)


def test_tensors_that_do_not_fit() -> None:
    for name in ("decoder.conv_in.weight", CONV1, "post_quant_conv.bias"):
        others = {key: value for key, value in STATE.items() if key != name}
        refuse(others, f"{name} must have shape {list(STATE[name].shape)}, got no such tensor")
    shape = list(STATE[CONV1].shape)
    misshapen = {**STATE, CONV1: STATE[CONV1][:, :-1]}
    refuse(misshapen, f"{CONV1} must have shape {shape}, got {[shape[0], shape[1] - 1, 3, 3, 3]}")
    extra = {**STATE, "decoder.norm_out.bias": torch.ones(4)}
    refuse(extra, "decoder.norm_out.bias must be absent, got shape [4]")
    refuse(
        {**STATE, CONV1: STATE[CONV1].to("meta")},
        f"{CONV1} must have values, got a tensor on the meta device",
    )
    dtypes = [f"torch.{name}" for name in ("float32", "bfloat16", "float16", "float64")]
    refuse(
        {**STATE, CONV1: STATE[CONV1].to(torch.int8)},
        f"{CONV1} must be one of {dtypes}, got torch.int8",
    )
    FrameDecoder.from_state_dict({**STATE, "encoder.anything": torch.ones(1)}, TINY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_residual": False}, "upsampler.resample.1.bias must be absent, got shape [16]"),
        ({"out_channels": 3}, "out_channels must be 3·patch_size² = 12, got 3"),
        ({"decoder_base_dim": 0}, "decoder_base_dim must be a positive integer, got 0"),
        ({"decoder_base_dim": 16}, "decoder.conv_in.bias must have shape [32], got [16]"),
        # Then as wide as the encoder.
        ({"decoder_base_dim": None, "base_dim": 16}, "must have shape [32], got [16]"),
        (
            {"dim_mult": [1, 7, 5], "temperal_downsample": [True, True]},
            "shortcut of stage 1 must repeat its channels evenly, got 40 for 56x8 values",
        ),
        ({"temperal_downsample": [False]}, "time_conv.bias must be absent, got shape [32]"),
        ({"latents_std": [0.0] * 4}, "latents_std[0] must be a finite number above 1e-06, got 0.0"),
    ],
)
def test_config_that_does_not_fit(config: dict[str, Any], message: str) -> None:
    refuse(STATE, message, **config)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("network", "tensors", "config", "name"),
    [
        (FrameDecoder, STATE, TINY, "decoder.conv_out.weight"),
        (FrameDecoder, STATE, TINY, CONV1),
        (FrameDecoder, STATE, TINY, "post_quant_conv.bias"),
        (
            FrameEncoder,
            synthetic_state_dict(TINY_ENCODER),
            TINY_ENCODER,
            "encoder.conv_out.weight",
        ),
    ],
)
def test_values_that_are_not_finite(
    network: Any, tensors: dict[str, Tensor], config: dict[str, Any], name: str, value: float
) -> None:
    broken = tensors[name].clone()
    broken[(-1,) * broken.dim()] = value
    with pytest.raises(
        UnsupportedVAEError, match=f"{name} must be finite, got NaN or infinite values"
    ):
        network.from_state_dict({**tensors, name: broken}, config)


def test_values_that_do_not_fit_the_dtype() -> None:
    large = {**STATE, CONV1: STATE[CONV1] * 1e6}
    FrameDecoder.from_state_dict(large, TINY, torch.bfloat16)
    with pytest.raises(
        UnsupportedVAEError,
        match=r"stages\.1\.blocks\.0\.conv1\.weight, once folded, must be finite in torch\.float16",
    ):
        FrameDecoder.from_state_dict(large, TINY, torch.float16)
    # Its reciprocal exceeds float16's range.
    config = {**TINY_ENCODER, "latents_std": [2e-6] * TINY_ENCODER["z_dim"]}
    with pytest.raises(UnsupportedVAEError, match=r"conv_out\.weight, once folded, must be finite"):
        FrameEncoder.from_state_dict(synthetic_state_dict(config), config, torch.float16)


def test_first_taps_of_the_decoder_are_not_read() -> None:
    tensors = {name: t.clone() for name, t in STATE.items()}
    for tensor in tensors.values():
        if tensor.dim() == 5 and tensor.shape[2] > 1:
            tensor[:, :, :-1] = float("nan")
    got = FrameDecoder.from_state_dict(tensors, TINY).state_dict()
    wanted = FrameDecoder.from_state_dict(STATE, TINY).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_not_a_vae() -> None:
    with pytest.raises(
        UnsupportedVAEError,
        match=r"vae must have decoder, post_quant_conv and config, got a Linear",
    ):
        FrameDecoder.from_vae(nn.Linear(2, 2))


def setting(name: str, attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda vae: setattr(vae.decoder.get_submodule(name), attribute, value)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "replicate padding": (
        setting("mid_block.resnets.0.conv2", "padding_mode", "replicate"),
        r"decoder\.mid_block\.resnets\.0\.conv2 must have padding_mode zeros, got replicate",
    ),
    "stride": (
        setting("conv_out", "stride", (1, 2, 2)),
        r"conv_out must have stride \(1, 1, 1\), got \(1, 2, 2\)",
    ),
    "padding in time": (
        setting("conv_in", "_padding", (1, 1, 1, 1, 1, 1)),
        r"conv_in must have causal padding \(1, 1, 1, 1, 2, 0\), got \(1, 1, 1, 1, 1, 1\)",
    ),
    "up-sampling padding": (
        setting("up_blocks.0.upsampler.resample.1", "padding", (0, 0)),
        r"resample\.1 must have padding \(1, 1\), got \(0, 0\)",
    ),
    "up-sampling stride": (
        setting("up_blocks.1.upsampler.resample.1", "stride", (2, 2)),
        r"resample\.1 must have stride \(1, 1\), got \(2, 2\)",
    ),
    "up-sampling mode": (
        setting("up_blocks.0.upsampler.resample.0", "mode", "bilinear"),
        r"resample\.0 must have mode nearest-exact, got bilinear",
    ),
    "up-sampling factor": (
        setting("up_blocks.2.upsampler.resample.0", "scale_factor", (2.0, 1.0)),
        r"resample\.0 must have scale_factor \(2\.0, 2\.0\), got \(2\.0, 1\.0\)",
    ),
    "norm bias": (
        setting("norm_out", "bias", torch.full((8, 1, 1, 1), 0.1)),
        r"decoder\.norm_out must have bias 0, got non-zero values",
    ),
    "nonlinearity": (
        setting("up_blocks.2.resnets.1", "nonlinearity", nn.GELU()),
        r"resnets\.1 must have nonlinearity SiLU, got GELU",
    ),
    "shortcut factors": (
        setting("up_blocks.1.avg_shortcut", "factor_t", 1),
        r"avg_shortcut must have factors \(time, space\) \(2, 2\), got \(1, 2\)",
    ),
    "groups of the outer convolution": (
        lambda vae: setattr(vae.post_quant_conv, "groups", 2),
        r"post_quant_conv must have groups 1, got 2",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def needs_diffusers() -> None:
    pytest.importorskip("diffusers")


@pytest.mark.parametrize("case", CHANGES)
def test_changed_module(case: str) -> None:
    change, message = CHANGES[case]
    vae = synthetic_vae(WAN22, decoder_base_dim=None)
    FrameDecoder.from_vae(vae, probe=False)
    change(vae)
    with pytest.raises(UnsupportedVAEError, match=message):
        FrameDecoder.from_vae(vae, probe=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["wan2.2", "qwen-image"])
def test_probe_finds_what_attributes_hide(family: str, dtype: torch.dtype) -> None:
    vae = synthetic_vae(FAMILIES[family], decoder_base_dim=None)
    vae = torch.nn.Module.to(vae, dtype)
    FrameDecoder.from_vae(vae)
    forward = vae.decoder.conv_in.forward
    vae.decoder.conv_in.forward = lambda *args, **kwargs: forward(*args, **kwargs) + 0.3
    FrameDecoder.from_vae(vae, probe=False)
    with pytest.raises(
        UnsupportedVAEError, match=r"pixels must be within .* of the 2-D decoder's .* got 0\."
    ):
        FrameDecoder.from_vae(vae)


def test_probe_reports_a_vae_that_cannot_decode() -> None:
    vae = synthetic_vae(WAN22, decoder_base_dim=None)

    def fail(latents: Tensor) -> None:
        raise RuntimeError("no decoder here")

    vae.decode = fail
    with pytest.raises(UnsupportedVAEError, match=r"vae\.decode failed on .* no decoder here"):
        FrameDecoder.from_vae(vae)


def test_default_dtype_and_device_change_nothing() -> None:
    vae = synthetic_vae(WAN22, decoder_base_dim=None)
    wanted = FrameDecoder.from_vae(vae).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = FrameDecoder.from_vae(vae).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
