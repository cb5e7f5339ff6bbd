"""A cache that several processes write: each share has a manifest of its own, and `merge_shares` unites them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from sparsekd import files
from sparsekd.corpus import Share
from sparsekd.errors import DataError, UsageError
from sparsekd.teacher.cache import Cache, require_blocks
from sparsekd.teacher.shards import (
    Identity,
    Shard,
    read_manifest,
    require_identity,
    require_sizes,
    shard_number,
    write_manifest,
)

_SHARE_MANIFEST = re.compile(r"manifest-(\d+)-of-(\d+)\.json")


def owns(share: Share, shard: int) -> bool:
    """Whether a shard is of a share: every `count`th one is."""
    return shard % share.count == share.number - 1


def owns_file(share: Share, name: str) -> bool:
    """Whether a file is: its shards, and its manifest."""
    shard = shard_number(name)
    return name == manifest_of(share) if shard is None else owns(share, shard)


def manifest_of(share: Share) -> str:
    """The name of a share's manifest; that of all of the cache is the cache's own."""
    return "manifest.json" if share.count == 1 else f"manifest-{share.number}-of-{share.count}.json"


def is_cached(folder: Path) -> bool:
    """Whether the manifest and every shard that it lists are there."""
    if not (folder / "manifest.json").exists():
        return False
    _, shards = read_manifest(folder / "manifest.json")
    return all((folder / shard.name).exists() for shard in shards)


def merge_shares(folder: Path, block_ids: Collection[int]) -> Cache:
    """Unites the manifests of all shares, after which the cache is whole, and opens it.

    Raises `DataError` naming the share that is not finished, or when the shares together lack some of `block_ids`;
    `MismatchError` when two shares were made from different things.
    """
    found = _share_manifests(folder)
    if not found:
        if (folder / "manifest.json").exists():  # merged already
            return Cache(folder)
        raise DataError(f"{folder} holds no finished shard: run sparsekd cache with --shard 1/N, 2/N ... N/N first")
    counts = sorted({share.count for share in found})
    if len(counts) > 1:
        raise UsageError(f"{folder} holds manifests of {counts[0]} and of {counts[1]} shards: remove those of one")
    shares = [Share(number + 1, counts[0]) for number in range(counts[0])]
    for share in shares:
        if share not in found:
            raise DataError(f"{folder}: shard {share} is not finished: run sparsekd cache with --shard {share}")
    identity, _ = read_manifest(found[shares[0]])
    shards: dict[int | None, Shard] = {}
    for share in shares:
        of_share, listed = read_manifest(found[share])
        require_identity(of_share, identity, found[share])
        require_sizes(folder, listed)
        shards |= {shard_number(shard.name): shard for shard in listed}
    require_blocks(folder, [i for shard in shards.values() for i in shard.block_ids], block_ids)
    finish(folder, identity, [shard for _, shard in sorted(shards.items())])
    return Cache(folder)


def _share_manifests(folder: Path) -> dict[Share, Path]:
    named = ((_SHARE_MANIFEST.fullmatch(path.name), path) for path in folder.iterdir())
    return {Share(int(name[1]), int(name[2])): path for name, path in named if name}


def forget_shares(folder: Path) -> None:
    """Removes manifests of shares; their shards stay, and whoever writes the cache next takes them over."""
    for path in _share_manifests(folder).values():
        files.remove(path)


def finish(folder: Path, identity: Identity, shards: Sequence[Shard]) -> None:
    """Makes a cache whole: its manifest is written, what else is there goes."""
    write_manifest(folder / "manifest.json", identity, shards)
    forget_shares(folder)
    listed = {shard.name for shard in shards}
    for path in folder.iterdir():
        if shard_number(path.name) is not None and path.name not in listed:  # of a call with smaller shards
            files.remove(path)
