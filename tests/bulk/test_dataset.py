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

from bulk_cases import encode_tiny, tiny_checkpoint, tiny_encoder, write_pictures

from cosmos3_fast.bulk import LatentDataset, dataset
from cosmos3_fast.bulk.folder import FolderError


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
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(folder / "shards")) >= 5
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
