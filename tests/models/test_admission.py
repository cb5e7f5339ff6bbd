"""Models that somebody else made: no pickle is read, nothing outside the folder, and no config takes all memory."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsekd import models
from sparsekd.errors import DataError, UsageError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def shards(make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model of several files of weights."""
    folder = tmp_path / "shards"
    make_model("llama").save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return folder


def rename_a_shard(folder: Path, name: Any) -> str:
    """Lets the index name a file differently; what that was called before."""
    index = json.loads((folder / INDEX).read_text())
    old = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] = {key: name if file == old else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return old


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refused(folder: Path, opener: Callable[[str], Any] = models.load) -> str:
    """The one line that says why."""
    with pytest.raises(DataError) as caught:
        opener(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_index_cannot_name_a_pickle(shards: Path) -> None:
    old = rename_a_shard(shards, "weights.bin")
    torch.save(load_file(shards / old), shards / "weights.bin")
    for opener in (models.load, models.source_hash):
        assert "'weights.bin': expected files of the same folder that end in .safetensors" in refused(shards, opener)


@pytest.mark.parametrize("place", ["../{}", "{folder}/{}", "sub/{}", "..\\{}"])
def test_an_index_cannot_name_a_file_elsewhere(place: str, shards: Path, tmp_path: Path) -> None:
    (shards / "sub").mkdir()
    name = place.format("outside.safetensors", folder=tmp_path)
    shutil.copy(shards / rename_a_shard(shards, name), shards / name)
    for opener in (models.load, models.source_hash):
        assert "expected files of the same folder" in refused(shards, opener)


@pytest.mark.parametrize("name", ["/etc/passwd", "", ".safetensors", 3, None, ["a.safetensors"], "a\n.safetensors"])
def test_an_index_names_nothing_but_plain_files(name: Any, shards: Path) -> None:
    rename_a_shard(shards, name)
    assert "expected files of the same folder" in refused(shards)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
def test_a_damaged_index_is_named(content: str, shards: Path) -> None:
    (shards / INDEX).write_text(content)
    assert f"{INDEX} is damaged" in refused(shards)


def test_a_pickle_by_the_name_of_safetensors_is_refused(model_folder: Callable[[str], Path], shards: Path) -> None:
    single = model_folder("llama") / "model.safetensors"
    for path in (single, sorted(shards.glob("*.safetensors"))[1]):
        weights = {key: value.clone() for key, value in load_file(path).items()}  # the file is mapped
        path.unlink()
        torch.save(weights, path)
        assert "SafetensorError" in refused(path.parent)


def test_a_pickle_beside_safetensors_is_not_read(
    model_folder: Callable[[str], Path], make_model: Callable[[str], PreTrainedModel]
) -> None:
    folder = model_folder("llama")
    other = {key: torch.zeros_like(value) for key, value in load_file(folder / "model.safetensors").items()}
    torch.save(other, folder / "pytorch_model.bin")
    loaded, _ = models.load(str(folder))
    assert models.weights_hash(loaded) == models.weights_hash(make_model("llama"))


def test_a_config_cannot_name_its_weights(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    (folder / "model.safetensors").unlink()
    change_config(folder, transformers_weights="adapter_model.bin")
    assert "transformers_weights" in refused(folder)


def test_an_adapter_beside_a_model_is_refused(model_folder: Callable[[str], Path]) -> None:
    """peft would put it into the model, from a pickle where there is one."""
    folder = model_folder("llama")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["up_proj"]}))
    weights = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight": torch.ones(1) for half in "AB"}
    torch.save(weights, folder / "adapter_model.bin")
    assert "has an adapter beside it" in refused(folder)


@pytest.mark.parametrize("method", ["unknown", "bitsandbytes", 3])
def test_a_quantisation_that_transformers_would_pass_over_is_refused(
    method: Any, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder("llama")
    change_config(folder, quantization_config={"quant_method": method})
    assert "quantization_config" in refused(folder)


@pytest.mark.parametrize("value", [10**9, 1e9, 10**30])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_more_layers_than_can_be_made_are_refused_at_once(
    architecture: str, value: float, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(architecture)
    key = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    change_config(folder, **{key: value})
    for opener in (models.load, models.skeleton):
        start = time.monotonic()
        assert f"{key} is {value} in its config: expected at most 1000" in refused(folder, opener)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
def test_a_config_of_a_far_larger_model_is_refused_before_its_weights_are_made(
    key: str, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder("llama")
    change_config(folder, **{key: 10**9})
    assert "its config describes " in refused(folder)


def test_a_number_that_is_none_in_an_unused_row_is_refused(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    weights = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    weights["model.embed_tokens.weight"][-1, -1] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.embed_tokens.weight holds numbers that are not finite" in refused(folder)


@pytest.mark.parametrize("name", ["a/b/c", "model.v2", "runs/", "/x/y", "../x", "a b/c", "a/b.c/d", "~/x", ""])
def test_only_what_looks_like_a_hub_id_is_asked_for_on_the_hub(name: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # `runs/` is there after `make demo`
    monkeypatch.setattr("sparsekd.models.locating.cached_file", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(UsageError, match="no such folder, and no Hub id" if name else "no config"):
        models.load(name)


def test_a_hub_model_without_a_config_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr("sparsekd.models.locating.cached_file", lambda *_, **__: None)
    with pytest.raises(DataError, match="model owner/name: it has no config"):
        models.load("owner/name")


def test_a_reason_of_several_lines_is_told_whole(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:-1].clone()}, folder / "other.safetensors", {"format": "pt"})
    (folder / "other.safetensors").rename(folder / "model.safetensors")
    assert name in refused(folder)
