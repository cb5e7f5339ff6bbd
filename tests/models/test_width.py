"""Form `width`: MLPs with fewer neurons, on many architectures; which class opens them, and what is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import DENSE, made
from narrowing import chosen, narrow, without
from tiny import sharpened
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sparsekd
from sparsekd import models
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_mlps, forms, num_parameters
from sparsekd.models.forms import width
from sparsekd.run import inspection

TOKENS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
# states that are slow without their kernels; no double precision; and gemma3n's share of neurons that are switched off
LEFT_OUT = {"bamba", "falcon_h1", "granitemoehybrid", "jamba", "olmo_hybrid", "qwen3_next", "xglm"}
ARCHITECTURES = [name for name in DENSE if name not in LEFT_OUT | {"gemma3n_text"}]
OWN_CLASS = {"bloom", "mpt"}  # no key
KEYS = {"gpt2": "n_inner", "codegen": "n_inner", "opt": "ffn_dim", "xglm": "ffn_dim", "falcon": "ffn_hidden_size"}


def exact(architecture: str, **changes: Any) -> PreTrainedModel:
    """A model in double precision with MLPs that matter, and a vocabulary that the tests' tokenizer fits in."""
    torch.manual_seed(0)
    model = made(architecture, vocab_size=400, **changes).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "bias", None), torch.Tensor):
                module.bias.normal_(std=0.1)
    return sharpened(model)


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def neurons(model: PreTrainedModel) -> list[int]:
    return [width.num_neurons(model, mlp) for mlp in find_mlps(model)]


