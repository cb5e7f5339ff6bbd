"""`sparsekd run`: plans without touching anything, and what stops it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import snapshot
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from sparsekd import errors, models
from sparsekd.recipe import PRESETS

QWEN = Qwen3Config(  # Qwen/Qwen3-0.6B
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


PHI = Phi3Config(  # microsoft/Phi-4-mini-instruct
    vocab_size=200064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=24,
    num_key_value_heads=8,
    partial_rotary_factor=0.75,
    pad_token_id=199999,
    tie_word_embeddings=True,
)


def config_folder(config: PreTrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def test_dry_run_plans_and_creates_nothing(sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    outcome = sparsekd("run", tiny_recipe, "--dry-run", "--json", "--reduction", "0.4")
    assert snapshot(tmp_path) == before
    assert outcome.code == 0
    structure = outcome.json["compression"]
    assert structure["model_parameters_before"] == models.num_parameters(models.skeleton(str(tmp_path / "llama")))
    assert structure["model_parameters_after"] < structure["model_parameters_before"]
    assert structure["mlp_reduction"] >= 0.4
    removed = structure["mlp_parameters_before"] - structure["mlp_parameters_after"]
    assert structure["model_parameters_before"] - structure["model_parameters_after"] == removed
    assert outcome.json["recipe"]["compress"]["reduction"] == 0.4
    assert outcome.json["cache_tokens"] == (12 + 2) * 32
    assert outcome.json["cache"]["q16"] == {"bytes_per_token": 8 * (2 + 2) + 4, "bytes": (12 + 2) * 32 * 36}
    assert outcome.json["cache"]["q8"]["bytes_per_token"] == 101  # not the recipe's: at its usual top_k of 32
    assert set(outcome.json["seconds"]) == {"cache", "compress", "distill", "evaluate"}
    assert all(seconds > 0 for seconds in outcome.json["seconds"].values())
    printed = sparsekd("run", tiny_recipe, "--dry-run")
    assert printed.code == 0
    assert "model.layers.1.mlp.down_proj" in printed.out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "matrices", "parameters", "mlp"),
    [
        (QWEN, 28 * 3, 596_049_920, 28 * 3 * 1024 * 3072),
        (PHI, 32 * 2, 3_836_021_760, 32 * 3 * 3072 * 8192),
    ],
    ids=["qwen3-0.6b", "phi-4-mini"],
)
def test_dry_run_of_the_papers_models(
    config: PreTrainedConfig, matrices: int, parameters: int, mlp: int, sparsekd: Any, tmp_path: Path
) -> None:
    folder = config_folder(config, tmp_path / "model")
    outcome = sparsekd("run", "paper", "--set", f"model.name={folder}", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    structure = outcome.json["compression"]
    assert len(structure["matrices"]) == matrices
    assert structure["model_parameters_before"] == parameters
    assert structure["mlp_parameters_before"] == mlp
    assert 0.15 <= structure["mlp_reduction"] < 0.152
    assert outcome.json["cache"]["q16"]["bytes_per_token"] == 32 * (3 + 2) + 4  # ids need 24 bits
    blocks = PRESETS["paper"]["corpus"]["num_blocks"] + PRESETS["paper"]["corpus"]["num_validation_blocks"]
    assert outcome.json["cache"]["q16"]["bytes"] == blocks * 512 * 164
    assert outcome.json["peak_memory_bytes"] > 4 * parameters
    printed = sparsekd("run", folder, "--dry-run").out
    assert printed.count("down_proj") == config.num_hidden_layers
    assert "self_attn" not in printed
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("config", "width", "gigabytes"), [(QWEN, 1984, (10, 18)), (PHI, 5312, (60, 90))], ids=["qwen3-0.6b", "phi-4-mini"]
)
def test_dry_run_of_neurons(
    config: PreTrainedConfig, width: int, gigabytes: Any, sparsekd: Any, tmp_path: Path
) -> None:
    """Training decides the memory; with far more text, the hidden states of all of it, of two models."""
    folder = config_folder(config, tmp_path / "model")
    flags = ["--dry-run", "--json", "--reduction", "0.35", "--set", "compress.method=neurons"]

    def planned(num_blocks: int, num_tokens: int) -> Any:
        text = ("--set", f"corpus.num_blocks={num_blocks}", "--set", f"compress.num_tokens={num_tokens}")
        return sparsekd("run", folder, *flags, *text).json

    usual = planned(300, 65_536)
    assert {line["neurons"] for line in usual["compression"]["matrices"]} == {width}
    assert gigabytes[0] < usual["peak_memory_bytes"] / 1e9 < gigabytes[1]
    a_pass = usual["seconds"]["cache"] / usual["cache_tokens"] * 65_536
    assert 8 < usual["seconds"]["compress"] / a_pass < 10  # eight passes, and the solver
    large = planned(100_000, 2**24)
    assert large["peak_memory_bytes"] == pytest.approx(2 * 2**24 * 4 * config.hidden_size, rel=0.1)
    assert planned(300, 2**24)["peak_memory_bytes"] == usual["peak_memory_bytes"]  # the corpus has no more


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
def test_dry_run_of_neurons_in_a_wide_mlp(config: Any, sparsekd: Any, tmp_path: Path) -> None:
    """Second moments of one layer's neurons, however many there are and whether or not gate and up are one matrix."""
    sizes = {"hidden_size": 256, "intermediate_size": 32_768, "num_attention_heads": 4, "pad_token_id": 0}
    folder = config_folder(config(vocab_size=512, num_hidden_layers=2, **sizes), tmp_path / "model")
    planned = sparsekd("run", folder, "--dry-run", "--json", "--set", "compress.method=neurons").json
    assert planned["peak_memory_bytes"] == pytest.approx(6 * 8 * 32_768**2, rel=0.05)


