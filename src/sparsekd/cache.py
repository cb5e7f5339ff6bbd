"""The teacher cache: for every position of every block the likeliest tokens, their probabilities and the tail mass.

A cache is a folder of Parquet shards (one row a block, row groups of one row, zstd, page checksums that are verified
on read) and a manifest that is written last. Readers ask by block id, never by position in a file, so that any order
pairs each block with its own teacher; a row also carries a hash of its block's tokens and is refused when they
differ. Row t of a block is the teacher's distribution of token t + 1, so a block of L tokens has L - 1 rows.

Codec `q16`: token ids as u16 (u32 for vocabularies above 65,536), log-probabilities at temperature 1 over the whole
vocabulary as fp16, and the log of the tail mass as fp16. Knows no model code.

Shape letters: B blocks, L positions, K kept tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd import files
from sparsekd.errors import DataError, MismatchError

CODEC = "q16-1"
ALIGNMENT = "row t predicts token t+1"


class Targets(NamedTuple):
    """Teacher distributions at temperature 1; `exp(log_probs)` and `exp(log_tail)` sum to one at each position."""

    ids: Int[Tensor, "*N K"]
    log_probs: Float[Tensor, "*N K"]  # descending
    log_tail: Float[Tensor, "*N"]


def tokens_hash(tokens: np.ndarray) -> str:
    """What ties a row to the tokens that it was computed from."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").data, digest_size=8).hexdigest()


class Writer:
    """Writes a cache shard by shard. Shards that are there already, whole and of the same identity, are kept."""

    def __init__(self, folder: Path, identity: dict[str, Any], vocab_size: int):
        self.folder, self.identity, self.vocab_size = folder, identity, vocab_size
        self._shards: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(folder)

    def has(self, number: int, block_ids: Sequence[int]) -> bool:
        """Whether shard `number` is whole already; raises `MismatchError` when it was made from something else."""
        path = self.folder / _shard_name(number)
        if not path.exists():
            return False
        metadata = _metadata(path)
        _require_identity(metadata["identity"], self.identity, path)
        if metadata["block_ids"] != list(block_ids):
            raise MismatchError(f"{path} holds other blocks than asked for; make the cache again with --fresh")
        self._list(path, block_ids)
        return True

    def add(
        self, number: int, block_ids: Sequence[int], blocks: Sequence[np.ndarray], targets: Sequence[Targets]
    ) -> None:
        """Writes shard `number`; raises `DataError` for a block whose probabilities are not a distribution."""
        ids_type = np.dtype("<u2") if self.vocab_size <= 65_536 else np.dtype("<u4")
        rows = []
        for block_id, tokens, target in zip(block_ids, blocks, targets, strict=True):
            _check(target, self.vocab_size, f"teacher distributions of block {block_id}")
            rows.append(
                {
                    "block_id": block_id,
                    "tokens_hash": tokens_hash(tokens),
                    "num_rows": len(target.ids),
                    "ids": target.ids.numpy().astype(ids_type).tobytes(),
                    "log_probs": target.log_probs.numpy().astype("<f2").tobytes(),
                    "log_tail": target.log_tail.numpy().astype("<f2").tobytes(),
                }
            )
        metadata = {"codec": CODEC, "identity": self.identity, "block_ids": list(block_ids)}
        schema = _SCHEMA.with_metadata({"sparsekd": json.dumps(metadata)})
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
        self._list(path, block_ids)

    def _list(self, path: Path, block_ids: Sequence[int]) -> None:
        self._shards.append({"name": path.name, "bytes": path.stat().st_size, "block_ids": list(block_ids)})

    def finish(self) -> None:
        """Writes the manifest: from here on the cache is whole."""
        manifest = {
            "codec": CODEC,
            "alignment": ALIGNMENT,
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "shards": self._shards,
        }
        files.write_json(self.folder / "manifest.json", manifest)


_SCHEMA = pa.schema(
    [
        ("block_id", pa.int64()),
        ("tokens_hash", pa.string()),
        ("num_rows", pa.int32()),
        ("ids", pa.large_binary()),
        ("log_probs", pa.large_binary()),
        ("log_tail", pa.large_binary()),
    ]
)


