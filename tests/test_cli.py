"""The command line: quick to start, plans without touching anything, answers in JSON, one line on an error."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import Phi3Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from sparsekd import cli, compression, errors, files, models, records
from sparsekd.recipe.presets import PAPER

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


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def sparsekd(capsys: Any, monkeypatch: Any) -> Callable[..., Outcome]:
    """Runs the command in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sparsekd", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(sparsekd: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail: its last line on stderr is the only message, and nothing old is touched."""

    def run(*arguments: object, error: type[errors.SparseKDError]) -> str:
        before = snapshot(tmp_path)
        outcome = sparsekd(*arguments)
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before
        assert outcome.code == error.exit_code, outcome
        assert outcome.out == ""
        lines = outcome.err.splitlines()
        assert [line for line in lines if line.startswith("sparsekd: ")] == lines[-1:]
        assert "Traceback" not in outcome.err
        return lines[-1]

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def config_folder(config: PreTrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


@pytest.fixture
def small_model(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Any:
    model = compression.compress(make_model("llama"), reduction=0.3, method="svd")
    models.save(model, tokenizer, tmp_path / "small")
    return tmp_path / "small", model


# ---- start


def test_parsing_does_not_import_torch() -> None:
    code = "import sparsekd.cli, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_comes_within_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "sparsekd", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    for verb in ("run", "corpus", "cache", "compress", "distill", "eval", "report", "inspect", "doctor"):
        assert verb in done.stdout
    assert min(seconds) < 1, seconds


def test_an_unknown_option_is_a_usage_error(sparsekd: Any, tiny_recipe: Path) -> None:
    outcome = sparsekd("run", tiny_recipe, "--no-such-option")
    assert outcome.code == errors.UsageError.exit_code
    assert "--no-such-option" in outcome.err
    assert "Traceback" not in outcome.err


# ---- dry run


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


def test_dry_run_tells_what_the_run_then_does(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    planned = sparsekd("run", tiny_recipe, "--dry-run", "--json", "--reduction", "0.3").json
    made = sparsekd("compress", tiny_recipe, "--json", "--reduction", "0.3", "--out", tmp_path / "run").json
    for name in ("model_parameters_before", "model_parameters_after", "mlp_reduction"):
        assert made["compress"][name] == planned["compression"][name]
    assert made["cache"]["bytes"] < 2 * planned["cache"]["q16"]["bytes"] + 20_000  # zstd and the tables' own bytes
    loaded, _ = models.load(str(tmp_path / "run/round-01/compressed/model"))
    assert models.num_parameters(loaded) == planned["compression"]["model_parameters_after"]


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
    blocks = PAPER["corpus"]["num_blocks"] + PAPER["corpus"]["num_validation_blocks"]
    assert outcome.json["cache"]["q16"]["bytes"] == blocks * 512 * 164
    assert outcome.json["peak_memory_bytes"] > 4 * parameters
    printed = sparsekd("run", folder, "--dry-run").out
    assert printed.count("down_proj") == config.num_hidden_layers
    assert "self_attn" not in printed
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_dry_run_of_an_experiment(sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsekd.run.dry_run.measured_flops", lambda placement: 1e9)  # the same speed each time
    before = snapshot(tmp_path)

    def seconds(experiment: str, seeds: str, rates: str) -> dict[str, float]:
        dry = ("--dry-run", "--json", "--set", "rounds=[0.3,0.5]", "--out", tmp_path / "run")
        outcome = sparsekd("reproduce", experiment, tiny_recipe, "--seeds", seeds, "--rates", rates, *dry)
        assert outcome.code == 0, outcome.err
        assert outcome.json["compression"]["mlp_reduction"] >= 0.5
        assert outcome.json["arms"][:4] == ["Dense+KD", "Dense+KD equal tokens", "round 30%", "round 50%"]
        return outcome.json["seconds"]

    one, two, searched = seconds("III", "1", "1e-3"), seconds("III", "1,2", "1e-3"), seconds("III", "1", "1e-3,1e-4")
    assert two["cache"] == one["cache"]  # the teacher is asked once
    assert all(two[stage] == pytest.approx(2 * one[stage]) for stage in ("compress", "distill", "evaluate"))
    # three arms of 12 blocks forward and back and one of 24, each with 2 validated three times
    block = one["distill"] / (3 * (3 * 12 + 24) + 4 * 2 * 3)
    assert searched["distill"] - one["distill"] == pytest.approx(4 * 2 * (3 * 12 / 4 + 2 * 2) * block)
    taught = seconds("IV", "1,2", "1e-3")  # a teacher more for each seed, and no pruned model more
    assert taught["cache"] == pytest.approx(3 * one["cache"]) and taught["compress"] == pytest.approx(two["compress"])
    printed = sparsekd("reproduce", "III", tiny_recipe, "--dry-run").out
    arms = "Dense+KD, Dense+KD equal tokens, round 15%, round 35%, round 51%, round 65%"
    assert f"arms          {arms}" in printed and "total" in printed
    wrong = sparsekd("reproduce", "VII", tiny_recipe, "--dry-run")
    assert wrong.code == 2 and "experiment VII: expected one of" in wrong.err
    assert snapshot(tmp_path) == before


def test_dry_run_of_a_corpus_of_a_million_million_tokens(sparsekd: Any, tiny_recipe: Path) -> None:
    large = ("--set", "corpus.num_blocks=2e9", "--set", "corpus.seq_len=500", "--set", "cache.top_k=32", "--dry-run")
    printed = sparsekd("run", tiny_recipe, *large, "--set", "cache.codec=q8").out
    assert "1,000,000,001,000 tokens" in printed
    assert "132 bytes a token     132 TB" in printed
    assert "101 bytes a token     101 TB  <- this recipe" in printed
    assert "48 bytes a token      48 TB" in printed
    assert " days" in printed


# ---- the cache by several processes, and what is in it


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


@pytest.mark.parametrize("codec", ["q16", "q8", "sampled"])
def test_verify_of_a_whole_cache(codec: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    settings = [f"cache.codec={codec}"]
    if codec == "sampled":
        settings += ["distill.loss=sampled", "distill.temperature=1"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    made = sparsekd("cache", tiny_recipe, *arguments, "--out", tmp_path / "run")
    assert made.code == 0, made.err
    of_run = sparsekd("inspect", "--verify", tmp_path / "run", "--json")
    facts = of_run.json
    assert of_run.code == 0
    assert facts == sparsekd("inspect", "--verify", tmp_path / "run/round-01/cache", "--json").json
    assert facts["coverage"] == 1
    assert facts["missing blocks"] == facts["duplicated blocks"] == facts["blocks of one token only"] == 0
    assert facts["damaged shards"] == {}
    if codec == "sampled":
        assert "tail mass, mean" not in facts
    else:
        assert 0.5 < facts["tail mass, mean"] < 1  # a random model is almost uniform over 400 tokens, 8 are kept
        assert facts["tail mass, quantiles"]["5%"] <= facts["tail mass, quantiles"]["99%"]
        assert 0 < facts["expected KL error of the codec, nats"] < 5e-5
    assert "expected KL" in sparsekd("inspect", "--verify", tmp_path / "run").out or codec == "sampled"


def test_verify_names_what_is_damaged_and_a_removed_shard_is_made_again(
    sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe, out = (tiny_recipe, "--set", "cache.blocks_per_shard=3"), ("--out", tmp_path / "run")
    assert sparsekd("cache", *recipe, *out).code == 0
    folder = tmp_path / "run/round-01/cache"
    before = snapshot(folder)
    content = bytearray((folder / "part-00001.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (folder / "part-00001.parquet").write_bytes(content)
    (folder / "part-00003.parquet").unlink()
    outcome = sparsekd("inspect", "--verify", folder, "--json")
    assert outcome.code == errors.DataError.exit_code
    assert list(outcome.json["damaged shards"]) == ["part-00001.parquet", "part-00003.parquet"]
    assert outcome.json["missing blocks"] == 6
    assert "2 damaged shards, 6 missing blocks" in outcome.err.splitlines()[-1]
    assert sparsekd("distill", *recipe, *out).code == errors.DataError.exit_code
    (folder / "part-00001.parquet").unlink()
    assert sparsekd("cache", *recipe, *out).code == 0
    after = snapshot(folder)
    for path in (*folder.glob("part-*"), folder / "manifest.json"):
        assert after[str(path)] == before[str(path)]
    assert sparsekd("inspect", "--verify", folder).code == 0


def test_verify_counts_blocks_that_teach_nothing(
    sparsekd: Any, tiny_recipe: Path, tmp_path: Path, text_file: Path
) -> None:
    """A corpus of empty placeholders, as the paper once had."""
    text_file.write_text("\n\n".join(["aaaa " * 40] * 60))
    assert (
        sparsekd(
            "cache", tiny_recipe, "--set", "corpus.sources.learn.holdout=0.1", *NO_TEXTS, "--out", tmp_path / "run"
        ).code
        == 0
    )
    facts = sparsekd("inspect", "--verify", tmp_path / "run", "--json").json
    assert facts["duplicated blocks"] > facts["blocks"] / 2


NO_TEXTS = ("--set", "evaluate.texts={other: {path: other.txt}}", "--set", "evaluate.texts.held=null")


# ---- questions


def test_doctor(sparsekd: Any) -> None:
    facts = sparsekd("doctor", "--json").json
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["sparsekd"] != "not installed"
    assert facts["device"].startswith(("cpu, float32", "cuda, ", "mps, "))
    assert facts["free disk here"].endswith(" GB")
    assert facts["package gguf"] in ("installed", "missing (for: gguf)")
    assert "free disk here" in sparsekd("doctor").out


def test_inspect_of_a_run_and_its_parts(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = sparsekd("compress", tiny_recipe, "--json", "--reduction", "0.3", "--out", out).json
    before = snapshot(tmp_path)
    run = sparsekd("inspect", out, "--json").json
    stages = {"corpus": "finished", "cache": "finished", "compress": "finished"}
    stages |= {"distill": "not started", "evaluate": "not started"}
    assert run == {"kind": "run", **stages, "report": "not written"}
    corpus = sparsekd("inspect", out / "corpus", "--json").json
    assert corpus["kind"] == "corpus"
    assert corpus["training blocks"] == 12
    assert corpus["tokens an epoch"] == 12 * 32
    assert corpus["fingerprint"] == made["corpus"]["fingerprint"]
    cache = sparsekd("inspect", out / "round-01/cache", "--json").json
    assert cache["kind"] == "cache"
    assert cache["blocks"] == made["cache"]["blocks"]
    assert cache["bytes"] == sum(path.stat().st_size for path in (out / "round-01/cache").glob("part-*.parquet"))
    assert cache["top_k"] == 8
    model = sparsekd("inspect", out / "round-01/compressed/model", "--json").json
    assert model["kind"] == "model"
    assert model["class"] == "SparseKDLlamaForCausalLM"
    assert model["parameters"] == made["compress"]["model_parameters_after"]
    assert model["compressed"] == "whitened, 30% of the MLP parameters removed"
    assert model["format"] == "pivot"
    assert snapshot(tmp_path) == before
    (out / "round-01/cache/stage.json").unlink()
    assert "stage.json is missing: run the same" in sparsekd("inspect", out, "--json").json["cache"]


def test_inspect_of_a_dense_model(sparsekd: Any, make_model: Any, model_folder: Any) -> None:
    facts = sparsekd("inspect", model_folder("phi3"), "--json").json
    assert facts == {
        "kind": "model",
        "class": "Phi3ForCausalLM",
        "parameters": models.num_parameters(make_model("phi3")),
        "MLPs": 2,
        "MLP parameters": 2 * 3 * 32 * 64,
        "compressed": "no",
    }


def test_eval_of_a_dense_and_a_compressed_model(
    sparsekd: Any, small_model: Any, model_folder: Any, text_file: Path
) -> None:
    options = ("--text", text_file, "--context", "64", "--stride", "32", "--max-tokens", "300")
    results = {}
    for folder in (small_model[0], model_folder("llama")):
        outcome = sparsekd("eval", folder, *options, "--json")
        assert outcome.code == 0, outcome.err
        assert list(outcome.json["models"]) == [str(folder)]
        results[folder.name] = outcome.json["models"][str(folder)][text_file.name]["perplexity"]
        assert results[folder.name] > 1
        assert f"{results[folder.name]:.2f}" in sparsekd("eval", folder, *options).out.replace(",", "")
    assert results["small"] != results["llama"]


def test_eval_of_two_texts(sparsekd: Any, model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    """Two texts with the same file name are two texts."""
    other = tmp_path / "elsewhere" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text()[::-1])
    options = ("--context", "64", "--stride", "64", "--max-tokens", "200", "--json")
    outcome = sparsekd("eval", model_folder("llama"), "--text", text_file, "--text", other, *options)
    assert outcome.code == 0, outcome.err
    (found,) = outcome.json["models"].values()
    assert list(found) == [str(text_file), str(other)]
    assert len({result["perplexity"] for result in found.values()}) == 2


def test_eval_against_a_teacher_and_on_a_task(
    sparsekd: Any, small_model: Any, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    rows = "\n".join(json.dumps({"goal": f"To {i}", "sol1": "river", "sol2": "a garden", "label": 0}) for i in range(5))
    (tmp_path / "tasks" / "piqa_val.jsonl").write_text(rows)
    small, dense = str(small_model[0]), str(model_folder("llama"))
    options = ["--text", text_file, "--teacher", dense, "--context", "64", "--stride", "32", "--max-tokens", "300"]
    options += ["--tasks", "local_piqa", "--root", tmp_path, "--limit", "4"]
    found = sparsekd("eval", small, *options, "--json").json
    assert found["models"][small][text_file.name]["agreement"]["kl"]["value"] > 0
    assert found["models"][dense][text_file.name]["agreement"] is None
    assert found["tasks"][small]["local_piqa"]["num_rows"] == 4
    printed = sparsekd("eval", small, *options).out
    for title in ("Perplexity", "Calibration", "Agreement with the teacher", "Tasks"):
        assert title in printed
    only_task = sparsekd("eval", small, "--tasks", "local_piqa", "--root", tmp_path)
    assert only_task.code == 0
    assert "acc_norm" in only_task.out and "Perplexity" not in only_task.out


def test_eval_says_where_and_how_model_and_teacher_run(
    sparsekd: Any, refused: Any, model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model = model_folder("llama")
    teacher = shutil.copytree(model, tmp_path / "teacher")
    given: list[dict[str, Any]] = []
    original = models.load

    def load(name: str, **options: Any) -> Any:
        given.append(options)
        return original(name, **options)

    monkeypatch.setattr(models, "load", load)
    texts = ("--text", text_file, "--context", "64", "--stride", "64", "--max-tokens", "200")
    options = ("--teacher", teacher, "--device", "cpu", "--dtype", "bfloat16", "--trust-remote-code")
    outcome = sparsekd("eval", model, *texts, *options, "--json")
    assert outcome.code == 0, outcome.err
    for one in given:
        assert one["device"] == torch.device("cpu")
        assert one["dtype"] == torch.bfloat16
        assert one["trust_remote_code"]
    assert len(given) == 2
    plain = sparsekd("eval", model, *texts, "--json").json
    assert outcome.json["models"][str(model)] != plain["models"][str(model)]
    assert given[2]["trust_remote_code"] is False
    line = refused("eval", model, *texts, "--device", "gpu", error=errors.UsageError)
    assert "device 'gpu' cannot be used here" in line
    line = refused("eval", model, *texts, "--dtype", "int8", error=errors.UsageError)
    assert "expected auto, float32, bfloat16 or float16" in line


def test_eval_on_nothing_or_of_another_tokenizer_is_refused(
    refused: Any, model_folder: Any, make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    model = model_folder("llama")
    assert "nothing to evaluate on" in refused("eval", model, error=errors.UsageError)
    line = refused("eval", model, "--tasks", "local_piqa", "--teacher", model, error=errors.UsageError)
    assert "--teacher compares on texts" in line
    line = refused("eval", model, "--tasks", "local_piqa", "--root", tmp_path, error=errors.DataError)
    assert "piqa_val.jsonl: no such file" in line
    line = refused("eval", model, "--tasks", "local_pica", error=errors.UsageError)
    assert "known are local_arc_easy" in line
    other = tmp_path / "other"
    shutil.copytree(model, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    line = refused("eval", model, "--text", text_file, "--teacher", other, error=errors.DataError)
    assert "its tokenizer is not that of" in line


def test_eval_names_a_number_that_is_not_finite(sparsekd: Any, model_folder: Any, text_file: Path) -> None:
    """A perplexity is capped, but its standard error beside it overflows, and JSON has no word for that."""
    folder = model_folder("llama")
    model, _ = models.load(str(folder))
    model.get_input_embeddings().weight.data.mul_(1e3)
    model.model.norm.weight.data.mul_(1e7)
    model.save_pretrained(folder)
    options = ("--context", 32, "--stride", 16, "--max-tokens", 128, "--json")
    outcome = sparsekd("eval", folder, "--text", text_file, *options)
    assert outcome.code == errors.DataError.exit_code, outcome
    assert outcome.out == ""
    assert "llama.learn.txt.standard_error is not finite (inf)" in outcome.err.splitlines()[-1]


def test_the_memory_of_a_device_is_beside_the_host_s(
    sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sparsekd.run.stage.peak_device_memory_bytes", lambda device: 3_000_000_000)
    printed = sparsekd("run", tiny_recipe, "--out", out)
    assert printed.code == 0, printed.err
    assert re.search(r"^peak memory \d+\.\d GB host, 3\.0 GB device$", printed.out, re.M)
    assert "GB host, 3.0 GB device." in (out / "report.html").read_text()
    for path in out.rglob("stage.json"):  # as a run on a CPU, or one of an older version, has it
        summary = records.read(path)
        assert summary.pop("peak_device_memory_bytes") == 3_000_000_000
        records.write(path, summary)
    printed = sparsekd("report", out)
    assert re.search(r"^peak memory \d+\.\d GB$", printed.out, re.M)
    assert "GB device" not in (out / "report.html").read_text()


# ---- bad input, beside tests/e2e/test_bad_input.py


def test_the_message_is_the_last_line(refused: Any, tiny_recipe: Path, tmp_path: Path, text_file: Path) -> None:
    text_file.write_text("")
    line = refused("run", tiny_recipe, "--out", tmp_path / "out", error=errors.DataError)
    assert "no text in it" in line


def test_nothing_to_resume_creates_nothing(refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    refused("run", tiny_recipe, "--resume", "--out", tmp_path / "out", error=errors.UsageError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--fresh",), ("--resume",)])
@pytest.mark.parametrize("manifest", ['{"name": "an application"}', '{"format": 1}', "[]", "{", ""])
def test_a_folder_that_is_no_run_keeps_its_files(
    manifest: str, options: tuple[str, ...], refused: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Many programs call a file manifest.json; `--fresh` removes a run, and nothing else."""
    out = tmp_path / "out"
    (out / "corpus").mkdir(parents=True)
    (out / "corpus" / "thesis.txt").write_text("years of work")
    (out / "manifest.json").write_text(manifest)
    (out / "recipe.yaml").write_text("soup: {salt: 1}")
    (out / "report.html").write_text("mine")
    refused("corpus", tiny_recipe, "--out", out, *options, error=errors.UsageError)


@pytest.mark.parametrize(
    "left", [(), ("manifest.json.tmp-1",), ("manifest.json",), ("manifest.json", "recipe.yaml.tmp-1")]
)
def test_a_run_killed_in_its_first_moment_goes_on(
    left: tuple[str, ...], sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("run.lock", *left):
        (out / name).write_text('{"kind": "sparsekd run"}' if name == "manifest.json" else "")
    outcome = sparsekd("corpus", tiny_recipe, "--out", out)
    assert outcome.code == 0, outcome.err


def test_a_changed_corpus_file_leaves_the_run_as_it_was(
    sparsekd: Any, refused: Any, tiny_recipe: Path, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    assert sparsekd("corpus", tiny_recipe, "--out", out).code == 0
    text_file.write_text(text_file.read_text() + "\n\nOne more paragraph.")
    line = refused("run", tiny_recipe, "--out", out, error=errors.MismatchError)
    assert "holds another run: files.learn is" in line


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


def test_inspect_of_damaged_parts(sparsekd: Any, refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert sparsekd("cache", tiny_recipe, "--out", out).code == 0
    blocks = out / "corpus" / "blocks.parquet"
    blocks.write_bytes(blocks.read_bytes()[:-50])
    assert "damaged" in refused("inspect", out / "corpus", error=errors.DataError)
    cache = out / "round-01" / "cache"
    shard = next(cache.glob("part-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is damaged" in refused("inspect", cache, error=errors.DataError)
    (cache / "manifest.json").unlink()
    assert "not finished" in refused("inspect", cache, error=errors.DataError)
    (tmp_path / "llama" / "config.json").write_text("{")
    assert "damaged" in refused("inspect", tmp_path / "llama", error=errors.DataError)


def test_questions_about_what_is_not_there(refused: Any, model_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "random", tmp_path / "nowhere", tmp_path / "random" / "thesis.txt"):
        line = refused("inspect", path, "--json", error=errors.UsageError)
        assert f"{path}: expected a run, a model, a corpus or a cache" in line
    missing = tmp_path / "missing.txt"
    line = refused("eval", model_folder("llama"), "--text", missing, "--json", error=errors.DataError)
    assert f"{missing}: no such file" in line
    missing.write_text("")
    refused("eval", tmp_path / "llama", "--text", missing, "--json", error=errors.DataError)
    refused("report", tmp_path / "random", error=errors.DataError)


def test_a_recipe_beside_a_stale_lock_is_not_ours(refused: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.lock").write_text("process 1")
    (out / "recipe.yaml").write_text("mine")
    refused("corpus", tiny_recipe, "--out", out, error=errors.UsageError)


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_fresh_killed_at_any_removal_can_be_called_again(
    kept: int, sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The removals are counted, and the process 'dies' at one of them; the next call finishes, with nothing stale."""
    out = tmp_path / "out"
    assert sparsekd("distill", tiny_recipe, "--out", out).code == 0
    remove, seen = files.remove, []

    def dies(path: Path) -> None:
        seen.append(path)
        if len(seen) == kept:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "remove", dies)
        assert sparsekd("distill", tiny_recipe, "--out", out, "--fresh").code == 130
    assert sparsekd("distill", tiny_recipe, "--out", out).code == 0
    assert not list(out.glob("*.tmp-*"))


# ---- spectrum


@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_spectrum_prints_a_row_a_matrix_and_keeps_a_picture(
    method: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spectra"
    arguments = ["spectrum", str(tiny_recipe), "--set", f"compress.method={method}", "--reduction", "0.4"]
    outcome = sparsekd(*arguments, "--out", str(out))
    assert outcome.code == 0
    assert outcome.out.count("mlp.") == 6
    found = json.loads((out / "spectrum.json").read_text())
    assert found["reduction"] == 0.4
    for matrix in found["matrices"]:
        assert len(matrix["singular_values"]) == 32
        assert 1 <= matrix["effective_rank"] <= 32
        assert sum(matrix["energy"]) == pytest.approx(1)
        assert (matrix["predicted_kl"] is None) == (method == "svd")
        lost = sum(matrix["energy"][matrix["rank"] :])
        assert matrix["relative_error"] == pytest.approx(lost, abs=1e-9)
    assert (out / "spectrum.svg").read_text().startswith("<svg")
