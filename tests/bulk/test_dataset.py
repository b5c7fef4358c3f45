"""`LatentDataset`: in a DataLoader, in another process, and refused where the VAE is another."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("pyarrow", reason="the bulk extra is not installed")
pytest.importorskip("tqdm", reason="the bulk extra is not installed")

from bulk_cases import encode_tiny, picture, tiny_checkpoint, tiny_encoder, write_pictures
from checkpoint_files import write_checkpoint
from encoder_cases import TINY_CLIP

from cosmos3_fast import ClipEncoder
from cosmos3_fast.bulk import LatentDataset, dataset
from cosmos3_fast.bulk.folder import FolderError
from cosmos3_fast.bulk.manifest import by_name
from cosmos3_fast.vae.synthetic import synthetic_state_dict


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "in", 9)
    encode_tiny(tmp_path / "in", tmp_path / "out", shard_size=2)
    return tmp_path / "out"


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_a_loader(folder: Path, context: str | None):
    data = LatentDataset(folder)
    data[0]  # its shard is open when the workers start
    loader = DataLoader(
        data, batch_size=3, num_workers=2 if context else 0, multiprocessing_context=context
    )
    batches = list(loader)
    latents = torch.cat([batch["latents"] for batch in batches])
    assert latents.shape == (9, 4, 1, 4, 6)
    assert latents.dtype == torch.bfloat16
    assert torch.equal(latents, torch.stack([data[i]["latents"] for i in range(9)]))
    assert [key for batch in batches for key in batch["key"]] == [data[i]["key"] for i in range(9)]


def test_shards_are_mapped_and_closed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "_OPEN_SHARDS", 2)
    data = LatentDataset(folder)
    kept = [data[i]["latents"] for i in range(len(data))]
    assert len(data._open) == 2
    # Samples are in memory of their own: two shards are mapped, of five.
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.rsplit("/", 1)[1] for line in maps if str(folder / "shards") in line}
    assert len(mapped) == 2
    # A sample that is written to is the reader's own.
    before = kept[0].clone()
    kept[0].zero_()
    assert torch.equal(LatentDataset(folder)[0]["latents"], before)


def test_a_copy_by_pickle(folder: Path):
    data = LatentDataset(folder)
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3]["latents"], data[3]["latents"])
    assert copy.names(2) == data.names(2)


def test_indices(folder: Path):
    data = LatentDataset(folder)
    assert data[-1]["key"] == data[8]["key"]
    assert data[torch.tensor(2)]["key"] == data[2]["key"]
    for index in (9, -10):
        with pytest.raises(IndexError, match=r"index must be in \[-9, 9\)"):
            data[index]
    with pytest.raises(TypeError, match="index must be an integer, got 'a'"):
        data["a"]  # type: ignore[index]


def test_another_vae_is_refused(folder: Path, tmp_path: Path):
    data = LatentDataset(folder, tiny_encoder())
    assert LatentDataset(folder, data.vae_hash).vae_hash == data.vae_hash
    for vae in (tiny_encoder(1), "0" * 64):
        with pytest.raises(FolderError, match=f"must hold latents of the VAE .*{data.vae_hash}"):
            LatentDataset(folder, vae)
    # Shards of another folder, moved in by hand.
    write_pictures(tmp_path / "more", 2, first=20)
    encode_tiny(tmp_path / "more", tmp_path / "other", vae=tiny_encoder(1))
    for name in ("shards", "manifest"):
        for path in (tmp_path / "other" / name).iterdir():
            path.rename(folder / name / path.name)
    with pytest.raises(FolderError, match="must hold latents of one VAE"):
        LatentDataset(folder)


def test_a_checkpoint_and_the_vae_from_it_have_one_hash(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    checkpoint = tiny_checkpoint(tmp_path / "vae")
    write_pictures(tmp_path / "in", 2)
    encode_tiny(tmp_path / "in", tmp_path / "out", vae=checkpoint)
    live = diffusers.AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae")
    assert len(LatentDataset(tmp_path / "out", live)) == 2
    assert len(LatentDataset(tmp_path / "out", checkpoint)) == 2
    with torch.no_grad():
        live.encoder.conv_in.weight[..., -1, 1, 1] += 1
    with pytest.raises(FolderError):
        LatentDataset(tmp_path / "out", live)


def test_folders_that_hold_none(folder: Path, tmp_path: Path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FolderError, match="holds no dataset of latents"):
            LatentDataset(path)
    description = folder / "dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(FolderError, match="another version of this package wrote it"):
        LatentDataset(folder)
    description.write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        LatentDataset(folder)


def test_the_documented_example_trains(folder: Path):
    text = (Path(__file__).parents[2] / "docs" / "bulk.md").read_text()
    (example,) = (block for block in text.split("```python\n")[1:] if "LatentDataset" in block)
    code = example.split("```")[0]
    for name, own in {
        '"latents",': f"{str(folder)!r},",
        '"path/to/Cosmos3"': f'"{LatentDataset(folder).vae_hash}"',
        "48, 48": "4, 4",
    }.items():
        assert name in code
        code = code.replace(name, own)
    state: dict[str, Any] = {}
    exec(code, state)
    assert torch.isfinite(state["loss"])
    assert state["batch"]["latents"].shape[1:] == (4, 1, 4, 6)


def test_a_sample_is_the_callers_own(folder: Path):
    data = LatentDataset(folder)
    before = data[0]["latents"].clone()
    data[0]["latents"].mul_(0.18)
    sample = data[0]
    sample["latents"].zero_()
    assert torch.equal(data[0]["latents"], before)


def test_a_relative_path_outlives_another_working_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder.parent)
    data = LatentDataset(folder.name)
    monkeypatch.chdir("/")
    assert torch.equal(data[3]["latents"], LatentDataset(folder)[3]["latents"])
    assert data.names(3)
    copy = pickle.loads(pickle.dumps(data))
    assert len(copy.names(2)) == 1


def test_the_order_does_not_depend_on_what_was_added_when(tmp_path: Path):
    seeds = {name: i for i, name in enumerate("fbdaec")}
    source = tmp_path / "in"
    source.mkdir()
    for names in ("bd", "fa", "ec"):
        for name in names:
            picture(seeds[name]).save(source / f"{name}.png")
        encode_tiny(source, tmp_path / "out")
    data = LatentDataset(tmp_path / "out")
    found = [Path(data[i]["source"]).stem for i in range(6)]
    assert found == list("abcdef")
    assert data.shapes[0] == tuple(data[0]["latents"].shape)
    encode_tiny(source, tmp_path / "whole")
    whole = LatentDataset(tmp_path / "whole")
    assert [whole[i]["key"] for i in range(6)] == [data[i]["key"] for i in range(6)]


def test_numbers_in_names_count_by_their_value():
    names = ["a/10.png", "a/9.png", "b.png", "a/x2#3", "a/x10#1", "a/x2#20", "a/009.png", ""]
    wanted = ["", "a/009.png", "a/9.png", "a/10.png", "a/x2#3", "a/x2#20", "a/x10#1", "b.png"]
    assert [names[i] for i in by_name(names)] == wanted


@pytest.mark.parametrize("kind", ["encoder", "checkpoint"])
def test_clips_tell_vaes_apart_that_agree_on_one_frame(tmp_path: Path, kind: str):
    """They differ in the taps that act on earlier frames."""
    config = {**TINY_CLIP, "decoder_base_dim": 8}
    tensors = synthetic_state_dict(config, 0)
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other["encoder.conv_in.weight"][:, :, 0] += 1
    vaes: list[Any] = []
    for i, each in enumerate((tensors, other)):
        if kind == "encoder":
            vaes.append(ClipEncoder.from_state_dict(each, config, torch.float32))
        else:
            write_checkpoint(tmp_path / f"vae{i}" / "vae", config, each)
            vaes.append(tmp_path / f"vae{i}")
    frames = [picture(i) for i in range(5)]
    (tmp_path / "in").mkdir()
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:])
    encode_tiny(tmp_path / "in", tmp_path / "clips", vae=vaes[0], clips=5)
    assert len(LatentDataset(tmp_path / "clips", vaes[0])) == 1
    with pytest.raises(FolderError, match="must hold latents of the VAE"):
        LatentDataset(tmp_path / "clips", vaes[1])
    with pytest.raises(FolderError, match="vae_hash"):
        encode_tiny(tmp_path / "in", tmp_path / "clips", vae=vaes[1], clips=5)
    # Of single frames they are one VAE.
    encode_tiny(tmp_path / "in", tmp_path / "frames", vae=vaes[0])
    assert len(LatentDataset(tmp_path / "frames", vaes[1])) == 1


def test_a_folder_in_which_nothing_is_yet(folder: Path):
    for part in ("shards", "manifest"):
        for path in (folder / part).iterdir():
            path.unlink()
    data = LatentDataset(folder)
    assert len(data) == 0
    assert data.shapes == []
    with pytest.raises(IndexError):
        data[0]
