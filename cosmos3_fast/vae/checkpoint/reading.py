"""Read a part of a VAE checkpoint: checked by name, shape and dtype, only what is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_fast.vae.checkpoint.files import CheckpointError, find_checkpoint, open_slices
from cosmos3_fast.vae.checkpoint.names import family_config
from cosmos3_fast.vae.topology import Shape, Topology, UnsupportedVAEError

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """An open VAE checkpoint; the tensors of one part are checked by name, shape and dtype.

    Attributes:
        location: the folder or file where it lies.
        config: the contents of `config.json`, or of its family where there is none.
        topology: of the part that is read.
        tensors: slices of its tensors by name (`fold.Taps` reads what acts).
    """

    location: Path
    config: dict[str, Any]
    topology: Topology
    tensors: Mapping[str, Any]


@contextmanager
def open_checkpoint(
    path_or_repo: str | os.PathLike[str],
    subfolder: str,
    topology_type: type[Topology],
    variant: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Iterator[Checkpoint]:
    """Find, open and check a checkpoint; its files stay open inside the block.

    Args:
        path_or_repo, subfolder, variant, hub: see `checkpoint_files`.
        topology_type: of the part to read; other tensors, and shards without one, are not opened.

    Raises:
        CheckpointError: see there.
        UnsupportedVAEError: the configuration or a tensor is not that of a supported VAE.
    """
    location, config = find_checkpoint(path_or_repo, subfolder, variant, hub or {})
    with ExitStack() as stack:
        held = open_slices(location, topology_type.holds, stack, variant)
        slices = {name: part for name, part in held.items() if topology_type.holds(name)}
        try:
            _refuse_float8(held)
            if config is None:
                config = family_config({n: tuple(part.get_shape()) for n, part in held.items()})
            shapes: dict[str, Shape] = {n: tuple(part.get_shape()) for n, part in slices.items()}
            topology = topology_type.from_state_dict(shapes, config)
            for name, part in slices.items():
                if part.get_dtype() not in _FLOAT_DTYPES:
                    raise UnsupportedVAEError(
                        f"{name} must be one of {list(_FLOAT_DTYPES)}, got {part.get_dtype()}"
                    )
        except UnsupportedVAEError as error:
            raise UnsupportedVAEError(f"{location}: {error}") from None
        yield Checkpoint(location, config, topology, slices)


def _refuse_float8(slices: Mapping[str, Any]) -> None:
    """Eight-bit weights mean nothing without their scales, which every tool stores differently."""
    for name, part in slices.items():
        if part.get_dtype().startswith("F8_"):
            raise UnsupportedVAEError(
                f"{name[:120]} must be one of {list(_FLOAT_DTYPES)}, got {part.get_dtype()}: "
                "(scaled) float8 weights are not read, take a file of 16 or 32 bits"
            )
