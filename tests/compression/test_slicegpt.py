"""The residual stream rotated and sliced: first nothing but a rotation, then the bases, then whole models."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from elsewhere import in_two_processes
from torch import Tensor
from training import OPTIONS, data
from transformers import PreTrainedModel

import sparsekd
from sparsekd import distillation, export, models
from sparsekd.compression import Calibration, batches_of, slicing
from sparsekd.errors import DataError, UsageError
from sparsekd.models import forms
from sparsekd.models.forms import sliced
from sparsekd.recipe import load_recipe
from sparsekd.teacher import Cache

NEEDED = ["llama", "qwen3", "phi3", "gpt2"]
TAKEN = [*NEEDED, "gemma", "hunyuan_v1_dense", "lfm2", "mistral", "nemotron", "persimmon", "qwen2", "smollm3"]
TAKEN += ["stablelm", "starcoder2"]
REFUSED = {
    "bloom": r"self_attention does not add what a linear layer writes",
    "cohere2": r"input_layernorm hands on what model\.layers\.0\.self_attn and model\.layers\.0\.mlp reads",
    "gemma2": r"self_attn does not add what a linear layer writes",
    "gpt_neox": r"gpt_neox\.layers\.0 hands on what .*input_layernorm and .*post_attention_layernorm reads",
    "granite": r"self_attn does not add what a linear layer writes",
    "olmo2": r"post_attention_layernorm does not add what a linear layer writes",
    "phi": r"input_layernorm hands on what model\.layers\.0\.self_attn and model\.layers\.0\.mlp reads",
    "xlnet": r"computes what cannot be followed",
}


def tokens(count: int = 40) -> Tensor:
    return torch.randint(0, 64, (count, 32), generator=torch.Generator().manual_seed(1))


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """With norms and biases that are not what they are made as."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def made(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return uneven(architectures.made(architecture, vocab_size=400))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(4), use_cache=False).logits


def calibration(model: PreTrainedModel) -> Calibration:
    return Calibration(model, batches_of(tokens(), 20))


@pytest.mark.parametrize("architecture", TAKEN)
def test_a_stream_of_full_width_is_only_rotated(architecture: str) -> None:
    dense = made(architecture)
    model: Any = copy.deepcopy(dense)
    slicing.cut(model, sliced.find_stream(model), 32, calibration(model))
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)
    changed = model.get_submodule(sliced.find_stream(dense).branches[0].reads[0]).weight
    assert not torch.allclose(changed, dense.get_parameter(sliced.find_stream(dense).branches[0].reads[0] + ".weight"))
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_is_built_otherwise_is_refused_before_a_weight_is_read(architecture: str) -> None:
    with torch.device("meta"):
        skeleton = architectures.made(architecture)
    with pytest.raises(UsageError, match=REFUSED[architecture]) as raised:
        slicing.plan_of(skeleton, 0.3, 8, "slicegpt")
    assert "compress.method neurons or two-sided takes this model" in str(raised.value)


def principal(values: Tensor, width: int) -> Tensor:
    """The projection on the first principal components of rows."""
    rows = values.flatten(0, -2).double()
    basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -width:]
    return basis @ basis.T


def test_the_bases_are_the_principal_components_in_the_model_sliced_so_far() -> None:
    model: Any = made("llama")
    stream = sliced.find_stream(model)
    norms = [sliced.norm_of(model, name) for name in stream.norms]
    bases = slicing.bases_of(model, stream, norms, 12, calibration(model))
    assert len(bases) == 9 and all(torch.allclose(basis.T @ basis, torch.eye(12).double()) for basis in bases)
    with torch.no_grad():
        embedded = model.model.embed_tokens(tokens())
        first = principal(embedded, 12)
        left, layer = embedded @ first.float(), model.model.layers[0]
        positions = model.model.rotary_emb(left, torch.arange(32)[None])
        after = left + layer.self_attn(layer.input_layernorm(left), positions, None)[0]
    assert torch.allclose(bases[0] @ bases[0].T, first, atol=1e-5)
    assert torch.allclose(bases[1] @ bases[1].T, principal(after, 12), atol=1e-4)


