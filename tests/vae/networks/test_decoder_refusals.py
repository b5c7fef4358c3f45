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
        refuse(others, f"{name} is missing, wanted {list(STATE[name].shape)}")
    shape = list(STATE[CONV1].shape)
    misshapen = {**STATE, CONV1: STATE[CONV1][:, :-1]}
    refuse(misshapen, f"{CONV1} has shape {[shape[0], shape[1] - 1, 3, 3, 3]}, wanted {shape}")
    extra = {**STATE, "decoder.norm_out.bias": torch.ones(4)}
    refuse(extra, "decoder.norm_out.bias with shape [4] is unexpected")
    refuse({**STATE, CONV1: STATE[CONV1].to("meta")}, f"{CONV1} is on the meta device")
    refuse({**STATE, CONV1: STATE[CONV1].to(torch.int8)}, f"{CONV1} is torch.int8, wanted one of")
    FrameDecoder.from_state_dict({**STATE, "encoder.anything": torch.ones(1)}, TINY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_residual": False}, "upsampler.resample.1.bias with shape [16] is unexpected"),
        ({"out_channels": 3}, "out_channels=3, wanted 3·patch_size² = 12"),
        ({"decoder_base_dim": 0}, "decoder_base_dim=0, wanted a positive integer"),
        ({"decoder_base_dim": 16}, "decoder.conv_in.bias has shape [16], wanted [32]"),
        # Then as wide as the encoder.
        ({"decoder_base_dim": None, "base_dim": 16}, "has shape [16], wanted [32]"),
        (
            {"dim_mult": [1, 7, 5], "temperal_downsample": [True, True]},
            "the duplicating shortcut of stage 1 cannot spread 40 channels over 56x8 values",
        ),
        ({"temperal_downsample": [False]}, "time_conv.bias with shape [32] is unexpected"),
        ({"latents_std": [0.0] * 4}, "latents_std[0]=0.0 is not a usable number"),
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
    with pytest.raises(UnsupportedVAEError, match=f"{name} holds values that are not finite"):
        network.from_state_dict({**tensors, name: broken}, config)


def test_values_that_do_not_fit_the_dtype() -> None:
    large = {**STATE, CONV1: STATE[CONV1] * 1e6}
    FrameDecoder.from_state_dict(large, TINY, torch.bfloat16)
    with pytest.raises(
        UnsupportedVAEError,
        match=r"stages\.1\.blocks\.0\.conv1\.weight, once folded, is not finite in torch\.float16",
    ):
        FrameDecoder.from_state_dict(large, TINY, torch.float16)
    # Its reciprocal exceeds float16's range.
    config = {**TINY_ENCODER, "latents_std": [2e-6] * TINY_ENCODER["z_dim"]}
    with pytest.raises(UnsupportedVAEError, match=r"conv_out\.weight, once folded, is not finite"):
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
        UnsupportedVAEError, match=r"Linear has no decoder, post_quant_conv or config"
    ):
        FrameDecoder.from_vae(nn.Linear(2, 2))


def setting(name: str, attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda vae: setattr(vae.decoder.get_submodule(name), attribute, value)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "replicate padding": (
        setting("mid_block.resnets.0.conv2", "padding_mode", "replicate"),
        r"decoder\.mid_block\.resnets\.0\.conv2 has padding_mode replicate, wanted zeros",
    ),
    "stride": (setting("conv_out", "stride", (1, 2, 2)), r"conv_out has stride \(1, 2, 2\)"),
    "padding in time": (
        setting("conv_in", "_padding", (1, 1, 1, 1, 1, 1)),
        r"conv_in has causal padding \(1, 1, 1, 1, 1, 1\), wanted \(1, 1, 1, 1, 2, 0\)",
    ),
    "up-sampling padding": (
        setting("up_blocks.0.upsampler.resample.1", "padding", (0, 0)),
        r"resample\.1 has padding \(0, 0\), wanted \(1, 1\)",
    ),
    "up-sampling stride": (
        setting("up_blocks.1.upsampler.resample.1", "stride", (2, 2)),
        r"resample\.1 has stride \(2, 2\), wanted \(1, 1\)",
    ),
    "up-sampling mode": (
        setting("up_blocks.0.upsampler.resample.0", "mode", "bilinear"),
        r"resample\.0 has mode bilinear, wanted nearest-exact",
    ),
    "up-sampling factor": (
        setting("up_blocks.2.upsampler.resample.0", "scale_factor", (2.0, 1.0)),
        r"resample\.0 has scale_factor \(2\.0, 1\.0\), wanted \(2\.0, 2\.0\)",
    ),
    "norm bias": (
        setting("norm_out", "bias", torch.full((8, 1, 1, 1), 0.1)),
        r"decoder\.norm_out has bias non-zero values, wanted 0",
    ),
    "nonlinearity": (
        setting("up_blocks.2.resnets.1", "nonlinearity", nn.GELU()),
        r"resnets\.1 has nonlinearity GELU, wanted SiLU",
    ),
    "shortcut factors": (
        setting("up_blocks.1.avg_shortcut", "factor_t", 1),
        r"avg_shortcut has factors \(time, space\) \(1, 2\), wanted \(2, 2\)",
    ),
    "groups of the outer convolution": (
        lambda vae: setattr(vae.post_quant_conv, "groups", 2),
        r"post_quant_conv has groups 2, wanted 1",
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
    with pytest.raises(UnsupportedVAEError, match=r"pixels differ from the 2-D decoder's by 0\."):
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
