"""The teacher cache: for every position of every block what the teacher believes comes next.

A cache is a folder of Parquet shards (one row a block, row groups of one row, zstd, page checksums that are verified
on read) and a manifest that is written last. Readers ask by block id, never by position in a file, so that any order
pairs each block with its own teacher; a row also carries a hash of its block's tokens and is refused when they
differ. Row t of a block is the teacher's distribution of token t + 1, so a block of L tokens has L - 1 rows.

Several processes may write one cache: process i of n makes every nth shard and a manifest of its own, and `merge`
unites the manifests. Shards do not depend on n. How a row's numbers are packed is in `codecs.py`; no model code here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparsekd import files, records
from sparsekd.errors import DataError, MismatchError, UsageError
from sparsekd.teacher.codecs import Codec, Samples, Targets, codec_for

__all__ = ["ALIGNMENT", "Cache", "Part", "Row", "Samples", "Targets", "Writer", "merge", "tokens_hash"]

FORMAT = 2
ALIGNMENT = "row t predicts token t+1"
_SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")
_PART_MANIFEST = re.compile(r"manifest-(\d+)-of-(\d+)\.json")
_WAY_OUT = "remove it and run sparsekd cache again, which makes only what is missing"
_OPEN_SHARDS = 64  # kept open at once; a large cache has more shards than a process may open files


class Part(NamedTuple):
    """Process `number` (from 1) of `count` that write one cache together."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def owns(self, shard: int) -> bool:
        return shard % self.count == self.number - 1

    def owns_file(self, name: str) -> bool:
        shard = _SHARD_NAME.fullmatch(name)
        return name == self.manifest if shard is None else self.owns(int(shard[1]))

    @property
    def manifest(self) -> str:
        return "manifest.json" if self.count == 1 else f"manifest-{self.number}-of-{self.count}.json"


WHOLE = Part()


class Row(NamedTuple):
    """What is stored for one block."""

    tokens_hash: str
    targets: Targets | Samples


def tokens_hash(tokens: np.ndarray) -> str:
    """What ties a row to the tokens that it was computed from."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").data, digest_size=8).hexdigest()


class Writer:
    """Writes one part of a cache shard by shard; shards that are there already, whole and the same, are kept.

    Made by `Writer.open`, which refuses a second process on the same part.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], part: Part):
        self.folder, self.identity, self.part = folder, identity, part
        self._codec = _codec_of(identity)
        self._shards: dict[int, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: dict[str, Any], part: Part = WHOLE) -> Iterator[Writer]:
        """Takes the part; raises `UsageError` naming the process that has it already."""
        folder.mkdir(parents=True, exist_ok=True)
        what = f"part {part} of the cache {folder}"
        with files.lock(folder / f"writer-{part.number}-of-{part.count}.lock", what):
            files.remove_temporaries(folder, part.owns_file)
            yield cls(folder, identity, part)

    def has(self, number: int, block_ids: Sequence[int]) -> bool:
        """Whether shard `number` is there, of these blocks: with another number of blocks to a shard it is made again.
        Reads all of it: raises `DataError` when it is damaged and `MismatchError` when it was made from something
        else."""
        path = self.folder / _shard_name(number)
        if not path.exists():
            return False
        with _open(path) as file:
            if _blocks_of(file, path, self.identity) != list(block_ids):
                return False
            with _damage(path):
                for row in range(file.num_row_groups):
                    file.read_row_group(row, use_threads=False)
        self._list(number, block_ids)
        return True

    def add(
        self,
        number: int,
        block_ids: Sequence[int],
        blocks: Sequence[np.ndarray],
        targets: Sequence[Targets] | Sequence[Samples],
    ) -> None:
        """Writes shard `number`; raises `DataError` for a block whose probabilities are not a distribution."""
        rows = []
        for block_id, tokens, target in zip(block_ids, blocks, targets, strict=True):
            _check(target, self._codec.vocab_size, f"teacher distributions of block {block_id}")
            keys = {"block_id": block_id, "tokens_hash": tokens_hash(tokens), "num_rows": len(target.ids)}
            rows.append(keys | self._codec.encode(target))
        metadata = {"format": FORMAT, "identity": self.identity, "block_ids": list(block_ids)}
        schema = _schema(self._codec).with_metadata({"sparsekd": json.dumps(metadata)})
        path = self.folder / _shard_name(number)
        with files.atomic_path(path) as temporary:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=schema),
                temporary,
                row_group_size=1,
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=False,
                write_statistics=False,
            )
        self._list(number, block_ids)

    def _list(self, number: int, block_ids: Sequence[int]) -> None:
        path = self.folder / _shard_name(number)
        facts = {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)}
        self._shards[number] = {"name": path.name, **facts, "block_ids": list(block_ids)}

    def finish(self) -> None:
        """Writes the part's manifest. When the part is all of the cache, it is whole from here on."""
        if self.part.count == 1:
            _finish(self.folder, self.identity, self._shards)
        else:
            _write_manifest(self.folder / self.part.manifest, self.identity, self._shards)


