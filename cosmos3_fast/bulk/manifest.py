"""The manifest: a Parquet table with a row per sample, in one part per shard."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos3_fast.bulk.folder import Folder, FolderError, write_bytes
from cosmos3_fast.bulk.reading import Failure, Known, Sample, key_of

if TYPE_CHECKING:
    import pyarrow as pa


_NUMBER = re.compile(r"([0-9]{1,18})")


def sample_schema() -> pa.Schema:
    """The Arrow schema of a `reading.Sample`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("file_index", pa.int64()),
            ("row", pa.int64()),
            ("content_hash", pa.string()),
            ("original_height", pa.int32()),
            ("original_width", pa.int32()),
            ("crop", pa.list_(pa.float64(), 4)),
            ("pixel_height", pa.int32()),
            ("pixel_width", pa.int32()),
            ("pixel_frames", pa.int32()),
            ("warnings", pa.string()),
        ]
    )


def manifest_schema() -> pa.Schema:
    """The schema of the manifest: the key, what is known of the sample, and where its latents are.

    `offset` is that of the tensor's first byte in the shard, `latent_shape` is [z, t, h, w];
    `shard_bytes` and `shard_sha256` are of the whole shard.
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("key", pa.string()),
            *sample_schema(),
            ("latent_shape", pa.list_(pa.int32(), 4)),
            ("dtype", pa.string()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("shard_bytes", pa.int64()),
            ("shard_sha256", pa.string()),
            ("vae_hash", pa.string()),
            ("package_version", pa.string()),
        ]
    )


def names_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("key", pa.string()), ("source", pa.string())])


def errors_schema() -> pa.Schema:
    """The schema of errors.parquet, whose rows are each a `reading.Failure`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("file_index", pa.int64()),
            ("row", pa.int64()),
            ("content_hash", pa.string()),
            ("reason", pa.string()),
        ]
    )


def write_table(target: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    write_bytes(target, buffer.getvalue())


def write_errors(folder: Folder, failures: Sequence[Failure]) -> None:
    """errors.parquet, in the order of the source, one row per picture; none where none failed."""
    if not failures:
        folder.errors.unlink(missing_ok=True)
        return
    by_place = {(each.file_index, each.row): each for each in failures}
    rows = [dataclasses.asdict(by_place[place]) for place in sorted(by_place)]
    write_table(folder.errors, rows, errors_schema())


def read_manifest(folder: Folder) -> pa.Table:
    """Every sample once, in the order of the source.

    A key has two rows where a task of Ray was run again, or content stands twice in a source that
    was encoded in parallel: the first in that order counts. Rows whose shard is missing do not.
    """
    import pyarrow as pa

    shards = {path.name for path in folder.shards.glob("*.safetensors")}
    table = _read_parts(folder.manifest, manifest_schema())
    if not table.num_rows:
        return table
    table = table.filter(pa.array([shard in shards for shard in table["shard"].to_pylist()]))
    table = table.sort_by(
        [("file_index", "ascending"), ("row", "ascending"), ("shard", "ascending")]
    )
    seen: set[str] = set()
    first = []
    for key in table["key"].to_pylist():
        first.append(key not in seen)
        seen.add(key)
    return table.filter(pa.array(first, pa.bool_()))


def by_name(names: Sequence[str]) -> list[int]:
    """The order in which names are sorted, with numbers in them by their value."""

    def key(i: int) -> tuple[list[str | int], str]:
        parts = _NUMBER.split(names[i])
        return [int(part) if j % 2 else part for j, part in enumerate(parts)], names[i]

    return sorted(range(len(names)), key=key)


def sorted_by_name(table: pa.Table) -> pa.Table:
    """The rows of a manifest in the order of `by_name`."""
    import pyarrow as pa

    return table.take(pa.array(by_name(table["source"].to_pylist()), pa.int64()))


def read_names(folder: Folder) -> dict[str, list[str]]:
    """Every name of every sample, by key; in the order of the source as far as it is known."""
    names: dict[str, list[str]] = {}
    manifest = _read_parts(folder.manifest, manifest_schema()).sort_by(
        [("file_index", "ascending"), ("row", "ascending")]
    )
    for table in (manifest, _read_parts(folder.names, names_schema())):
        for key, source in zip(table["key"].to_pylist(), table["source"].to_pylist(), strict=True):
            known = names.setdefault(key, [])
            if source not in known:
                known.append(source)
    return names


def write_names(folder: Folder, known: Sequence[Known], part: str) -> None:
    """Further names of samples, as the part of that name."""
    rows = [{"key": key_of(each.content_hash), "source": each.source} for each in known]
    write_table(folder.names / f"{part}.parquet", rows, names_schema())


def sample_row(sample: Sample) -> dict[str, Any]:
    return {field.name: getattr(sample, field.name) for field in dataclasses.fields(Sample)}


def read_part(part: Path, schema: pa.Schema) -> pa.Table:
    """One part of a table; columns that it has not are null.

    Raises:
        FolderError: it cannot be read; the message names it.
    """
    import pyarrow.parquet as pq

    try:
        return pq.read_table(part, schema=schema)
    except Exception as error:  # parsers of broken files raise whatever they like
        raise FolderError(
            f"{str(part)!r} cannot be read: {error}; run `encode` again to mend it"
        ) from error


def _read_parts(folder: Path, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    parts = sorted(folder.glob("*.parquet"))
    if not parts:
        return schema.empty_table()
    return pa.concat_tables([read_part(part, schema) for part in parts])
