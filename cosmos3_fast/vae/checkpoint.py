"""Read a part of a VAE checkpoint: `config.json` and safetensors, one file or shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos3_fast.vae.topology import Shape, Topology, UnsupportedVAEError

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint file is missing, unreadable or incomplete; the message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """An open VAE checkpoint; the tensors of one part are checked by name, shape and dtype.

    Attributes:
        folder: where it lies.
        config: the contents of `config.json`.
        topology: of the part that is read.
    """

    folder: Path
    config: dict[str, Any]
    topology: Topology
    _slices: Mapping[str, Any]

    def read(self, name: str) -> Tensor:
        """The part of a tensor that acts on one frame.

        The last temporal tap of a 3-D convolution ([Cout, Cin, 1, kH, kW]), all of anything else;
        of both, the rows that the topology names.
        """
        part = self._slices[name]
        rows = self.topology.rows(name)
        if len(part.get_shape()) == 5:
            return part[rows, :, -1:]
        return part[rows]

    def read_earlier(self, name: str) -> Tensor:
        """The temporal taps of a 3-D convolution that `read` leaves out, for later frames."""
        return self._slices[name][:, :, :-1]


@contextmanager
def open_checkpoint(
    path_or_repo: str | os.PathLike[str], subfolder: str, topology_type: type[Topology]
) -> Iterator[Checkpoint]:
    """Find, open and check a checkpoint; its files stay open inside the block.

    Args:
        path_or_repo, subfolder: see `FoldedNetwork.from_pretrained`.
        topology_type: of the part to read; other tensors, and files without one, are not opened.

    Raises:
        CheckpointError: see there.
        UnsupportedVAEError: the configuration or a tensor is not that of a supported VAE.
    """
    folder = _find_folder(path_or_repo, subfolder)
    config = _read_json(folder / "config.json")
    with ExitStack() as stack:
        slices = _open_slices(folder, topology_type.holds, stack)
        shapes: dict[str, Shape] = {}
        try:
            for name, part in slices.items():
                shapes[name] = tuple(part.get_shape())
            topology = topology_type.from_state_dict(shapes, config)
            for name, part in slices.items():
                if part.get_dtype() not in _FLOAT_DTYPES:
                    raise UnsupportedVAEError(
                        f"{name} is {part.get_dtype()}, wanted one of {list(_FLOAT_DTYPES)}"
                    )
        except UnsupportedVAEError as error:
            raise UnsupportedVAEError(f"{folder}: {error}") from None
        yield Checkpoint(folder, config, topology, slices)


def _find_folder(path_or_repo: str | os.PathLike[str], subfolder: str) -> Path:
    root = Path(path_or_repo)
    if not root.exists():
        root = _fetch(os.fspath(path_or_repo), subfolder)
    for folder in (root / subfolder, root):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"no config.json in {root / subfolder} or {root}")


def _fetch(repo: str, subfolder: str) -> Path:
    problem = f"{repo!r} is not a folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{problem}; to fetch it as a repository, install huggingface_hub"
        ) from None
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [
        prefix + name for name in ("config.json", "*.safetensors", "*.safetensors.index.json")
    ]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"{problem} and could not be fetched as a repository: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, wanted a JSON object")
    return content


def _open_slices(folder: Path, wanted: Callable[[str], bool], stack: ExitStack) -> dict[str, Any]:
    """Lazy slices of the wanted tensors by name; opens the files that hold them."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return _file_slices(_single_file(folder), wanted, stack)
    if len(indices) > 1:
        raise CheckpointError(f"{folder} has several indices: {[p.name for p in indices]}")
    weight_map = _read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{indices[0]} has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if wanted(name):
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{indices[0]}: {shard!r} for {name} is no file name")
            shards.setdefault(shard, []).append(name)
    slices: dict[str, Any] = {}
    for shard, names in shards.items():
        held = _file_slices(folder / shard, wanted, stack)
        for name in names:
            if name not in held:
                raise CheckpointError(f"{folder / shard} lacks {name}, which the index puts there")
            slices[name] = held[name]
    return slices


def _single_file(folder: Path) -> Path:
    preferred = folder / _WEIGHTS
    if preferred.is_file():
        return preferred
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = [path.name for path in found] or "no *.safetensors"
        raise CheckpointError(f"{folder} has no {_WEIGHTS}, and {names}")
    return found[0]


def _file_slices(path: Path, wanted: Callable[[str], bool], stack: ExitStack) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        # Opening checks the header and that the file is as long as the header says.
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        names = filter(wanted, file.keys())
        return {name: file.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
