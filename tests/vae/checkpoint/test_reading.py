"""Reading the encoder of a checkpoint folder, whole and broken."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from encoder_cases import RESIDUAL, WAN21, image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cosmos3_fast.vae import FrameEncoder, UnsupportedVAEError
from cosmos3_fast.vae.checkpoint import reading as checkpoint_module
from cosmos3_fast.vae.checkpoint.reading import CheckpointError
from cosmos3_fast.vae.synthetic import synthetic_state_dict, synthetic_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DECODER = {"decoder.conv_in.weight": torch.zeros(4), "post_quant_conv.bias": torch.zeros(4)}
STATE = {**synthetic_state_dict(RESIDUAL), **DECODER}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "vae", RESIDUAL, STATE)
    return tmp_path / "vae"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "vae", RESIDUAL, STATE, max_shard_bytes=2**20)
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 3
    return tmp_path / "vae"


def load(path: Path | str, **kwargs: Any) -> FrameEncoder:
    return FrameEncoder.from_pretrained(path, **kwargs)


def refuse(path: Path | str, *fragments: str, error: type[ValueError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        load(path)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_equals_from_state_dict(
    layout: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    wanted = FrameEncoder.from_state_dict(STATE, RESIDUAL, dtype).state_dict()
    for path in (folder, folder.parent, str(folder)):
        got = load(path, dtype=dtype)
        assert got.dtype == dtype
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.state_dict().items())


def test_default_dtype_is_bfloat16_and_weights_are_copies(single: Path) -> None:
    encoder = load(single)
    assert encoder.dtype == torch.bfloat16
    pixels = image(0, 1, 32, 32, torch.bfloat16)
    before = encoder(pixels)
    (single / WEIGHTS).write_bytes(b"\xff" * (single / WEIGHTS).stat().st_size)
    assert torch.equal(encoder(pixels), before)


@pytest.mark.parametrize("config", [RESIDUAL, WAN21], ids=["wan2.2", "wan2.1"])
def test_reads_what_diffusers_saves(tmp_path: Path, config: dict[str, Any]) -> None:
    pytest.importorskip("diffusers")
    vae = synthetic_vae(config)
    vae.save_pretrained(tmp_path / "one")
    vae.save_pretrained(tmp_path / "many", max_shard_size="1MB")
    assert (tmp_path / "many" / INDEX).is_file()
    wanted = FrameEncoder.from_vae(vae).state_dict()
    for folder in ("one", "many"):
        got = load(tmp_path / folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_another_file_name_and_class_name(single: Path) -> None:
    (single / WEIGHTS).rename(single / "vae.safetensors")
    config = {**RESIDUAL, "_class_name": "SomeOtherVAE"}
    (single / "config.json").write_text(json.dumps(config))
    load(single)


class CountingSlice:
    def __init__(self, name: str, part: Any, taken: dict[str, int]) -> None:
        self.name, self.part, self.taken = name, part, taken

    def get_shape(self) -> list[int]:
        return self.part.get_shape()

    def get_dtype(self) -> str:
        return self.part.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert self.name not in self.taken, f"{self.name} is read twice"
        tensor = self.part[index]
        self.taken[self.name] = tensor.numel()
        return tensor


def test_reads_only_what_one_frame_needs(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, int] = {}
    open_slices = checkpoint_module.open_slices

    def counted(*args: Any) -> dict[str, Any]:
        slices = open_slices(*args)
        return {name: CountingSlice(name, part, taken) for name, part in slices.items()}

    monkeypatch.setattr(checkpoint_module, "open_slices", counted)
    load(single)
    wanted = {}
    for name, tensor in STATE.items():
        if name.startswith("decoder.") or "post_quant" in name or "time_conv" in name:
            continue
        taps = tensor.shape[2] if tensor.dim() == 5 else 1
        halves = 2 if name.startswith("quant_conv.") else 1
        wanted[name] = tensor.numel() // taps // halves
    assert taken == wanted
    assert sum(taken.values()) < 0.4 * sum(tensor.numel() for tensor in STATE.values())


@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.001, 0.3, 0.999])
def test_truncated_file(single: Path, keep: float) -> None:
    path = single / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refuse(single, str(path), "not a complete safetensors file")


def test_one_byte_short_and_garbled_header(single: Path) -> None:
    path = single / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refuse(single, str(path), "not a complete safetensors file")
    path.write_bytes(content[:8] + b"?" + content[9:])
    refuse(single, str(path), "not a complete safetensors file")


def test_truncated_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-4])
    refuse(sharded, str(path), "not a complete safetensors file")


def test_missing_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[0]
    path.unlink()
    refuse(sharded, f"{path} is missing")


def test_shard_of_the_decoder_may_be_missing(single: Path) -> None:
    shutil.move(single / WEIGHTS, single / "encoder.safetensors")
    weight_map = {
        name: "decoder.safetensors" if name in DECODER else "encoder.safetensors" for name in STATE
    }
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    load(single)


def test_index_that_does_not_fit(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(n for n, shard in index["weight_map"].items() if shard == first)

    def write(shard: Any) -> None:
        index["weight_map"][name] = shard
        (sharded / INDEX).write_text(json.dumps(index))

    write(last)
    refuse(sharded, str(sharded / last), f"lacks {name}")
    write("../elsewhere.safetensors")
    refuse(sharded, str(sharded / INDEX), "no file name")
    (sharded / INDEX).write_text("{}")
    refuse(sharded, str(sharded / INDEX), "no weight_map")


def test_missing_and_misshapen_tensors(single: Path) -> None:
    name = "encoder.mid_block.resnets.1.conv2.weight"
    tensors = load_file(single / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != name}, single / WEIGHTS)
    refuse(
        single,
        str(single),
        f"{name} must have shape [64, 64, 3, 3, 3], got no such tensor",
        error=UnsupportedVAEError,
    )
    save_file({**tensors, name: tensors[name][:, :, -1].contiguous()}, single / WEIGHTS)
    refuse(
        single,
        str(single),
        f"{name} must have shape [64, 64, 3, 3, 3], got [64, 64, 3, 3]",
        error=UnsupportedVAEError,
    )
    save_file({**tensors, name: tensors[name].to(torch.int8)}, single / WEIGHTS)
    refuse(
        single,
        str(single),
        f"{name} must be one of ['F64', 'F32', 'F16', 'BF16'], got I8",
        error=UnsupportedVAEError,
    )


@pytest.mark.parametrize("key", ["latents_mean", "latents_std", "base_dim", "is_residual"])
def test_missing_config_key(single: Path, key: str) -> None:
    config = {k: v for k, v in RESIDUAL.items() if k != key}
    (single / "config.json").write_text(json.dumps(config))
    named = key if key.startswith("latents") else "must be those of its config"
    refuse(single, str(single), named, error=UnsupportedVAEError)


def test_wrong_statistics(single: Path) -> None:
    (single / "config.json").write_text(json.dumps({**RESIDUAL, "latents_std": [1.0] * 16}))
    refuse(
        single,
        str(single),
        "latents_std must be z_dim=48 numbers, got 16 values",
        error=UnsupportedVAEError,
    )


def test_unreadable_config(single: Path) -> None:
    path = single / "config.json"
    for content in ("", "{", "[1]"):
        path.write_text(content)
        refuse(single, str(path))
    path.unlink()
    refuse(single, "no config.json in", str(single))


def test_no_or_several_weight_files(single: Path) -> None:
    shutil.copy(single / WEIGHTS, single / "a.safetensors")
    (single / WEIGHTS).rename(single / "b.safetensors")
    refuse(single, str(single), "a.safetensors", "b.safetensors")
    for path in single.glob("*.safetensors"):
        path.unlink()
    refuse(single, str(single), f"no {WEIGHTS}")


def test_repository_is_fetched_with_patterns(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    hub = ModuleType("huggingface_hub")

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(single.parent)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    load("organisation/model")
    patterns = ["vae/config.json", "vae/*.safetensors", "vae/*.safetensors.index.json"]
    assert asked == [("organisation/model", patterns)]

    def offline(repo: str, allow_patterns: list[str]) -> str:
        raise OSError("no network")

    hub.snapshot_download = offline  # type: ignore[attr-defined]
    refuse("organisation/model", "'organisation/model' is not a folder", "no network")


def test_repository_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse("organisation/model", "install huggingface_hub")


def test_written_shards_stay_below_the_limit(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    assert set(index["weight_map"]) == set(STATE)
    for path in sharded.glob("*.safetensors"):
        assert re.fullmatch(r"diffusion_pytorch_model-\d{5}-of-\d{5}\.safetensors", path.name)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        size = sum(STATE[name].numel() * 4 for name in names)
        assert size <= 2**20 or len(names) == 1