class Cache:
    """Reads a whole cache by block id. Raises `DataError` naming the file when it is damaged or incomplete.

    With an `identity`, `MismatchError` names the first field that differs. Without `strict`, a shard of the wrong
    size, or one that is missing, is noticed only when one of its blocks is read.
    """

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None, *, strict: bool = True):
        self.folder = folder
        self.identity, self.shards = _read_manifest(folder / "manifest.json")
        if identity is not None:
            _require_identity(self.identity, identity, folder)
        with _damage(folder / "manifest.json"):
            self._codec = _codec_of(self.identity)
        self._place = {i: (shard["name"], row) for shard in self.shards for row, i in enumerate(shard["block_ids"])}
        self._block_ids = {shard["name"]: shard["block_ids"] for shard in self.shards}
        if strict:
            _require_sizes(folder, self.shards)
        self._file = functools.lru_cache(_OPEN_SHARDS)(self._open_shard)

    @property
    def top_k(self) -> int:
        """Tokens stored for a position."""
        return self._codec.top_k

    @property
    def vocab_size(self) -> int:
        """The teacher's real vocabulary, without the padding of its embeddings."""
        return self._codec.vocab_size

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def block_ids(self) -> Iterable[int]:
        return self._place.keys()

    @property
    def num_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    def require(self, block_ids: Iterable[int]) -> None:
        """Raises `DataError` unless all of `block_ids` are here."""
        _require_blocks(self.folder, self._place.keys(), block_ids)

    def read(self, block_id: int, tokens: np.ndarray) -> Targets | Samples:
        """What the teacher said about one block, L - 1 rows; `tokens` are the block's own, to be sure of the pairing.

        `Samples` when the codec is `sampled`, else `Targets`.
        """
        row = self.row(block_id)
        if row.tokens_hash != tokens_hash(tokens):
            name = self._place[block_id][0]
            raise MismatchError(f"{self.folder / name}: block {block_id} was cached for other tokens; use --fresh")
        return row.targets

    def row(self, block_id: int) -> Row:
        """What is stored under an id, whatever its block is."""
        if block_id not in self._place:
            raise DataError(
                f"the cache {self.folder} has no block {block_id}: it was made for another corpus; use --fresh"
            )
        name, number = self._place[block_id]
        with _damage(self.folder / name):
            values = self._file(name).read_row_group(number, use_threads=False).to_pylist()[0]
            if values["block_id"] != block_id:
                raise ValueError(f"row {number} is of block {values['block_id']}")
            planes = {plane: values[plane] for plane in self._codec.planes}
            return Row(values["tokens_hash"], self._codec.decode(planes, values["num_rows"]))

    def rows(self, left_out: Collection[str] = ()) -> Iterator[tuple[int, Row]]:
        """All rows with their block ids, shard by shard, but for those of the shards that are `left_out`."""
        for block_id, (name, _) in self._place.items():
            if name not in left_out:
                yield block_id, self.row(block_id)

    def damaged_shards(self) -> dict[str, str]:
        """Hashes every shard; what is wrong, in one line, by the name of the shard."""
        found = {}
        for shard in self.shards:
            path = self.folder / shard["name"]
            try:
                _require_sizes(self.folder, [shard])
            except DataError as error:
                found[shard["name"]] = str(error)
            else:
                if files.file_sha256(path) != shard["sha256"]:
                    found[shard["name"]] = _damaged(path, "its content is not what was written")
        return found

    def _open_shard(self, name: str) -> pq.ParquetFile:
        file = _open(self.folder / name)
        if _blocks_of(file, self.folder / name, self.identity) != self._block_ids[name]:
            raise MismatchError(
                f"{self.folder / name} holds other blocks than it should: swapped, or of another cache; use --fresh"
            )
        return file


