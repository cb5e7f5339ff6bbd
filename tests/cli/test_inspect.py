"""`sparsekd inspect`: what a folder is, and whether it is whole."""

from pathlib import Path
from typing import Any

import pytest
from commands import snapshot

from sparsekd import errors, models

NO_TEXTS = ("--set", "evaluate.texts={other: {path: other.txt}}", "--set", "evaluate.texts.held=null")


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


def test_a_path_that_is_nothing_of_ours(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    (tmp_path / "random" / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "random", tmp_path / "nowhere", tmp_path / "random" / "thesis.txt"):
        line = refused("inspect", path, "--json", error=errors.UsageError)
        assert f"{path}: expected a run, a model, a corpus or a cache" in line