@pytest.mark.parametrize("architecture", NEEDED)
def test_a_sliced_model_computes_what_the_projected_one_does(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    dense = made(architecture)
    model = sparsekd.compress(copy.deepcopy(dense), tokens(), method="slicegpt", reduction=0.3)
    assert models.hidden_size(model) == 16 and model.config.hidden_size == 32  # a multiple of 8
    assert {value.shape[-1] for name, value in model.named_parameters() if "embed" in name or "wpe" in name} == {16}
    planned = slicing.plan_of(dense, 0.3, 8, "slicegpt")
    assert planned.model_parameters_after == models.num_parameters(model)
    assert planned.mlp_parameters_after == sum(
        models.num_parameters(model.get_submodule(matrix.name)) for matrix in planned.matrices
    )
    models.save(model, tokenizer, tmp_path / "model")
    loaded, _ = models.load(str(tmp_path / "model"))
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    generated = [
        one.generate(tokens(1)[:, :5], min_new_tokens=5, max_new_tokens=5, do_sample=False) for one in (loaded, model)
    ]
    assert torch.equal(*generated) and generated[0].shape == (1, 10)


@pytest.mark.parametrize(("architecture", "widths"), [("phi3", [30, 16, 14, 2]), ("gpt2", [30, 14, 14, 2])])
def test_the_widest_stream_that_removes_enough_is_taken(architecture: str, widths: list[int]) -> None:
    dense = made(architecture)  # gpt2's biases of what reads the stream stay as they are
    stream = sliced.find_stream(dense)
    for reduction, width in zip((0.05, 0.5, 0.51, 0.9), widths, strict=True):
        assert slicing.width_for(dense, stream, reduction, 2) == width
        assert slicing.plan_of(dense, reduction, 2, "slicegpt").mlp_reduction >= reduction


def test_training_lowers_the_loss(teacher: PreTrainedModel, blocks: Tensor, cache: Cache) -> None:
    student = sparsekd.compress(copy.deepcopy(teacher), blocks, method="slicegpt", reduction=0.5)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    options = replace(OPTIONS, alpha=1.0, train="compressed")
    history = distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    assert history.validations[-1].kd < 0.8 * history.validations[0].kd
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{name}.weight" for name in forms.trained(student)}
    assert "model.layers.1.input_layernorm.shortcut.weight" in moved and "model.embed_tokens.weight" not in moved


def _bases(model: PreTrainedModel) -> list[Tensor]:
    stream = sliced.find_stream(model)
    norms = [sliced.norm_of(model, name) for name in stream.norms]
    return slicing.bases_of(model, stream, norms, 16, Calibration(model, batches_of(tokens(), 2)))


def _bases_in_a_process() -> list[Tensor]:
    return _bases(made("llama"))


def test_two_processes_find_what_one_does() -> None:
    first, second = in_two_processes(_bases_in_a_process)
    for alone, one, other in zip(_bases_in_a_process(), first, second, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(alone @ alone.T, one @ one.T, atol=1e-4)


def test_bad_input_is_named_and_changes_nothing(make_model: Any) -> None:
    model = make_model("llama")
    before = models.weights_hash(model)

    def refuses(error: type[Exception], says: str, **options: Any) -> None:
        given: dict[str, Any] = {"blocks": tokens(), "reduction": 0.3, "method": "slicegpt"} | options
        with pytest.raises(error, match=says) as raised:
            sparsekd.compress(model, **given)
        assert len(str(raised.value).splitlines()) == 1

    refuses(UsageError, "weighs inputs by text: no blocks were given", blocks=None)
    refuses(UsageError, "statistics of 32 dimensions from 31 tokens: expected at least 32", blocks=tokens(1)[:, :31])
    refuses(UsageError, "the width is a multiple of 32, but the model has 32 features: expected less", multiple=32)
    refuses(UsageError, "a width in multiples of 16 at most 50.0% of the MLP", multiple=16, reduction=0.6)
    assert models.weights_hash(model) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[1:] = torch.nan
    refuses(DataError, "what model.layers.0.input_layernorm reads is not finite")


def test_a_model_that_does_more_than_its_modules_say_is_left_alone(make_model: Any) -> None:
    model = make_model("llama")
    before = models.weights_hash(model)
    model.lm_head.register_forward_hook(lambda _, args, output: output + args[0].sum(-1, keepdim=True).exp())
    with pytest.raises(UsageError, match="computes something else when its residual stream is rotated"):
        sparsekd.compress(model, tokens(), method="slicegpt", reduction=0.3)
    assert models.weights_hash(model) == before and forms.form_of(model) is None


def test_a_sliced_model_is_not_made_smaller_again(make_model: Any, tiny_recipe: Path) -> None:
    model = sparsekd.compress(make_model("llama"), tokens(), method="slicegpt", reduction=0.3)
    for method in ("slicegpt", "neurons", "svd", "wanda"):
        says = f"compress.method is {method}, but model.embed_tokens is sliced already: prune the dense model instead"
        with pytest.raises(UsageError, match=says):
            sparsekd.compress(model, tokens(), method=method, reduction=0.6)
    with pytest.raises(
        UsageError, match=r"rounds is \[0.2, 0.4\]: expected one, for a sliced model is not sliced again"
    ):
        load_recipe(str(tiny_recipe), ("compress.method=slicegpt", "rounds=[0.2,0.4]"))


@pytest.mark.parametrize(("format_name", "weights"), [("hf", "float32"), ("dense", "float32"), ("gguf", "f32")])
def test_formats_without_a_place_for_shortcuts_are_refused(
    format_name: str, weights: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = sparsekd.compress(make_model("llama"), tokens(), method="slicegpt", reduction=0.3)
    with pytest.raises(UsageError, match=r"sliced model.* sparsekd\.load opens it"):
        export.export(model, tokenizer, format_name, tmp_path / "out", export.Source("x"), weights=weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm": None}, "missing|says"),
        ({"model.layers.0.mlp": {"hidden": 8}}, "cannot be loaded"),
        ({"model.embed_tokens": {"hidden": 8}}, "wrong shape"),
        ({"model.embed_tokens": {"hidden": "16"}}, "is damaged"),
        ({"model.norm": {"hidden": 16, "dense": 32, "eps": "no"}}, "is damaged"),
    ],
)
def test_a_description_of_another_model_is_refused(
    change: dict[str, Any], message: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = sparsekd.compress(make_model("llama"), tokens(), method="slicegpt", reduction=0.3)
    models.save(model, tokenizer, tmp_path / "model")
    (tmp_path / "model/sparsekd.json").unlink()  # or its hashes would tell
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    layers = config["sparsekd"]["layers"] | change
    config["sparsekd"]["layers"] = {name: layer for name, layer in layers.items() if layer is not None}
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=message) as raised:
        models.load(str(tmp_path / "model"))
    assert len(str(raised.value).splitlines()) == 1
