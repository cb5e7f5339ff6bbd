"""`sparsekd cache`: one cache by several processes."""

from pathlib import Path
from typing import Any

import pytest

from sparsekd import errors


def test_a_cache_by_two_processes(sparsekd: Any, refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe, out = (tiny_recipe, "--set", "cache.blocks_per_shard=3"), ("--out", tmp_path / "run")
    line = refused("cache", *recipe, "--shard", "1/2", *out, error=errors.UsageError)
    assert "has no finished corpus: run sparsekd corpus" in line
    assert sparsekd("corpus", *recipe, *out).code == 0
    assert sparsekd("cache", *recipe, "--shard", "2/2", *out).code == 0
    line = refused("cache", *recipe, "--merge", *out, error=errors.DataError)
    assert "shard 1/2 is not finished" in line
    assert sparsekd("cache", *recipe, "--shard", "1/2", *out).code == 0
    merged = sparsekd("cache", *recipe, "--merge", *out, "--json").json["cache"]
    alone = sparsekd("cache", *recipe, "--json", "--out", tmp_path / "alone").json["cache"]
    assert {key: merged[key] for key in ("blocks", "bytes", "identity")} == {
        key: alone[key] for key in ("blocks", "bytes", "identity")
    }
    folders = [tmp_path / name / "round-01/cache" for name in ("run", "alone")]
    for path in (*folders[1].glob("part-*"), folders[1] / "manifest.json"):
        assert (folders[0] / path.name).read_bytes() == path.read_bytes()
    assert sparsekd("distill", *recipe, *out).code == 0


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_shard_that_is_none(shard: str, refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    line = refused("cache", tiny_recipe, f"--shard={shard}", "--out", tmp_path / "o", error=errors.UsageError)
    assert "expected I/N with I from 1 to N" in line
