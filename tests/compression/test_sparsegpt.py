"""`sparsegpt`: against the paper's formula with an explicit inverse for every input, in the model as it is by then."""

import copy
from typing import Any

import pytest
import torch
from cutting import cut, section
from elsewhere import in_two_processes, layers_away
from tiny import sharpened
from torch import Tensor
from training import equal, state
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsekd
from sparsekd.compression import reconstruction
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_mlps, linear_weight


def tokens(count: int = 24) -> Tensor:
    return torch.randint(0, 300, (count, 32), generator=torch.Generator().manual_seed(1))


def inputs_of(model: PreTrainedModel, names: tuple[str, ...], blocks: Tensor) -> dict[str, Tensor]:
    """What each matrix reads, tokens x inputs, in float64."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].detach().flatten(0, 1).double()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(blocks)
    for handle in handles:
        handle.remove()
    return seen


def textbook(weight: Tensor, inputs: Tensor, pattern: str, block_size: int = 128) -> Tensor:
    """Half of the weights removed, one input after the other, each with the inverse Hessian of those that are left."""
    weight, hessian = weight.double().clone(), inputs.T @ inputs
    weight[:, hessian.diagonal() == 0] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    inverses = [torch.linalg.inv(hessian[first:, first:]) for first in range(len(hessian))]
    costs_less = torch.stack([inverse[0, 0] for inverse in inverses])
    group = block_size if pattern == "unstructured" else int(pattern[2])
    for first in range(0, len(hessian), group):
        inside = slice(first, first + group)
        costs = weight[:, inside].square() / costs_less[inside]
        if pattern == "unstructured":
            mask = costs <= costs.flatten().sort().values[costs.numel() // 2]  # one more, as in the authors' code
        else:
            mask = costs < costs.sort(dim=1).values[:, group // 2, None]
        for column, removed in enumerate(mask.T, first):
            inverse = inverses[column]
            change = (weight[:, column] * removed / inverse[0, 0]).outer(inverse[0])
            weight[:, column:] -= change
            weight[removed, column] = 0
    return weight


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_it_is_the_textbook_in_the_model_as_it_is_by_then(architecture: str, pattern: str, make_model: Any) -> None:
    """By layer: the reference goes through the model whose earlier layers are ours."""
    model = sharpened(make_model(architecture))
    by_then, biased = copy.deepcopy(model), architecture == "gpt2"
    share = 0.5 if pattern != "unstructured" or not biased else 0.49  # half of the weights and of the biases is more
    found = cut(model, tokens(), section(method="sparsegpt", reduction=share, pattern=pattern, batch_size=5))
    for mlp in find_mlps(by_then):
        seen = inputs_of(by_then, mlp.matrices, tokens())
        for name in mlp.matrices:
            before, after = (linear_weight(one.get_submodule(name)) for one in (by_then, model))
            if share == 0.5:
                expected = textbook(before.detach(), seen[name], pattern)
                assert torch.equal(after == 0, expected == 0), name
                torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                before.copy_(after)
    zeros = {matrix.name: matrix.zeros for matrix in found.matrices}
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            assert zeros[name] == int((linear_weight(model.get_submodule(name)) == 0).sum())
    assert found.mlp_reduction >= (0.48 if biased else 0.5)


def test_blocks_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 inputs, as of 128: a block's mask is chosen on what the earlier ones have made of it."""
    monkeypatch.setattr(reconstruction, "BLOCK", 16)
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 40, generator=made).double()
    inputs = torch.randn(300, 40, generator=made).double() @ torch.randn(40, 40, generator=made).double()
    inputs[:, 5] = 0
    root, dead = reconstruction.inverse_root(inputs.T @ inputs, "it")
    assert dead.nonzero().tolist() == [[5]]
    for pattern in ("unstructured", "2:4"):
        found = reconstruction.reconstructed(weight, torch.zeros(20, 40).bool(), root, dead, 0.5, pattern)
        torch.testing.assert_close(found, textbook(weight, inputs, pattern, 16), rtol=1e-6, atol=1e-8)
        assert torch.equal(found == 0, textbook(weight, inputs, pattern, 16) == 0)


