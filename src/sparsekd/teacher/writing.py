"""Writing a cache, shard by shard; process i of n makes every nth shard, and shards do not depend on n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparsekd import files
from sparsekd.corpus import ALL, Share
from sparsekd.errors import DataError
from sparsekd.teacher.cache import tokens_hash
from sparsekd.teacher.codecs import Samples, Targets
from sparsekd.teacher.merging import finish, manifest_of, owns_file
from sparsekd.teacher.shards import (
    Identity,
    Shard,
    blocks_of,
    codec_of,
    damage,
    open_shard,
    schema_of,
    shard_name,
    write_manifest,
)


class Writer:
    """Writes one share of a cache shard by shard; shards that are there already, whole and the same, are kept.

    Made by `Writer.open`, which refuses a second process on the same share.
    """

    def __init__(self, folder: Path, identity: Identity, share: Share):
        self.folder, self.identity, self.share = folder, identity, share
        self._codec = codec_of(identity)
        self._shards: dict[int, Shard] = {}

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: Identity, share: Share = ALL) -> Iterator[Writer]:
        """Takes the share; raises `UsageError` naming the process that has it already."""
        folder.mkdir(parents=True, exist_ok=True)
        what = f"part {share} of the cache {folder}"
        with files.lock(folder / f"writer-{share.number}-of-{share.count}.lock", what):
            files.remove_temporaries(folder, lambda name: owns_file(share, name))
            yield cls(folder, identity, share)

    def has(self, number: int, block_ids: Sequence[int]) -> bool:
        """Whether shard `number` is there, of these blocks: with another number of blocks to a shard it is made again.
        Reads all of it: raises `DataError` when it is damaged and `MismatchError` when it was made from something
        else."""
        path = self.folder / shard_name(number)
        if not path.exists():
            return False
        with open_shard(path) as file:
            if blocks_of(file, path, self.identity) != list(block_ids):
                return False
            with damage(path):
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
        for block_id, tokens, found in zip(block_ids, blocks, targets, strict=True):
            target = type(found)(*(column.cpu() for column in found))
            _check(target, self._codec.vocab_size, f"teacher distributions of block {block_id}")
            keys = {"block_id": block_id, "tokens_hash": tokens_hash(tokens), "num_rows": len(target.ids)}
            rows.append(keys | self._codec.encode(target))
        path = self.folder / shard_name(number)
        with files.atomic_path(path) as temporary:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=schema_of(self._codec, self.identity, block_ids)),
                temporary,
                row_group_size=1,
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=False,
                write_statistics=False,
            )
        self._list(number, block_ids)

    def _list(self, number: int, block_ids: Sequence[int]) -> None:
        path = self.folder / shard_name(number)
        self._shards[number] = Shard(path.name, path.stat().st_size, files.file_sha256(path), list(block_ids))

    def finish(self) -> None:
        """Writes the share's manifest. When the share is all of the cache, it is whole from here on."""
        shards = [shard for _, shard in sorted(self._shards.items())]
        if self.share.count == 1:
            finish(self.folder, self.identity, shards)
        else:
            write_manifest(self.folder / manifest_of(self.share), self.identity, shards)


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
