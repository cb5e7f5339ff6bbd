"""Bad input: one clear line, an exit code that says the kind, and nothing that existed is touched."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, PreTrainedTokenizerFast


@pytest.fixture
def sparsekd(sparsekd: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The command, after which all that existed is as it was."""

    def run(*arguments: object) -> Any:
        before = snapshot(tmp_path)
        outcome = sparsekd(*arguments)
        after = snapshot(tmp_path)
        assert {path: after.get(path) for path in before} == before, "something that existed was changed"
        assert "Traceback" not in outcome.err
        return outcome

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


def changed(recipe: Path, **sections: Any) -> str:
    """A copy of the recipe with values of its sections replaced."""
    values = yaml.safe_load(recipe.read_text())
    for section, content in sections.items():
        values[section] = values.get(section, {}) | content
    path = recipe.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(values))
    return str(path)


def expect(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("sparsekd: ")]
    for word in words:
        assert word in message


def test_unknown_key_suggests_the_nearest(sparsekd: Any, tiny_recipe: Path) -> None:
    recipe = changed(tiny_recipe, distill={"learning_rte": 1e-4})
    expect(sparsekd("run", recipe), 2, "distill.learning_rte", "did you mean 'learning_rate'?")


@pytest.mark.parametrize("reduction", ["0", "-0.5", "0.96", "1.5", "nan"])
def test_reduction_out_of_range(reduction: str, sparsekd: Any, tiny_recipe: Path) -> None:
    expect(sparsekd("run", str(tiny_recipe), f"--reduction={reduction}"), 2, "compress.reduction", "(0, 0.95]")


def test_missing_corpus(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = changed(tiny_recipe, corpus={"sources": {"learn": {"path": "nowhere.txt", "holdout": 0.2}}})
    expect(sparsekd("run", recipe, "--out", str(tmp_path / "out")), 3, "nowhere.txt", "no such file")


@pytest.mark.parametrize(
    ("content", "words"), [("", "no text"), ("a few words\n\nand more\n\nof them", "not enough text")]
)
def test_empty_or_short_corpus(content: str, words: str, sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(content)
    short = {
        "corpus": {"sources": {"short": {"path": "short.txt"}}},
        "evaluate": {"texts": {"o": {"path": "other.txt"}}},
    }
    expect(sparsekd("run", changed(tiny_recipe, **short), "--out", str(tmp_path / "out")), 3, words)


def test_evaluation_text_in_a_training_source(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    """The passage is shown, nothing is made of it, and the way out that the message names works."""
    passage = (tmp_path / "other.txt").read_text().split("\n\n")[7]
    learn = tmp_path / "learn.txt"
    learn.write_text(f"{passage}\n\n{learn.read_text()}")
    outcome = sparsekd("run", str(tiny_recipe), "--out", str(tmp_path / "out"))
    assert outcome.code == 3
    first, shown = outcome.err.splitlines()[-2:]
    assert first.startswith("sparsekd: evaluation text found")
    assert "1 of 161 documents of corpus.sources.learn (evaluate.texts.other); corpus.overlap=drop" in first
    assert shown.startswith('  learn, learn.txt:0: "' + " ".join(passage.lower().split()[:15]))
    assert not (tmp_path / "out/corpus/stage.json").exists()
    drop = ("--set", "corpus.overlap=drop", "--out", str(tmp_path / "dropped"))
    assert sparsekd("corpus", str(tiny_recipe), *drop).code == 0


def test_tokenizer_that_does_not_match(
    sparsekd: Any, tiny_recipe: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    larger = PreTrainedTokenizerFast.from_pretrained(tmp_path / "llama")
    larger.add_tokens([f"<extra-{i}>" for i in range(10)])
    larger.save_pretrained(tmp_path / "llama")
    expect(sparsekd("run", str(tiny_recipe), "--out", str(tmp_path / "out")), 3, "tokenizer does not match", "400")


def test_model_without_an_mlp(sparsekd: Any, tiny_recipe: Path, tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    recipe = changed(tiny_recipe, model={"name": str(tmp_path / "mamba")})
    expect(sparsekd("run", recipe, "--dry-run"), 2, "no MLP found in MambaForCausalLM")


def test_pickled_checkpoint(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "llama" / "model.safetensors").rename(tmp_path / "llama" / "pytorch_model.bin")
    expect(sparsekd("run", str(tiny_recipe), "--out", str(tmp_path / "out")), 3, "pickle", "save_pretrained")


def test_weights_that_are_not_finite(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    expect(sparsekd("run", str(tiny_recipe), "--out", str(tmp_path / "out")), 3, "not finite")


def test_out_of_space(sparsekd: Any, tiny_recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    expect(sparsekd("run", str(tiny_recipe), "--out", str(tmp_path / "out")), 4, "the teacher cache", "are free")


def test_output_folder_with_other_files(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    expect(sparsekd("run", str(tiny_recipe), "--out", str(tmp_path / "out")), 2, "not empty and holds no run")
    expect(sparsekd("run", str(tiny_recipe), "--fresh", "--out", str(tmp_path / "out")), 2, "holds no run")


def test_output_folder_with_another_run(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert sparsekd("compress", str(tiny_recipe), *out).code == 0
    expect(
        sparsekd("run", str(tiny_recipe), "--reduction=0.4", *out), 3, "compress.reduction is 0.15 there and 0.4 now"
    )


def test_resume_and_fresh(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    expect(sparsekd("run", str(tiny_recipe), "--resume", *out), 2, "no run to resume")
    expect(sparsekd("run", str(tiny_recipe), "--resume", "--fresh", *out), 2, "give one of them")


def test_unknown_model_and_other_folders(sparsekd: Any, tmp_path: Path, text_file: Path) -> None:
    expect(sparsekd("run", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")), 2, "no such folder")
    expect(sparsekd("inspect", str(tmp_path)), 2, "expected a run, a model, a corpus or a cache")
    expect(sparsekd("eval", str(tmp_path), "--text", str(tmp_path / "no.txt")), 3, "no.txt: no such file")


def test_stale_cache_is_named(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert sparsekd("compress", str(tiny_recipe), *out).code == 0
    shard = tmp_path / "out/round-01/cache/part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    expect(sparsekd("distill", str(tiny_recipe), *out), 3, "part-00000.parquet is damaged")


def test_a_model_without_mlps_is_refused_before_anything_is_made(
    sparsekd: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "experts"
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    recipe = changed(tiny_recipe, model={"name": str(folder)})
    expect(sparsekd("run", recipe, "--out", str(tmp_path / "out")), 2, "no MLP found")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_text_needs_a_plain_name(sparsekd: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = changed(tiny_recipe, evaluate={"texts": {"../up": {"holdout_of": "learn"}}})
    expect(sparsekd("run", recipe, "--out", str(tmp_path / "out")), 2, "evaluate.texts.../up", "letters, digits")
