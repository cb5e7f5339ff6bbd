"""The files of a cache: shards, which are Parquet files of one row a block, and the manifest that lists them.

Row groups have one row, so that a block is read alone; pages are packed by zstd and carry checksums that are verified
on read. Whatever a damaged file leads to becomes one `DataError` that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd import records
from sparsekd.errors import DataError, MismatchError
from sparsekd.records import Record
from sparsekd.teacher.codecs import Codec, codec_for

Identity = Record  # what a cache was made from; with another one its shards do not mix
_FORMAT = 2
ALIGNMENT = "row t predicts token t+1"
_SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")
_WAY_OUT = "remove it and run sparsekd cache again, which makes only what is missing"


class Shard(NamedTuple):
    """What the manifest says of a shard."""

    name: str
    bytes: int
    sha256: str
    block_ids: list[int]


def shard_name(number: int) -> str:
    """A shard's file."""
    return f"part-{number:05d}.parquet"


def shard_number(name: str) -> int | None:
    """None for what is no name of a shard."""
    found = _SHARD_NAME.fullmatch(name)
    return int(found[1]) if found else None


def schema_of(codec: Codec, identity: Identity, block_ids: Sequence[int]) -> pa.Schema:
    """Of a shard; its metadata say what it was made from and which blocks it holds."""
    keys = [("block_id", pa.int64()), ("tokens_hash", pa.string()), ("num_rows", pa.int32())]
    metadata = {"format": _FORMAT, "identity": identity, "block_ids": list(block_ids)}
    schema = pa.schema([*keys, *((plane, pa.large_binary()) for plane in codec.planes)])
    return schema.with_metadata({"sparsekd": json.dumps(metadata)})


def codec_of(identity: Identity) -> Codec:
    """How the rows of a cache are packed."""
    return codec_for(identity["codec"], identity["top_k"], identity["vocab_size"])


def open_shard(path: Path) -> pq.ParquetFile:
    """Opens a shard; what a damaged one leads to is one `DataError`."""
    with damage(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def blocks_of(file: pq.ParquetFile, path: Path, identity: Identity) -> list[int]:
    """The blocks that a shard says it holds; raises `MismatchError` when it says that it was made from other things."""
    with damage(path):
        metadata = json.loads(file.schema_arrow.metadata[b"sparsekd"])
        _require_format(metadata.get("format", metadata.get("codec")), path)
        require_identity(dict(metadata["identity"]), identity, path)
        return list(metadata["block_ids"])


def write_manifest(path: Path, identity: Identity, shards: Iterable[Shard]) -> None:
    """Writes a manifest; with that of the whole cache it is finished."""
    records.write(path, {"format": _FORMAT, "identity": identity, "shards": [shard._asdict() for shard in shards]})


def read_manifest(path: Path) -> tuple[Identity, list[Shard]]:
    """Identity and shards; raises `DataError` unless every shard is a plain file name of ours."""
    manifest = records.read(path, way_out=_WAY_OUT)
    with damage(path):
        _require_format(manifest.get("format", manifest.get("codec")), path)
        identity, shards = manifest["identity"], manifest["shards"]
        for shard in shards:
            if shard_number(shard["name"]) is None:
                raise ValueError(f"{shard['name']!r} is no name of a shard")
            if not all(isinstance(i, int) for i in [shard["bytes"], *shard["block_ids"]]):
                raise ValueError(f"{shard['name']} is listed without its size or blocks")
        return dict(identity), [Shard(*(shard[key] for key in Shard._fields)) for shard in shards]


def require_sizes(folder: Path, shards: Iterable[Shard]) -> None:
    """Raises `DataError` for a shard that is missing or has another size than it is listed with."""
    for shard in shards:
        path = folder / shard.name
        size = path.stat().st_size if path.exists() else 0
        if size != shard.bytes:
            raise DataError(damaged(path, f"{size} bytes, expected {shard.bytes}"))


def require_identity(found: Identity, wanted: Identity, path: Path) -> None:
    """Raises `MismatchError` naming the first thing that differs of what two parts of a cache were made from."""
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise MismatchError(
                f"{path} was made with {key} = {found.get(key)}, now asked for {wanted.get(key)}; "
                "use --fresh or another --out"
            )


def _require_format(found: object, path: Path) -> None:
    if found != _FORMAT:
        raise MismatchError(f"{path} has the cache format {found}, this version reads {_FORMAT}: use --fresh")


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Makes whatever a damaged file leads to one `DataError` that names it."""
    try:
        yield
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(damaged(path, error)) from error


def damaged(path: Path, error: object) -> str:
    """The line that names a damaged file, what is wrong, and what to do."""
    reason = " ".join(str(error).split())  # pyarrow's take several lines
    return f"{path} is damaged: {reason or type(error).__name__}; {_WAY_OUT}"
