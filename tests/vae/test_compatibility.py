"""VAEs that the folded encoder would get wrong are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoder_cases import RESIDUAL, WAN21
from torch import nn

from cosmos3_fast.vae import FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.synthetic import synthetic_state_dict, synthetic_vae
from cosmos3_fast.vae.topology import EncoderTopology

STATE = synthetic_state_dict(RESIDUAL)
CONV1 = "encoder.down_blocks.1.resnets.0.conv1.weight"


def fold(tensors: dict[str, torch.Tensor], **config: Any) -> FrameEncoder:
    return FrameEncoder.from_state_dict(tensors, {**RESIDUAL, **config})


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in STATE.items() if key != name}


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", CONV1, "quant_conv.bias"])
def test_missing_tensor(name: str) -> None:
    wanted = list(STATE[name].shape)
    with pytest.raises(UnsupportedVAEError) as caught:
        fold(without(name))
    assert f"{name} must have shape {wanted}, got no such tensor" in str(caught.value)


def test_misshapen_tensor() -> None:
    with pytest.raises(UnsupportedVAEError) as caught:
        fold({**STATE, CONV1: STATE[CONV1][:, :-1]})
    assert f"{CONV1} must have shape [32, 16, 3, 3, 3], got [32, 15, 3, 3, 3]" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["encoder.norm_out.bias", "encoder.down_blocks.0.resnets.2.conv1.weight"]
)
def test_unexpected_tensor(name: str) -> None:
    with pytest.raises(UnsupportedVAEError) as caught:
        fold({**STATE, name: torch.ones(4)})
    assert f"{name} must be absent, got shape [4]" in str(caught.value)


def test_decoder_tensors_are_ignored() -> None:
    fold({**STATE, "decoder.anything": torch.ones(1), "post_quant_conv.bias": torch.ones(1)})


def test_many_faults_are_summarised() -> None:
    with pytest.raises(UnsupportedVAEError, match=r"and \d+ more"):
        fold(STATE, base_dim=24)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("is_residual", False, r"must have shape \[.*\], got no such tensor"),
        ("patch_size", 4, "in_channels must be 3·patch_size² = 48, got 12"),
        ("dim_mult", [], "dim_mult must have 1 to 16 values, got 0"),
        ("dim_mult", 3, "dim_mult must be a list, got 3"),
        (
            "dim_mult",
            [1, 7, 4, 4],
            "average shortcut of stage 1 must divide its values evenly, got 16x8 for 112",
        ),
        ("z_dim", 0, "z_dim must be a positive integer, got 0"),
        ("base_dim", "16", "base_dim must be a positive integer, got '16'"),
        ("temperal_downsample", [True], "must have at least 3 values for 4 stages, got 1"),
        (
            "temperal_downsample",
            [True] * 3,
            r"down_blocks\.0\.downsampler\.time_conv\.bias must have shape .* got no such",
        ),
        (
            "num_res_blocks",
            3,
            r"resnets\.2\.conv1\.bias must have shape \[\d+\], got no such tensor",
        ),
        ("latents_mean", None, "latents_mean must be z_dim=48 numbers, got none"),
        ("latents_mean", [0.0] * 16, "latents_mean must be z_dim=48 numbers, got 16 values"),
        (
            "latents_std",
            [1.0] * 47 + [0.0],
            r"latents_std\[47\] must be a finite number above 1e-06, got 0\.0",
        ),
        (
            "latents_mean",
            [float("nan")] * 48,
            r"latents_mean\[0\] must be a finite number, got nan",
        ),
    ],
)
def test_config_that_does_not_fit(key: str, value: Any, message: str) -> None:
    with pytest.raises(UnsupportedVAEError, match=message):
        fold(STATE, **{key: value})


def test_absent_config_keys_take_the_class_defaults() -> None:
    statistics = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    topology = EncoderTopology.from_config(statistics)
    assert topology.spatial_factor == 8
    assert [stage.out_channels for stage in topology.stages] == [96, 192, 384, 384]
    assert not topology.residual


def test_meta_and_integer_tensors() -> None:
    with pytest.raises(
        UnsupportedVAEError, match=r"conv1\.weight must have values, got .* meta device"
    ):
        fold({**STATE, CONV1: STATE[CONV1].to("meta")})
    with pytest.raises(
        UnsupportedVAEError, match=r"conv1\.weight must be one of .* got torch\.int8"
    ):
        fold({**STATE, CONV1: STATE[CONV1].to(torch.int8)})


def test_not_a_vae() -> None:
    with pytest.raises(
        UnsupportedVAEError, match="vae must have encoder, quant_conv and config, got a Linear"
    ):
        FrameEncoder.from_vae(nn.Linear(2, 2))


def set_conv(name: str, setting: str, value: Any) -> Callable[[Any], None]:
    return lambda vae: setattr(vae.encoder.get_submodule(name), setting, value)


def replace_padding(layer: nn.Module) -> Callable[[Any], None]:
    def change(vae: Any) -> None:
        vae.encoder.down_blocks[0].downsampler.resample[0] = layer

    return change


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "replicate padding": (
        set_conv("mid_block.resnets.0.conv2", "padding_mode", "replicate"),
        r"encoder\.mid_block\.resnets\.0\.conv2 must have padding_mode zeros, got replicate",
    ),
    "groups": (set_conv("conv_in", "groups", 2), r"encoder\.conv_in must have groups 1, got 2"),
    "dilation": (
        set_conv("conv_in", "dilation", (1, 2, 2)),
        r"conv_in must have dilation \(1, 1, 1\), got \(1, 2, 2\)",
    ),
    "stride": (
        set_conv("conv_out", "stride", (1, 2, 2)),
        r"conv_out must have stride \(1, 1, 1\), got \(1, 2, 2\)",
    ),
    "down-sampling stride": (
        set_conv("down_blocks.0.downsampler.resample.1", "stride", (1, 1)),
        r"resample\.1 must have stride \(2, 2\), got \(1, 1\)",
    ),
    "padding on both sides in time": (
        set_conv("conv_in", "_padding", (1, 1, 1, 1, 1, 1)),
        r"conv_in must have causal padding \(1, 1, 1, 1, 2, 0\), got \(1, 1, 1, 1, 1, 1\)",
    ),
    "padding of its own": (
        set_conv("conv_in", "padding", (0, 1, 1)),
        r"conv_in must have causal padding .*, got \(2, 2, 2, 2, 2, 0\)",
    ),
    "symmetric down-sampling": (
        replace_padding(nn.ZeroPad2d((1, 0, 1, 0))),
        r"resample\.0 must have padding \(0, 1, 0, 1\), got \(1, 0, 1, 0\)",
    ),
    "replicating down-sampling": (
        replace_padding(nn.ReplicationPad2d((0, 1, 0, 1))),
        r"resample\.0 must have layer ZeroPad2d, got ReplicationPad2d",
    ),
    "norm bias": (
        set_conv("norm_out", "bias", torch.full((64, 1, 1, 1), 0.1)),
        r"encoder\.norm_out must have bias 0, got non-zero values",
    ),
    "norm scale": (set_conv("norm_out", "scale", 1.0), r"norm_out must have scale 8\.0, got 1\.0"),
    "nonlinearity": (
        set_conv("down_blocks.2.resnets.1", "nonlinearity", nn.GELU()),
        r"resnets\.1 must have nonlinearity SiLU, got GELU",
    ),
    "shortcut factors": (
        set_conv("down_blocks.1.avg_shortcut", "factor_t", 1),
        r"avg_shortcut must have factors \(time, space\) \(2, 2\), got \(1, 2\)",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_module(case: str) -> None:
    pytest.importorskip("diffusers")
    change, message = CHANGES[case]
    vae = synthetic_vae(RESIDUAL)
    FrameEncoder.from_vae(vae, probe=False)
    change(vae)
    with pytest.raises(UnsupportedVAEError, match=message):
        FrameEncoder.from_vae(vae, probe=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probe_finds_what_attributes_hide(dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers")
    vae = synthetic_vae(RESIDUAL).to(dtype)
    forward = vae.encoder.conv_out.forward
    vae.encoder.conv_out.forward = lambda *args, **kw: 1.2 * forward(*args, **kw)
    FrameEncoder.from_vae(vae, probe=False)
    with pytest.raises(
        UnsupportedVAEError, match=r"latents must be within .* of the 2-D encoder's .* got 0\."
    ):
        FrameEncoder.from_vae(vae)


def test_probe_reports_a_vae_that_cannot_encode() -> None:
    pytest.importorskip("diffusers")
    vae = synthetic_vae(WAN21)

    def fail(pixels: torch.Tensor) -> None:
        raise RuntimeError("no encoder here")

    vae.encode = fail
    with pytest.raises(UnsupportedVAEError, match=r"vae\.encode failed on .* no encoder here"):
        FrameEncoder.from_vae(vae)