def test_the_outputs_are_nearer_than_without_updates(make_model: Any) -> None:
    dense, blocks = sharpened(make_model("llama")), tokens()
    far = {}
    for method in ("wanda", "sparsegpt"):
        pruned = sparsekd.compress(copy.deepcopy(dense), blocks, method=method, reduction=0.5)
        with torch.no_grad():
            far[method] = float((pruned(blocks).logits - dense(blocks).logits).square().mean())
    assert far["sparsegpt"] < 0.95 * far["wanda"]


def test_a_masked_model_is_pruned_further(make_model: Any) -> None:
    model = sparsekd.compress(sharpened(make_model("llama")), tokens(), method="wanda", reduction=0.3)
    names = [name for mlp in find_mlps(model) for name in mlp.matrices]
    for options in ({"reduction": 0.5, "pattern": "2:4"}, {"reduction": 0.7}):
        before = {name: linear_weight(model.get_submodule(name)) == 0 for name in names}
        sparsekd.compress(model, tokens(), method="sparsegpt", **options)  # type: ignore[arg-type]
        after = {name: linear_weight(model.get_submodule(name)) == 0 for name in names}
        for name in names:
            assert (after[name] | ~before[name]).all(), name  # and with 2:4 a group of three zeros keeps them
            assert float(after[name].float().mean()) >= options["reduction"]
    with pytest.raises(UsageError, match="zero already: expected more"):
        sparsekd.compress(model, tokens(), method="sparsegpt", reduction=0.6)


def test_a_hessian_without_an_inverse_is_named_and_changes_nothing(make_model: Any) -> None:
    """A gate of zeros lets nothing through. By then the first layer has been pruned: it is put back."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
    before = state(model)
    message = r"the Hessian of model\.layers\.1\.mlp\.down_proj has no inverse: its inputs are zero on all of the text"
    with pytest.raises(DataError, match=message):
        sparsekd.compress(model, tokens(), method="sparsegpt", reduction=0.5)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    before["model.embed_tokens.weight"][7] = torch.inf
    with pytest.raises(DataError, match=r"the inputs of model\.layers\.0\.mlp\.gate_proj are not finite"):
        sparsekd.compress(model, tokens(), method="sparsegpt", reduction=0.5)
    with pytest.raises(UsageError, match="weighs inputs by text: no blocks were given"):
        sparsekd.compress(model, method="sparsegpt", reduction=0.5)
    assert equal(state(model), before)
    assert not hasattr(model.config, "sparsekd")


@pytest.mark.parametrize("eigenvalue", [-1.0, float("nan")])
def test_nothing_stands_in_for_an_inverse(eigenvalue: float) -> None:
    gram = torch.eye(8).double()
    gram[2, 3] = gram[3, 2] = 1 - eigenvalue
    with pytest.raises(DataError, match="the Hessian of it has no inverse; expected a trained model, or more and othe"):
        reconstruction.inverse_root(gram, "it")


def test_a_layer_at_a_time_on_another_device(make_model: Any) -> None:
    """The same weights, and every layer at home afterwards: `cpu:0` stands for a GPU."""
    made = []
    for device in (None, torch.device("cpu", 0)):
        model = make_model("llama")
        away = layers_away(model)
        cut(model, tokens(), section(method="sparsegpt", reduction=0.5), device=device)
        assert not away
        made.append(state(model))
    assert equal(*made)


def _pruned() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).eval()
    return state(sparsekd.compress(model, tokens().split(3), method="sparsegpt", reduction=0.5, pattern="2:4"))


def test_two_processes_prune_what_one_does() -> None:
    first, second = in_two_processes(_pruned)
    assert equal(first, second)
    for name, value in _pruned().items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-7)