def is_complete(folder: Path) -> bool:
    """Whether the manifest and every shard that it lists are there."""
    if not (folder / "manifest.json").exists():
        return False
    _, shards = _read_manifest(folder / "manifest.json")
    return all((folder / shard["name"]).exists() for shard in shards)


def merge(folder: Path, block_ids: Collection[int]) -> Cache:
    """Unites the manifests of all parts, after which the cache is whole, and opens it.

    Raises `DataError` naming the part that is not finished, or when the parts together lack some of `block_ids`;
    `MismatchError` when two parts were made from different things.
    """
    found = _part_manifests(folder)
    if not found:
        if (folder / "manifest.json").exists():  # merged already
            return Cache(folder)
        raise DataError(f"{folder} holds no finished shard: run sparsekd cache with --shard 1/N, 2/N ... N/N first")
    counts = sorted({part.count for part in found})
    if len(counts) > 1:
        raise UsageError(f"{folder} holds manifests of {counts[0]} and of {counts[1]} shards: remove those of one")
    parts = [Part(number + 1, counts[0]) for number in range(counts[0])]
    for part in parts:
        if part not in found:
            raise DataError(f"{folder}: shard {part} is not finished: run sparsekd cache with --shard {part}")
    identity, _ = _read_manifest(found[parts[0]])
    shards: dict[int, dict[str, Any]] = {}
    for part in parts:
        of_part, listed = _read_manifest(found[part])
        _require_identity(of_part, identity, found[part])
        _require_sizes(folder, listed)
        shards |= {int(_SHARD_NAME.fullmatch(shard["name"])[1]): shard for shard in listed}  # type: ignore[index]
    _require_blocks(folder, [i for shard in shards.values() for i in shard["block_ids"]], block_ids)
    _finish(folder, identity, shards)
    return Cache(folder)


def _part_manifests(folder: Path) -> dict[Part, Path]:
    named = ((_PART_MANIFEST.fullmatch(path.name), path) for path in folder.iterdir())
    return {Part(int(name[1]), int(name[2])): path for name, path in named if name}


def forget_parts(folder: Path) -> None:
    """Removes manifests of parts; their shards stay, and whoever writes the cache next takes them over."""
    for path in _part_manifests(folder).values():
        files.remove(path)


def _finish(folder: Path, identity: dict[str, Any], shards: dict[int, dict[str, Any]]) -> None:
    _write_manifest(folder / "manifest.json", identity, shards)
    forget_parts(folder)
    listed = {shard["name"] for shard in shards.values()}
    for path in folder.iterdir():
        if _SHARD_NAME.fullmatch(path.name) and path.name not in listed:  # of a call with smaller shards
            files.remove(path)


def _require_blocks(folder: Path, found: Iterable[int], wanted: Iterable[int]) -> None:
    needed = set(wanted)
    missing = needed - set(found)
    if missing:
        raise DataError(
            f"the cache {folder} lacks {len(missing)} of the {len(needed)} blocks that are needed, the first is block "
            f"{min(missing)}: it was made for another corpus; make it again with --fresh"
        )