def test_dry_run_of_a_corpus_of_a_million_million_tokens(sparsekd: Any, tiny_recipe: Path) -> None:
    large = ("--set", "corpus.num_blocks=2e9", "--set", "corpus.seq_len=500", "--set", "cache.top_k=32", "--dry-run")
    printed = sparsekd("run", tiny_recipe, *large, "--set", "cache.codec=q8").out
    assert "1,000,000,001,000 tokens" in printed
    assert "132 bytes a token     132 TB" in printed
    assert "101 bytes a token     101 TB  <- this recipe" in printed
    assert "48 bytes a token      48 TB" in printed
    assert " days" in printed


def test_nothing_to_resume_creates_nothing(refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    refused("run", tiny_recipe, "--resume", "--out", tmp_path / "out", error=errors.UsageError)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_stops_before_the_first_shard(
    refused: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    line = refused("run", tiny_recipe, "--out", tmp_path / "out", error=errors.ResourceError)
    assert "free some" in line
    assert not list((tmp_path / "out").rglob("part-*"))


@pytest.mark.parametrize("options", [("--dry-run",), ()])
def test_a_compressed_model_is_not_cut_to_more_than_it_has(
    options: tuple[str, ...], refused: Any, small_model: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    values = yaml.safe_load(tiny_recipe.read_text())
    values["model"]["name"] = str(small_model[0])
    tiny_recipe.write_text(yaml.safe_dump(values))
    line = refused("run", tiny_recipe, "--out", tmp_path / "out", *options, error=errors.UsageError)
    assert "removed already" in line


def test_the_quality_gate(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    """A student that learns words gets worse at digits: the exit code says so, after the report is written."""
    (tmp_path / "digits.txt").write_text(" ".join(str(7919 * number) for number in range(200)))
    values = yaml.safe_load(tiny_recipe.read_text())
    values["distill"] |= {"alpha": 0, "learning_rate": 0.01}
    values["evaluate"]["texts"] = {"digits": {"path": "digits.txt"}}
    tiny_recipe.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    outcome = sparsekd("run", tiny_recipe, "--out", out, "--json")
    assert outcome.code == errors.QualityError.exit_code == 5
    line = outcome.err.splitlines()[-1]
    assert line == "sparsekd: distillation made the model worse on digits: lower distill.learning_rate"
    assert outcome.json == json.loads((out / "report.json").read_text())
    measured = outcome.json["evaluation"]["models"]
    assert measured["distilled"]["digits"]["perplexity"] > measured["compressed"]["digits"]["perplexity"]
    printed = sparsekd("run", tiny_recipe, "--out", out)  # all is up to date
    assert printed.code == 5 and "open it with sparsekd.load" in printed.out
