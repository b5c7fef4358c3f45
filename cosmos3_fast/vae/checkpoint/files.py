"""Find the files of a VAE checkpoint and open their tensors lazily, whatever layout they have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos3_fast.arguments import quoted
from cosmos3_fast.vae.checkpoint.names import diffusers_names

_STEM = "diffusion_pytorch_model"
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
# Two hundred tensors make a VAE, and a few kilobytes its configuration.
_MOST_TENSORS = 20_000
_MOST_JSON_BYTES = 1 << 24
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class CheckpointError(ValueError):
    """A checkpoint file is missing, unreadable or incomplete; the message names it."""


def find_checkpoint(
    path_or_repo: str | os.PathLike[str],
    subfolder: str,
    variant: str | None,
    hub: Mapping[str, Any],
) -> tuple[Path, dict[str, Any] | None]:
    """The folder or single file that holds the weights, and the configuration where there is one.

    Args:
        path_or_repo: a file; a folder with `config.json`, or with it in `subfolder`; or the id of a
            repository to fetch.
        subfolder: looked into first; "" for none.
        variant: what stands before `.safetensors` in the names to fetch, such as "fp16".
        hub: `revision`, `token`, `cache_dir`, `local_files_only`; those not None are passed on.

    Raises:
        CheckpointError: nothing is there, or `config.json` cannot be read.
    """
    root = Path(path_or_repo)
    try:
        exists = root.exists()
    except OSError as error:
        raise CheckpointError(f"{quoted(str(root))} is no path: {error.strerror}") from None
    if not exists and (root.is_absolute() or root.suffix in (".safetensors", *_PICKLES)):
        raise CheckpointError(f"{quoted(str(root))} does not exist")
    if root.is_file():
        beside = root.parent / "config.json"
        return root, _read_json(beside) if beside.is_file() else None
    if not exists:
        root = _fetch(os.fspath(path_or_repo), subfolder, variant, hub)
    for folder in (root / subfolder, root):
        if (folder / "config.json").is_file():
            return folder, _read_json(folder / "config.json")
    raise CheckpointError(f"no config.json in {root / subfolder} or {root}")


def _fetch(repo: str, subfolder: str, variant: str | None, hub: Mapping[str, Any]) -> Path:
    problem = f"{quoted(repo)} is not a folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{problem}; to fetch it as a repository, install huggingface_hub"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    index = f"*.safetensors.index.{variant}.json" if variant else "*.safetensors.index.json"
    patterns = [prefix + name for name in ("config.json", weights, index)]
    options = {name: value for name, value in hub.items() if value not in (None, False)}
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, **options))
    except Exception as error:
        raise CheckpointError(
            f"{problem} and could not be fetched as a repository: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError(
                f"it must have at most {_MOST_JSON_BYTES} bytes, got {path.stat().st_size}"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def open_slices(
    location: Path, wanted: Callable[[str], bool], stack: ExitStack, variant: str | None = None
) -> dict[str, Any]:
    """Lazy slices of a checkpoint's tensors by diffusers' names; opens the files that hold them.

    Args:
        location: a folder or a file, as `find_checkpoint` gives it.
        wanted: whether a tensor is; shards that hold none of them are not opened.
        stack: keeps the files open.
        variant: which set of weights, where the folder has several.

    Raises:
        CheckpointError: a file is missing, unreadable or truncated, or the choice is not unique.
    """
    if location.is_file():
        return _renamed(_file_slices(location, stack))
    index = _index(location, variant)
    if index is None:
        return _renamed(_file_slices(_single_file(location, variant), stack))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    _check_count(index, len(weight_map))
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if wanted(name):
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{index}: {quoted(shard)} for {name[:120]} is no file name")
            shards.setdefault(shard, []).append(name)
    slices: dict[str, Any] = {}
    for shard, names in shards.items():
        held = _file_slices(location / shard, stack)
        for name in names:
            if name not in held:
                raise CheckpointError(
                    f"{location / shard} lacks {name}, which the index puts there"
                )
            slices[name] = held[name]
    return slices


def _index(folder: Path, variant: str | None) -> Path | None:
    plain = folder / f"{_STEM}.safetensors.index.json"
    if variant is not None:
        named = folder / f"{_STEM}.safetensors.index.{variant}.json"
        return named if named.is_file() else None
    if plain.is_file():
        return plain
    if (folder / f"{_STEM}.safetensors").is_file():
        return None
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    if len(indices) > 1:
        names = [path.name for path in indices]
        raise CheckpointError(f"{folder} has several indices: {names}; choose with variant=")
    return indices[0] if indices else None


def _single_file(folder: Path, variant: str | None) -> Path:
    infix = f".{variant}" if variant else ""
    preferred = folder / f"{_STEM}{infix}.safetensors"
    if preferred.is_file():
        return preferred
    found = sorted(folder.glob(f"*{infix}.safetensors"))
    if len(found) == 1:
        return found[0]
    shown = [path.name for path in found[:4]] + ["…"] * (len(found) > 4)
    what = f"no {preferred.name}, and " + (str(shown) if found else f"no *{infix}.safetensors")
    raise CheckpointError(f"{folder} has {what}")


def _file_slices(path: Path, stack: ExitStack) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.suffix in _PICKLES:
        return _pickled_slices(path)
    try:
        # Opening checks the header and that the file is as long as the header says.
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        names = list(file.keys())
        _check_count(path, len(names))
        return {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def _pickled_slices(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read with weights_only=True: {reason}") from error
    for key in ("state_dict", "model_state", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a state dict, got {type(content).__name__}")
    _check_count(path, len(content))
    return {name: _Whole(value) for name, value in content.items() if isinstance(value, Tensor)}


class _Whole:
    """A tensor in memory with the interface of a safetensors slice."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPE_NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]


def _check_count(path: Path, count: int) -> None:
    if count > _MOST_TENSORS:
        raise CheckpointError(f"{path} must have at most {_MOST_TENSORS} tensors, got {count}")


def _renamed(slices: dict[str, Any]) -> dict[str, Any]:
    names = diffusers_names(slices)
    return {names[name]: part for name, part in slices.items()}
