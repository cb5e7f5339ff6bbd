"""The command line in two processes of a real launcher, against one process: whole models, and split ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import split_models
from safetensors.torch import load_file

from sparsekd.distillation.worker import require_splittable
from sparsekd.errors import UsageError
from sparsekd.models import splitting
from sparsekd.recipe import Distill


def launched(*arguments: object, count: int) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "sparsekd", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_two_processes_make_what_one_makes(tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    options = ("--set", "cache.blocks_per_shard=2")
    together = launched("run", tiny_recipe, "--out", tmp_path / "two", *options, count=2)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("report:") == 1 and together.stderr.count("round-01/distilled ...") == 1
    alone = launched("run", tiny_recipe, "--out", tmp_path / "one", *options, count=1)
    assert alone.returncode == 0, alone.stderr
    one, two = (tmp_path / name / "round-01" for name in ("one", "two"))
    shards = [read(folder / "cache/manifest.json")["shards"] for folder in (one, two)]
    assert shards[0] == shards[1] and len(shards[0]) > 2  # with their sha256
    assert not list((two / "cache").glob("manifest-*"))
    for stage, tolerance in (("compressed", 1e-5), ("distilled", 1e-3)):
        expected, found = (load_file(folder / stage / "model/model.safetensors") for folder in (one, two))
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=tolerance, atol=tolerance)
    expected, found = (read(folder / "eval/stage.json")["models"]["distilled"]["held"] for folder in (one, two))
    assert abs(found["perplexity"] / expected["perplexity"] - 1) < 1e-3
    again = launched("run", tiny_recipe, "--out", tmp_path / "two", *options, count=1)
    assert again.returncode == 0 and again.stderr.count("up to date") == 8  # any number of processes may go on
    split_models(monkeypatch)
    split = launched("run", tiny_recipe, "--out", tmp_path / "split", *options, count=2)
    assert split.returncode == 0, split.stderr
    require_alike(tmp_path / "one", tmp_path / "split")


def require_alike(one: Path, split: Path) -> None:
    """FSDP2: of teacher and student each of two processes had half, in every stage but compress."""
    weights = "round-01/distilled/model/model.safetensors"
    expected, found = (load_file(folder / weights) for folder in (one, split))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)
    said, also = (read(folder / "dense/continuations/stage.json")["continuations"] for folder in (one, split))
    assert said == also
    measured, too = (read(folder / "round-01/eval/stage.json")["models"] for folder in (one, split))
    for name, texts in measured.items():
        for text, figures in texts.items():
            assert too[name][text]["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-5)


def test_an_experiment_in_two_processes(tiny_recipe: Path, tmp_path: Path) -> None:
    options = ("--set", "rounds=[0.4]", "--seeds", "1", "--rates", "1e-4,1e-3", "--json")
    together = launched("reproduce", "III", tiny_recipe, "--out", tmp_path / "two", *options, count=2)
    assert together.returncode == 0, together.stderr
    found = json.loads(together.stdout)
    assert found == read(tmp_path / "two/reproduce-III.json") and list(found["arms"]) == ["Dense+KD", "round 40%"]


def test_what_fsdp_cannot_split_is_refused(tiny_recipe: Path, tmp_path: Path, sparsekd: Any, monkeypatch: Any) -> None:
    split_models(monkeypatch)
    refused = "distill.train is lora, which FSDP cannot split"
    outcome = launched("run", tiny_recipe, "--out", tmp_path / "two", "--set", "distill.train=lora", count=2)
    said = outcome.stderr
    assert outcome.returncode != 0 and said.count("sparsekd: ") == said.count(f"sparsekd: {refused}") == 1
    with pytest.raises(UsageError, match="teacher is online, which FSDP cannot split"):
        require_splittable(Distill(teacher="online"))
    monkeypatch.setattr(splitting, "rank_and_count", lambda: (0, 2))
    monkeypatch.setenv("FSDP_VERSION", "1")
    found = sparsekd("run", tiny_recipe, "--out", tmp_path / "one")
    assert found.code != 0 and "sparsekd: FSDP version 1 is not supported" in found.err
