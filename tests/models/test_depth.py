"""Form `depth`: models with fewer layers, on many architectures; who opens them, and what is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import made
from tiny import sharpened
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sparsekd
from sparsekd import models
from sparsekd.compression import depths
from sparsekd.errors import DataError, UsageError
from sparsekd.models import Layers, find_layers, forms
from sparsekd.models.forms import depth
from sparsekd.run import inspection

TOKENS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
WINDOW = {"layer_types": KINDS, "sliding_window": 4, "use_sliding_window": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bloom": {},
    "cohere2": {"sliding_window": 4},
    "falcon": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"layer_types": KINDS, "sliding_window": 4},
    "gpt2": {},
    "gpt_neox": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama": {},
    "mpt": {},
    "opt": {},
    "phi3": {"sliding_window": 4},
    "qwen3": WINDOW,
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}


def built(architecture: str, **changes: Any) -> PreTrainedModel:
    """Four layers that differ, with a vocabulary that the tests' tokenizer fits in."""
    torch.manual_seed(0)
    return sharpened(made(architecture, vocab_size=400, **(ARCHITECTURES.get(architecture, {}) | changes)).eval())


def keep(model: PreTrainedModel, *numbers: int, reduction: float = 0.5) -> None:
    """A method without a choice."""
    dense = forms.dense_sizes(model)
    depth.keep(model, numbers)
    forms.mark(model, "depth", "by-hand", reduction, dense)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def passed_by(model: Any, *numbers: int) -> torch.Tensor:
    """Logits of the model when layers of other numbers hand on what they read."""
    layers = Layers(model)
    layers.record(lambda: logits(model))
    with layers._passing_on([number for number in range(len(layers.modules)) if number not in numbers]):
        return logits(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_left_computes_as_if_the_others_were_not_there(
    architecture: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = built(architecture)
    for numbers in ([0, 3], [1], [0, 1, 3]):
        model, folder = copy.deepcopy(dense), str(tmp_path / str(numbers))
        keep(model, *numbers)
        assert torch.equal(logits(model), passed_by(dense, *numbers))
        assert not torch.allclose(logits(model), logits(dense), atol=1e-2)
        models.save(model, tokenizer, folder)
        loaded: Any = models.load(folder)[0]
        assert type(loaded) is type(model) is type(dense) and loaded.config.sparsekd == model.config.sparsekd
        assert torch.equal(logits(loaded), logits(model))
        (described,) = loaded.config.sparsekd["layers"].values()
        assert described == {"kept": numbers, "dense": 4}
        assert len(find_layers(models.skeleton(folder))) == loaded.config.num_hidden_layers == len(numbers)
        assert forms.dense_sizes(loaded) == forms.dense_sizes(dense)
        said = [
            one.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
            for one in (model, loaded)
            for cached in (True, False)
        ]
        assert all(torch.equal(one, said[0]) for one in said)


def test_the_lists_of_the_config_follow_the_layers() -> None:
    for architecture, key in {
        "qwen3": "layer_types",
        "gemma3_text": "layer_types",
        "smollm3": "no_rope_layers",
    }.items():
        model = built(architecture)
        before = getattr(model.config, key)
        keep(model, 1, 2)
        assert getattr(model.config, key) == before[1:3]
        assert [layer.self_attn.layer_idx for layer in find_layers(model)] == [0, 1]
    qwen: Any = built("qwen3")
    keep(qwen, 1, 2)
    assert [layer.self_attn.sliding_window for layer in find_layers(qwen)] == [4, None]
    assert built("gpt2").config.n_layer == 4
    gpt2: Any = built("gpt2")
    keep(gpt2, 3)
    assert gpt2.config.n_layer == 1 and gpt2.transformer.h[0].attn.layer_idx == 0


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


def test_it_opens_without_sparsekd(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = {}
    for architecture in ("llama", "qwen3", "phi3", "gpt2", "gemma3_text", "smollm3"):
        model = built(architecture)
        keep(model, 1, 2)
        models.save(model, tokenizer, tmp_path / architecture)
        expected[str(tmp_path / architecture)] = (type(model).__name__, logits(model))
    asked = [sys.executable, "-c", OPEN_PLAIN, json.dumps(TOKENS.tolist()), *expected]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, (name, values) in zip(done.stdout.splitlines(), expected.values(), strict=True):
        found_name, found = json.loads(line)
        assert found_name == name
        assert torch.equal(torch.tensor(found), values)


@pytest.mark.parametrize("in_between", ["saved", "in memory"])
def test_a_shorter_model_is_made_shorter_still(
    in_between: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = built("qwen3")
    model = copy.deepcopy(dense)
    for numbers, kept in (((0, 2, 3), [0, 2, 3]), ((1, 2), [2, 3]), ((0,), [2])):
        keep(model, *numbers)
        assert model.config.sparsekd["layers"] == {"model.layers": {"kept": kept, "dense": 4}}
        assert torch.equal(logits(model), passed_by(dense, *kept))
        if in_between == "saved":
            models.save(model, tokenizer, tmp_path / str(kept))
            model = models.load(str(tmp_path / str(kept)))[0]
    assert forms.dense_sizes(model) == forms.dense_sizes(dense)


@pytest.mark.parametrize(
    ("architecture", "numbers", "changes", "says"),
    [
        ("gpt2", [0, 2], {"scale_attn_by_inverse_layer_idx": True}, "transformer.h.1.attn depends on them"),
        ("gemma3n_text", [0, 3], {}, "model.embed_tokens_per_layer depends on them"),
        ("gemma4_text", [0, 1], {}, "per_layer_config"),  # of which it has one for the last layer
        ("olmo_hybrid", [1], {}, "Class validation error"),  # which wants both kinds of attention
    ],
)
def test_layers_that_depend_on_their_place_are_refused(
    architecture: str, numbers: list[int], changes: Any, says: str
) -> None:
    model = built(architecture, **changes)
    before = model.config.to_dict()
    with pytest.raises(UsageError, match=f"cannot be opened with these layers alone: .*{says}"):
        depth.keep(model, numbers)
    assert len(find_layers(model)) == 4 and model.config.to_dict() == before


def test_a_plan_refuses_what_the_base_cannot_open() -> None:
    model = built("gemma3n_text")
    with pytest.raises(UsageError, match=r"cannot be opened with these layers alone: .*per_layer depends on them"):
        depths.nearest(model, 0.5, "shortgpt")


def test_what_config_says_must_hold(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = built("llama")
    keep(model, 0, 1, 3)
    models.save(model, tokenizer, tmp_path / "model")
    (tmp_path / "model/sparsekd.json").unlink()  # or its hashes would tell
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())

    def refuses(layers: Any, says: str) -> None:
        path.write_text(json.dumps(config | {"sparsekd": config["sparsekd"] | {"layers": layers}}))
        with pytest.raises(DataError, match=says):
            sparsekd.load(str(tmp_path / "model"))

    refuses({"model.layers": {"kept": [0, 1], "dense": 4}}, "model.layers has 3 layers, config.json says 2 are left")
    refuses({"model.mlps": {"kept": [0, 1, 3], "dense": 4}}, "says which layers of model.mlps are left: expected model")
    for kept in ([], [0, 1, 4], [1, 0, 3], [0, 0, 3], [-1, 0, 3], [True, 2, 3], 3, None):
        refuses({"model.layers": {"kept": kept, "dense": 4}}, "`sparsekd` in config.json is damaged")


def test_what_is_shown_and_trained(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = built("phi3")
    keep(model, 0, 3)
    models.save(model, tokenizer, tmp_path / "model")
    facts = inspection.describe(tmp_path / "model")
    assert facts["compressed"] == "by-hand, 2 of 4 layers removed" and facts["removed layers"] == "1, 2"
    assert (facts["MLPs"], facts["format"], facts["class"]) == (2, "depth", "Phi3ForCausalLM")
    assert forms.trained(model) == {f"model.layers.{n}.mlp.{m}" for n in (0, 1) for m in ("gate_up_proj", "down_proj")}
    assert forms.guard(model) is None
    plain = forms.merged(model)
    assert not hasattr(plain.config, "sparsekd") and torch.equal(logits(plain), logits(model))