def is_own(model: Any) -> bool:
    return model.config.model_type.startswith("sparsekd_")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_left_computes_as_if_the_others_were_zero(
    architecture: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = exact(architecture)
    whole = neurons(dense)[0]
    for widths in ([24], [24, whole, 17, 40], [whole]):
        model, kept = copy.deepcopy(dense), chosen(dense, *widths)
        narrow(model, kept)
        expected = logits(without(dense, kept))
        assert torch.allclose(logits(model), expected, atol=1e-6)
        assert widths == [whole] or not torch.allclose(logits(dense), expected, atol=1e-3)
        assert is_own(model) == (len(widths) > 1 or (architecture in OWN_CLASS and widths != [whole]))
        assert neurons(model) == (widths * 4 if len(widths) == 1 else widths)
        model.float()
        models.save(model, tokenizer, tmp_path / str(widths))
        loaded, _ = models.load(str(tmp_path / str(widths)))
        assert type(loaded) is type(model) and loaded.config.sparsekd == model.config.sparsekd
        assert torch.equal(logits(loaded), logits(model))
        skeleton = models.skeleton(str(tmp_path / str(widths)))
        assert find_mlps(skeleton) == find_mlps(model) == find_mlps(dense) and neurons(skeleton) == neurons(model)
        assert num_parameters(skeleton) == num_parameters(model)
        assert forms.dense_sizes(skeleton) == forms.dense_sizes(dense)


OPEN_PLAIN = """
import json, sys
sys.modules["sparsekd"] = None
import torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        print(json.dumps([type(model).__name__, model(tokens, use_cache=False).logits.tolist()]))
"""


def test_a_model_of_one_width_needs_no_sparsekd(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = []
    for architecture in ("llama", "phi3", "gpt2", "opt", "falcon", "gpt_neox", "starcoder2", "gemma3_text"):
        model = exact(architecture).float()
        narrow(model, chosen(model, 24))
        models.save(model, tokenizer, tmp_path / architecture)
        expected.append((type(model).__name__, logits(model)))
    folders = sorted(tmp_path.iterdir(), key=lambda folder: folder.stat().st_ctime_ns)
    asked = [sys.executable, "-c", OPEN_PLAIN, json.dumps(TOKENS.tolist()), *map(str, folders)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, (name, values) in zip(done.stdout.splitlines(), expected, strict=True):
        found_name, found = json.loads(line)
        assert found_name == name
        assert torch.equal(torch.tensor(found, dtype=values.dtype), values)


@pytest.mark.parametrize("architecture", [*KEYS, "llama"])
def test_the_config_names_the_width_in_the_key_of_the_base(architecture: str) -> None:
    model, key = exact(architecture), KEYS.get(architecture, "intermediate_size")
    before = getattr(model.config, key)
    narrow(model, chosen(model, 24))
    assert getattr(model.config, key) == 24
    narrow(model, chosen(model, 24, 20, 16, 8))
    assert getattr(model.config, key) in (before, neurons(exact(architecture))[0])


def test_a_width_like_the_hidden_size_is_found(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2", "opt", "bloom"):
        model = exact(architecture)
        narrow(model, chosen(model, 32))
        models.save(model, tokenizer, tmp_path / architecture)
        loaded, _ = models.load(str(tmp_path / architecture))
        assert neurons(loaded) == [32] * 4 and is_own(loaded) == (architecture == "bloom")


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "opt", "bloom", "gemma3n_text"])
@pytest.mark.parametrize("in_between", ["saved", "in memory"])
def test_a_narrow_model_is_narrowed_further(
    architecture: str, in_between: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = exact(architecture)
    model, widths = copy.deepcopy(dense), neurons(dense)
    for step, left in enumerate(([48], [40, 48, 33, 47], [32, 30, 20, 31], [20], [10])):
        kept = chosen(model, *left, seed=step)
        before = copy.deepcopy(model)
        narrow(model, kept, reduction=0.1 * (step + 1))
        described = forms.description_of(model)
        assert described is not None and described.dense == forms.dense_sizes(dense)
        assert [layer["dense"] for layer in described.layers.values()] == widths
        assert is_own(model) == (len(left) > 1 or architecture == "bloom")
        assert architecture == "gemma3n_text" or torch.allclose(logits(model), logits(without(before, kept)), atol=1e-6)
        if in_between == "saved":
            models.save(model, tokenizer, tmp_path / str(step))
            loaded, _ = models.load(str(tmp_path / str(step)))
            assert torch.allclose(logits(loaded), logits(model), atol=1e-5)  # gemma's constants are of float32
            model = loaded  # type: ignore[assignment]
    assert type(model).__name__.removeprefix("SparseKD") == type(dense).__name__


def test_new_output_weights_and_biases_are_taken(make_model: Any) -> None:
    for architecture, matrices in {"gpt2": ("mlp.c_fc", "mlp.c_proj"), "opt": ("fc1", "fc2")}.items():
        model: Any = make_model("gpt2") if architecture == "gpt2" else exact("opt").float()
        mlps = find_mlps(model)
        kept = {mlps[1]: torch.tensor([1, 5, 60])}
        model.get_submodule(mlps[1].output).requires_grad_(False)
        rows = models.linear_weight(model.get_submodule(mlps[1].inputs[0]))[[1, 5, 60]].clone()
        output, bias = torch.randn(32, 3), torch.randn(32)
        width.keep(model, kept, {mlps[1]: output}, {mlps[1]: bias})
        writing, reading = (model.get_submodule(name) for name in mlps[1].matrices)
        assert all(name.endswith(end) for name, end in zip(mlps[1].matrices, matrices, strict=True))
        assert models.shape(writing) == (32, 3) and models.shape(reading) == (3, 32)
        assert torch.equal(models.linear_weight(writing), rows)
        assert torch.equal(models.linear_weight(reading), output) and torch.equal(reading.bias, bias)
        assert writing.weight.requires_grad and not reading.weight.requires_grad and not reading.training
        assert [width.num_neurons(model, mlp) for mlp in mlps][1] == 3 and find_mlps(model) == mlps
        assert torch.isfinite(logits(model)).all()


def test_the_number_format_stays(make_model: Any) -> None:
    model = make_model("llama").bfloat16()
    kept = chosen(model, 24)
    outputs = {mlp: torch.randn(32, 24, dtype=torch.float64) for mlp in kept}
    width.keep(model, kept, outputs, {})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_nothing_is_removed_after_an_error(make_model: Any) -> None:
    model = make_model("llama")
    before, kept = models.weights_hash(model), chosen(model, 24)
    outputs = {next(iter(kept)): torch.randn(32, 24)}
    with pytest.raises(KeyError):
        width.keep(model, kept, outputs, {})
    assert models.weights_hash(model) == before and not is_own(model)


def test_neurons_that_something_tells_apart_are_not_removed(make_model: Any) -> None:
    model = make_model("gpt2")
    for block in model.transformer.h:
        block.mlp.act = nn.LayerNorm(128)
    with pytest.raises(UsageError, match=r"h\.0\.mlp has a parameter for each neuron: form width cannot be used"):
        narrow(model, chosen(model, 24))

    class Interleaved(nn.Module):
        def __init__(self, mlp: Any):
            super().__init__()
            self.gate_up_proj, self.down_proj, self.act = mlp.gate_up_proj, mlp.down_proj, mlp.activation_fn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = self.gate_up_proj(x)
            return self.down_proj(self.act(both[..., ::2]) * both[..., 1::2])

    model = make_model("phi3")
    for layer in model.model.layers:
        layer.mlp = Interleaved(layer.mlp)
    with pytest.raises(UsageError, match="does not read its fused matrix as two halves: form width cannot be used"):
        narrow(model, chosen(model, 24))


FIRST = "model.layers.0.mlp"


@pytest.mark.parametrize("widths", [(24,), (24, 20)], ids=["one width", "widths by layer"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST: None}, f"config.json says nothing of the neurons of {FIRST}|wrong shape"),
        ({"model.norm": {"neurons": 3, "dense": 64, "matrices": ["a", "b"]}}, "model.norm|RMSNorm"),
        ({FIRST: {"neurons": 25, "dense": 64, "matrices": ["gate_proj", "up_proj", "down_proj"]}}, "25|shape"),
        ({FIRST: {"neurons": 24, "dense": 64, "matrices": ["up_proj", "down_proj"]}}, "matrices up_proj|shape"),
        ({FIRST: {"neurons": 24, "dense": 64, "matrices": ["w1", "w2"]}}, "w1"),
        ({FIRST: {"neurons": 24, "dense": 20, "matrices": ["gate_proj", "up_proj", "down_proj"]}}, "is damaged"),
        ({FIRST: {"neurons": 0, "dense": 64, "matrices": ["gate_proj", "up_proj", "down_proj"]}}, "is damaged"),
        ({FIRST: {"neurons": 24, "dense": 64, "matrices": ["gate_proj"]}}, "is damaged"),
        ({FIRST: {"neurons": 24, "dense": 64}}, "is damaged"),
    ],
)
def test_a_description_of_another_model_is_refused(
    change: dict[str, Any], message: str, widths: Any, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model("llama")
    narrow(model, chosen(model, *widths))
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


def test_what_the_form_says_of_a_model(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    for widths, shown in (((24,), "24"), ((24, 20), "20 to 24")):
        model = make_model("phi3")
        narrow(model, chosen(model, *widths), reduction=0.625)
        assert forms.trained(model) == {name for mlp in find_mlps(model) for name in mlp.matrices}
        assert forms.guard(model) is None
        models.save(model, tokenizer, tmp_path / shown)
        facts = inspection.describe(tmp_path / shown)
        assert facts["class"] == type(model).__name__ and facts["MLPs"] == 2
        assert facts["compressed"] == "by-hand, 62% of the MLP parameters removed"
        assert (facts["format"], facts["neurons"]) == ("width", shown)


def test_a_change_of_the_model_is_not_saved(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    narrow(model, chosen(model, 24))
    model.config.sparsekd["layers"][FIRST]["neurons"] = 23
    with pytest.raises(DataError, match=f"{FIRST} has 24 neurons, config.json says 23"):
        models.save(model, tokenizer, tmp_path / "model")


@pytest.mark.parametrize("method", ["svd", "magnitude"])
def test_other_forms_do_not_mix_with_it(method: str, make_model: Any) -> None:
    model = make_model("llama")
    narrow(model, chosen(model, 24))
    with pytest.raises(UsageError, match=f"compress.method is {method}, but {FIRST} is width already: prune the dense"):
        sparsekd.compress(model, reduction=0.9, method=method)
