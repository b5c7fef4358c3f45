"""Single files, original names, variants, and configurations meant to hurt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from safetensors.torch import save_file

from cosmos3_fast.vae import FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.checkpoint.names import diffusers_names, family_config
from cosmos3_fast.vae.checkpoint.reading import CheckpointError
from cosmos3_fast.vae.synthetic import synthetic_config, synthetic_state_dict

WAN22 = synthetic_config(
    {"base_dim": 8, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
     "is_residual": True, "patch_size": 2, "in_channels": 12,
     "temperal_downsample": [False, True, True]}
)  # fmt: skip
WAN21 = synthetic_config({"base_dim": 8, "z_dim": 16})


ENDS = {
    "quant_conv": "conv1",
    "encoder.conv_in": "encoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "encoder.mid_block.resnets.0": "encoder.middle.0",
    "encoder.mid_block.resnets.1": "encoder.middle.2",
    "encoder.mid_block.attentions.0": "encoder.middle.1",
    "encoder.down_blocks": "encoder.downsamples",
}


def original_names(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict with the names of the original Wan VAEs."""
    renamed = {}
    last = config.get("num_res_blocks", 2)
    for name, tensor in synthetic_state_dict(config).items():
        old = name
        for new, original in ENDS.items():
            if name.startswith(f"{new}."):
                old = original + name.removeprefix(new)
        old = old.replace(".resnets.", ".downsamples.")
        old = old.replace(".downsampler.", f".downsamples.{last}.")
        if re.match(r"encoder\.(downsamples|middle)", old):
            for new, place in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
                old = old.replace(f".{new}.", f".residual.{place}.")
            old = old.replace(".conv_shortcut.", ".shortcut.")
        renamed[old] = tensor.contiguous()
    return renamed


def same(got: FrameEncoder, config: dict[str, Any]) -> None:
    wanted = FrameEncoder.from_state_dict(synthetic_state_dict(config), config).state_dict()
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
def test_a_single_file_of_original_names(tmp_path: Path, config: Any, suffix: str) -> None:
    tensors = original_names(config)
    assert "encoder.conv_in.weight" not in tensors
    assert diffusers_names(tensors).keys() == tensors.keys()
    assert set(diffusers_names(tensors).values()) == set(synthetic_state_dict(config))
    path = tmp_path / f"vae{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    got = FrameEncoder.from_pretrained(path, dtype=torch.float32)
    shapes = {name: tuple(t.shape) for name, t in synthetic_state_dict(config).items()}
    same(got, family_config(shapes))
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(FrameEncoder.from_pretrained(path, dtype=torch.float32), config)


def test_the_names_are_those_diffusers_converts() -> None:
    loaders = pytest.importorskip("diffusers.loaders.single_file_utils")
    blocks = [f"residual.{i}" for i in (2, 6)]
    names = [f"{end}.weight" for end in ("conv1", "conv2", "encoder.conv1", "decoder.conv1")]
    for network, way in (("encoder", "down"), ("decoder", "up")):
        names += [f"{network}.head.0.gamma", f"{network}.head.2.bias"]
        names += [f"{network}.middle.{i}.{b}.weight" for i in (0, 2) for b in blocks]
        names += [f"{network}.middle.1.{part}.weight" for part in ("to_qkv", "proj")]
        names += [f"{network}.{way}samples.{i}.{b}.bias" for i in (0, 1, 4, 6) for b in blocks]
    names += [f"encoder.downsamples.{i}.resample.1.weight" for i in (2, 5, 8)]
    names += ["encoder.downsamples.3.shortcut.weight", "decoder.upsamples.4.shortcut.weight"]
    names += [f"decoder.upsamples.{i}.resample.1.weight" for i in (3, 7, 11)]
    names += ["decoder.upsamples.3.time_conv.bias", "encoder.downsamples.5.time_conv.bias"]
    for name, ours in diffusers_names(names).items():
        assert [ours] == list(loaders.convert_wan_vae_to_diffusers({name: 0}))


def test_no_code_runs_from_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "vae.pth"
    torch.save({"a": Path}, path)
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        FrameEncoder.from_pretrained(path)
    path.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        FrameEncoder.from_pretrained(path)


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_variants_that_diffusers_writes(tmp_path: Path, shard: str | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLWan(**WAN22, decoder_base_dim=4, out_channels=12)
    size = {"max_shard_size": shard} if shard else {}
    vae.save_pretrained(tmp_path / "half", variant="fp16", **size)
    wanted = FrameEncoder.from_vae(vae, probe=False).state_dict()
    for variant in ("fp16", None):  # the only one there is needs no name
        got = FrameEncoder.from_pretrained(
            tmp_path / "half", subfolder=None, dtype=torch.float32, variant=variant
        )
        assert all(torch.equal(t, wanted[name]) for name, t in got.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.int4\.safetensors"):
        FrameEncoder.from_pretrained(tmp_path / "half", variant="int4")


def test_float8_is_refused_by_name(tmp_path: Path) -> None:
    tensors = original_names(WAN22)
    name = "encoder.conv1.weight"
    scale = {"encoder.conv1.scale_weight": torch.ones(1)}
    save_file(
        {**tensors, **scale, name: tensors[name].to(torch.float8_e4m3fn)},
        tmp_path / "v.safetensors",
    )
    with pytest.raises(
        UnsupportedVAEError, match=r"encoder\.conv_in\.weight must be .* got F8_E4M3: .*float8"
    ):
        FrameEncoder.from_pretrained(tmp_path / "v.safetensors")


def test_a_device_by_number_is_no_default() -> None:
    def fold() -> FrameEncoder:
        return FrameEncoder.from_state_dict(synthetic_state_dict(WAN21), WAN21, device=0)

    if torch.accelerator.is_available():
        assert fold().device.index == 0
    else:
        with pytest.raises((RuntimeError, AssertionError)):
            fold()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, WAN21, synthetic_state_dict(WAN21))
    return folder


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "change",
    [
        {"num_res_blocks": 10**6},
        {"dim_mult": [1] * 10**6},
        {"base_dim": 10**400},
        {"z_dim": 10**400},
        {"patch_size": 10**200, "in_channels": 3 * 10**400},
        {"latents_mean": [10**400] * 16},
        {"latents_mean": [[]] * 16},
        {"latents_std": [1e-40] * 16},
        {"latents_std": [1e-6] * 16},
        {"latents_std": [float("nan")] * 16},
        {"is_residual": "false"},
        {"temperal_downsample": ["no"] * 3},
        {"base_dim": "a" * 10**6},
        {"attn_scales": "a" * 10**6},
        {"latents_mean": "a" * 10**6},
        DEEP,
        '{"a":' + DEEP + "}",
        '{"z_dim": ' + "9" * 10_000 + "}",
    ],
    ids=lambda change: str(change)[:24],
)
def test_hostile_configurations(folder: Path, change: Any) -> None:
    text = change if isinstance(change, str) else json.dumps({**WAN21, **change})
    (folder / "config.json").write_text(text)
    with pytest.raises((CheckpointError, UnsupportedVAEError)) as caught:
        FrameEncoder.from_pretrained(folder)
    assert len(str(caught.value)) < 1000
