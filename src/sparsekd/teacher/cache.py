"""The teacher cache: for every position of every block what the teacher believes comes next.

A cache is a folder of Parquet shards (`shards.py`) and a manifest that is written last. Readers ask by block id, never
by position in a file, so that any order pairs each block with its own teacher; a row also carries a hash of its block's
tokens and is refused when they differ. Row t of a block is the teacher's distribution of token t + 1, so a block of L
tokens has L - 1 rows. How a row's numbers are packed is in `codecs.py`; no model code here.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from sparsekd import files
from sparsekd.errors import DataError, MismatchError
from sparsekd.teacher.codecs import Codec, Samples, Targets
from sparsekd.teacher.shards import (
    Identity,
    blocks_of,
    codec_of,
    damage,
    damaged,
    open_shard,
    read_manifest,
    require_identity,
    require_sizes,
)

_OPEN_SHARDS = 64  # kept open at once; a large cache has more shards than a process may open files


class Row(NamedTuple):
    """What is stored for one block."""

    tokens_hash: str
    targets: Targets | Samples


def tokens_hash(tokens: np.ndarray) -> str:
    """What ties a row to the tokens that it was computed from."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").data, digest_size=8).hexdigest()


class Cache:
    """Reads a whole cache by block id. Raises `DataError` naming the file when it is damaged or incomplete.

    With an `identity`, `MismatchError` names the first field that differs. Without `strict`, a shard of the wrong
    size, or one that is missing, is noticed only when one of its blocks is read.
    """

    def __init__(self, folder: Path, identity: Identity | None = None, *, strict: bool = True):
        self.folder = folder
        self.identity, self.shards = read_manifest(folder / "manifest.json")
        if identity is not None:
            require_identity(self.identity, identity, folder)
        with damage(folder / "manifest.json"):
            self._codec = codec_of(self.identity)
        self._place = {i: (shard.name, row) for shard in self.shards for row, i in enumerate(shard.block_ids)}
        self._block_ids = {shard.name: shard.block_ids for shard in self.shards}
        if strict:
            require_sizes(folder, self.shards)
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
        return sum(shard.bytes for shard in self.shards)

    def require(self, block_ids: Iterable[int]) -> None:
        """Raises `DataError` unless all of `block_ids` are here."""
        require_blocks(self.folder, self._place.keys(), block_ids)

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
        with damage(self.folder / name):
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
            path = self.folder / shard.name
            try:
                require_sizes(self.folder, [shard])
            except DataError as error:
                found[shard.name] = str(error)
            else:
                if files.file_sha256(path) != shard.sha256:
                    found[shard.name] = damaged(path, "its content is not what was written")
        return found

    def _open_shard(self, name: str) -> pq.ParquetFile:
        file = open_shard(self.folder / name)
        if blocks_of(file, self.folder / name, self.identity) != self._block_ids[name]:
            raise MismatchError(
                f"{self.folder / name} holds other blocks than it should: swapped, or of another cache; use --fresh"
            )
        return file


def require_blocks(folder: Path, found: Iterable[int], wanted: Iterable[int]) -> None:
    """Raises `DataError` unless all that are `wanted` were found."""
    needed = set(wanted)
    missing = needed - set(found)
    if missing:
        raise DataError(
            f"the cache {folder} lacks {len(missing)} of the {len(needed)} blocks that are needed, the first is block "
            f"{min(missing)}: it was made for another corpus; make it again with --fresh"
        )