class Cache:
    """Reads a whole cache by block id. Raises `DataError` naming the file when it is damaged or incomplete."""

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None):
        self.folder = folder
        self.manifest = files.read_json(folder / "manifest.json")
        self._place: dict[int, tuple[str, int]] = {}
        try:
            found, vocab_size = self.manifest["identity"], self.manifest["vocab_size"]
            written = {"codec": self.manifest["codec"], "alignment": self.manifest["alignment"]}
            self.top_k = int(found["top_k"])
            self._ids_type = np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")
            sizes = {shard["name"]: shard["bytes"] for shard in self.manifest["shards"]}
            for shard in self.manifest["shards"]:
                self._place.update({i: (shard["name"], row) for row, i in enumerate(shard["block_ids"])})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(_damaged(folder / "manifest.json", error)) from error
        _require_identity(written, {"codec": CODEC, "alignment": ALIGNMENT}, folder)
        if identity is not None:
            _require_identity(found, identity, folder)
        for name, expected in sizes.items():
            path = folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                raise DataError(f"{path} is damaged: {size} bytes, expected {expected}; use --fresh")
        self._open: dict[str, pq.ParquetFile] = {}

    @property
    def block_ids(self) -> Iterable[int]:
        return self._place.keys()

    @property
    def vocab_size(self) -> int:
        """Tokens that the teacher knows."""
        return self.manifest["vocab_size"]

    @property
    def num_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.manifest["shards"])

    def read(self, block_id: int, tokens: np.ndarray) -> Targets:
        """The distributions of one block, with L - 1 rows; `tokens` are the block's own, to be sure of the pairing."""
        if block_id not in self._place:
            raise DataError(f"cache {self.folder} has no block {block_id}: it was made for another corpus")
        name, row = self._place[block_id]
        try:
            if name not in self._open:
                self._open[name] = pq.ParquetFile(self.folder / name, page_checksum_verification=True)
            values = self._open[name].read_row_group(row).to_pylist()[0]
            found = values["block_id"], values["tokens_hash"]
            shape = (values["num_rows"], self.top_k)
            ids = np.frombuffer(values["ids"], self._ids_type).reshape(shape).astype(np.int64)
            log_probs = np.frombuffer(values["log_probs"], "<f2").reshape(shape).astype(np.float32)
            log_tail = np.frombuffer(values["log_tail"], "<f2").astype(np.float32)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(_damaged(self.folder / name, error)) from error
        if found != (block_id, tokens_hash(tokens)):
            raise MismatchError(f"{self.folder / name}: block {block_id} was cached for other tokens; use --fresh")
        return Targets(torch.from_numpy(ids), torch.from_numpy(log_probs), torch.from_numpy(log_tail))


def bytes_per_token(top_k: int, vocab_size: int) -> int:
    """Bytes of a position before zstd."""
    return top_k * (2 + (2 if vocab_size <= 65_536 else 4)) + 2


def _shard_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _metadata(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(pq.read_schema(path).metadata[b"sparsekd"])
        return {key: found[key] for key in ("identity", "block_ids")}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())  # pyarrow's take several lines
    return f"{path} is damaged: {reason or type(error).__name__}; make the cache again with --fresh"


def _require_identity(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise MismatchError(
                f"{path} was made with {key} = {found.get(key)}, now asked for {wanted.get(key)}; "
                "use --fresh or another --out"
            )


def _check(target: Targets, vocab_size: int, what: str) -> None:
    total = target.log_probs.exp().sum(-1) + target.log_tail.exp()
    if not bool(torch.isfinite(total).all()):
        raise DataError(f"{what} are not finite: the teacher's weights or its number format are at fault")
    if float((total - 1).abs().max()) > 1e-3:
        raise DataError(f"{what} do not sum to one (worst {float((total - 1).abs().max()):.1e} off)")
    if int(target.ids.min()) < 0 or int(target.ids.max()) >= vocab_size:
        raise DataError(f"{what} name a token outside the vocabulary of {vocab_size}")
