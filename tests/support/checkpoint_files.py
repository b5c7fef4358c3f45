"""Checkpoint folders of any sharding, written as diffusers writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    max_shard_bytes: int | None = None,
) -> None:
    """Write `config.json` and safetensors as diffusers' `save_pretrained` lays them out.

    Args:
        folder: created if missing.
        max_shard_bytes: start a new shard (and write an index) where a file would exceed this.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in state_dict.items():
        size = tensor.numel() * tensor.element_size()
        if room is not None and max_shard_bytes is not None:
            if size > room and shards[-1]:
                shards.append({})
                room = max_shard_bytes
            room -= size
        shards[-1][name] = tensor.contiguous()
    stem = "diffusion_pytorch_model"
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    size = sum(t.numel() * t.element_size() for t in state_dict.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