def _write_manifest(path: Path, identity: dict[str, Any], shards: dict[int, dict[str, Any]]) -> None:
    listed = [shard for _, shard in sorted(shards.items())]
    records.write(path, {"format": FORMAT, "identity": identity, "shards": listed})


def _read_manifest(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Identity and shards; raises `DataError` unless every shard is a plain file name of ours."""
    manifest = records.read(path, way_out=_WAY_OUT)
    with _damage(path):
        _require_format(manifest.get("format", manifest.get("codec")), path)
        identity, shards = manifest["identity"], manifest["shards"]
        for shard in shards:
            if not _SHARD_NAME.fullmatch(shard["name"]):
                raise ValueError(f"{shard['name']!r} is no name of a shard")
            if not all(isinstance(i, int) for i in [shard["bytes"], *shard["block_ids"]]):
                raise ValueError(f"{shard['name']} is listed without its size or blocks")
        return dict(identity), list(shards)


def _require_sizes(folder: Path, shards: Iterable[dict[str, Any]]) -> None:
    for shard in shards:
        path = folder / shard["name"]
        size = path.stat().st_size if path.exists() else 0
        if size != shard["bytes"]:
            raise DataError(_damaged(path, f"{size} bytes, expected {shard['bytes']}"))


def _codec_of(identity: dict[str, Any]) -> Codec:
    return codec_for(identity["codec"], identity["top_k"], identity["vocab_size"])


def _schema(codec: Codec) -> pa.Schema:
    keys = [("block_id", pa.int64()), ("tokens_hash", pa.string()), ("num_rows", pa.int32())]
    return pa.schema([*keys, *((plane, pa.large_binary()) for plane in codec.planes)])


def _shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _open(path: Path) -> pq.ParquetFile:
    with _damage(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def _blocks_of(file: pq.ParquetFile, path: Path, identity: dict[str, Any]) -> list[int]:
    """The blocks that a shard says it holds; raises `MismatchError` when it says that it was made from other things."""
    with _damage(path):
        metadata = json.loads(file.schema_arrow.metadata[b"sparsekd"])
        _require_format(metadata.get("format", metadata.get("codec")), path)
        _require_identity(dict(metadata["identity"]), identity, path)
        return list(metadata["block_ids"])


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Makes whatever a damaged file leads to one `DataError` that names it."""
    try:
        yield
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(_damaged(path, error)) from error


def _damaged(path: Path, error: object) -> str:
    reason = " ".join(str(error).split())  # pyarrow's take several lines
    return f"{path} is damaged: {reason or type(error).__name__}; {_WAY_OUT}"


def _require_format(found: object, path: Path) -> None:
    if found != FORMAT:
        raise MismatchError(f"{path} has the cache format {found}, this version reads {FORMAT}: use --fresh")


def _require_identity(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise MismatchError(
                f"{path} was made with {key} = {found.get(key)}, now asked for {wanted.get(key)}; "
                "use --fresh or another --out"
            )


def _check(target: Targets | Samples, vocab_size: int, what: str) -> None:
    if isinstance(target, Targets):
        total = target.log_probs.exp().sum(-1) + target.log_tail.exp() + 0 * target.log_tail_half
    else:
        total = target.log_weights.exp().sum(-1)
    if not bool(torch.isfinite(total).all()):
        raise DataError(f"{what} are not finite: the teacher's weights or its number format are at fault")
    if float((total - 1).abs().max()) > 1e-3:
        raise DataError(f"{what} do not sum to one (worst {float((total - 1).abs().max()):.1e} off)")
    if int(target.ids.min()) < 0 or int(target.ids.max()) >= vocab_size:
        raise DataError(f"{what} name a token outside the vocabulary of {vocab_size}")
