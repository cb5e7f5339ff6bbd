"""`taylor` and `activation`: scores worked out the long way too, and the cut that follows them."""

from __future__ import annotations

import copy
from typing import Any

import architectures
import pytest
import torch
from cutting import cut, section
from elsewhere import in_two_processes, layers_away
from tiny import sharpened
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsekd
from sparsekd.compression import Calibration, batches_of
from sparsekd.compression.methods import activation, method_named
from sparsekd.errors import DataError, UsageError
from sparsekd.models import MLP, find_mlps, forms, linear_weight, shape

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2"]
METHODS = ["activation", "taylor"]


def tokens(count: int = 12) -> Tensor:
    return torch.randint(0, 300, (count, 32), generator=torch.Generator().manual_seed(1))


def calibration(model: PreTrainedModel, **how: Any) -> Calibration:
    return Calibration(model, batches_of(tokens(), 5), **how)  # the last batch is smaller


def scores(method: str, model: PreTrainedModel, **how: Any) -> dict[MLP, Tensor]:
    chosen: Any = method_named(method)
    return chosen.scores(model, calibration(model, **how))


def loss(model: PreTrainedModel) -> Tensor:
    """Cross-entropy of the next tokens, the sum over all of them."""
    logits = model(tokens()).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten(), reduction="sum")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    return float(torch.corrcoef(torch.stack([x.argsort().argsort().double() for x in (a, b)]))[0, 1])


# ---- taylor


def rows_and_column(model: PreTrainedModel, mlp: MLP, values: dict[str, Tensor], neuron: int) -> list[Tensor]:
    """What `values`, of the shape of the weights, has of one neuron."""
    neurons = shape(model.get_submodule(mlp.output))[0]
    rows = [values[name][neuron::neurons] for name in mlp.inputs]  # of a fused matrix two
    return [*rows, values[mlp.output][:, neuron]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taylor_is_the_sum_over_a_neuron_s_weights(architecture: str, make_model: Any) -> None:
    model = sharpened(make_model(architecture))
    found = scores("taylor", model)
    loss(model).backward()
    values = {}
    for name in (name for mlp in found for name in mlp.matrices):
        weight: Any = model.get_submodule(name).weight
        product = (weight * weight.grad).detach().abs()
        values[name] = product.T if architecture == "gpt2" else product
    for mlp, importance in found.items():
        expected = [
            float(sum(part.sum() for part in rows_and_column(model, mlp, values, neuron)))
            for neuron in range(len(importance))
        ]
        torch.testing.assert_close(importance, torch.tensor(expected), rtol=2e-4, atol=1e-6)


@torch.no_grad()
def damage(model: PreTrainedModel, mlp: MLP) -> Tensor:
    """By how much the loss changes without each of the MLP's neurons."""
    weight, before, found = linear_weight(model.get_submodule(mlp.output)), loss(model), []
    for column in weight.T:
        kept = column.clone()
        column.zero_()
        found.append((loss(model) - before).abs())
        column.copy_(kept)
    return torch.stack(found)


def test_taylor_ranks_neurons_as_their_removal_does(make_model: Any) -> None:
    """Neurons of very different weight, most of them small: there first order is what decides."""
    model = sharpened(make_model("llama"))
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mlp in find_mlps(model):
            weight = linear_weight(model.get_submodule(mlp.output))
            weight *= 10 ** (-4 * torch.rand(weight.shape[1], generator=made))
    gradients = calibration(model).weight_gradients()
    for mlp, importance in scores("taylor", model).items():
        removed = damage(model, mlp)
        assert rank_correlation(importance, removed) > 0.9
        column = linear_weight(model.get_submodule(mlp.output)).detach() * gradients[mlp.output]
        assert rank_correlation(column.sum(0).abs(), removed) > 0.9  # with the signs, which the method leaves out


def test_the_gradient_is_the_slope_of_the_loss(make_model: Any) -> None:
    model = sharpened(make_model("llama"))
    gradients, mlp = calibration(model).weight_gradients(), find_mlps(model)[1]
    weight = linear_weight(model.get_submodule(mlp.output)).detach()
    slopes = (weight * gradients[mlp.output]).sum(0)
    for neuron in slopes.abs().topk(3).indices:
        before, step = weight[:, neuron].clone(), 1e-2
        sides = []
        for scale in (1 + step, 1 - step):
            weight[:, neuron] = scale * before
            with torch.no_grad():
                sides.append(float(loss(model)))
        weight[:, neuron] = before
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(slopes[neuron]), rel=0.02)


def test_packed_documents_count_as_if_each_were_alone(make_model: Any) -> None:
    model, separator = sharpened(make_model("llama")), 5
    packed = tokens(1) % 50 + 6
    packed[0, [11, 31]] = separator
    found = Calibration(model, batches_of(packed, 1), separator=separator).weight_gradients()
    alone = Calibration(model, batches_of([packed[:, :12], packed[:, 12:]], 1)).weight_gradients()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


# ---- activation


@torch.no_grad()
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt"])  # opt's MLPs see all positions in one row
def test_activation_is_the_norm_of_the_means(architecture: str, make_model: Any) -> None:
    model = architectures.made("opt").eval() if architecture == "opt" else make_model(architecture)
    text = tokens() % 64
    found = activation.scores(model, Calibration(model, batches_of(text, 5)))
    seen: dict[str, list[Tensor]] = {}
    for mlp in find_mlps(model):
        model.get_submodule(mlp.output).register_forward_pre_hook(
            lambda _, args, name=mlp.output: seen.setdefault(name, []).append(args[0].reshape(32, -1))
        )
    for block in text:
        model(block[None], use_cache=False)
    for mlp, importance in found.items():
        means = torch.stack(seen[mlp.output]).abs().mean(1)  # block by neuron
        torch.testing.assert_close(importance.float(), means.square().sum(0).sqrt(), rtol=1e-4, atol=1e-8)


# ---- both


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_highest_scores_stay_as_they_are(method: str, architecture: str, make_model: Any) -> None:
    model = sharpened(make_model(architecture))
    dense = copy.deepcopy(model)
    options = section(method=method, multiple=4, batch_size=5, reduction=0.2)
    for reduction in (0.2, 0.5):
        before, found = copy.deepcopy(model), scores(method, model)
        planned = cut(model, tokens(), section(method=method, multiple=4, batch_size=5, reduction=reduction))
        assert reduction <= planned.mlp_reduction < reduction + 0.08
        widths = {layer["neurons"] for layer in forms.description_of(model).layers.values()}  # type: ignore[union-attr]
        assert len(widths) == 1 and type(model) is type(dense)  # an ordinary checkpoint
        (width,) = widths
        assert width % 4 == 0
        for mlp, importance in found.items():
            kept = importance.topk(width).indices.sort().values
            old, new = (linear_weight(one.get_submodule(mlp.output)) for one in (before, model))
            assert torch.equal(new, old[:, kept])
            for name in mlp.inputs:
                old, new = (linear_weight(one.get_submodule(name)) for one in (before, model))
                assert torch.equal(new[:width], old[kept]) and torch.equal(new[-width:], old[kept - len(importance)])
    with pytest.raises(UsageError, match="removed already: expected more"):
        cut(model, tokens(), options)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_at_a_time_on_another_device(method: str, make_model: Any) -> None:
    """The same scores, and every layer at home afterwards: `cpu:0` stands for a GPU."""
    model = make_model("llama")
    away = layers_away(model)
    at_home, there = (list(scores(method, model, device=device).values()) for device in (None, torch.device("cpu", 0)))
    assert not away
    assert all(torch.equal(one, other) for one, other in zip(at_home, there, strict=True))


def _model_of_a_process() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sharpened(LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).eval())


def _scores_in_a_process() -> list[list[Tensor]]:
    model = _model_of_a_process()
    return [list(scores(method, model).values()) for method in METHODS]


def test_two_processes_find_what_one_does() -> None:
    found = in_two_processes(_scores_in_a_process)
    for of_method in zip(_scores_in_a_process(), *found, strict=True):
        for alone, one, other in zip(*of_method, strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(alone, one, rtol=1e-4, atol=0)
            assert torch.equal(alone.topk(20).indices, one.topk(20).indices)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named_and_changes_nothing(method: str, make_model: Any) -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuses(error: type[Exception], says: str, **options: Any) -> None:
        given = {"blocks": tokens(), "reduction": 0.3, "multiple": 2} | options
        with pytest.raises(error, match=says):
            sparsekd.compress(model, method=method, **given)  # type: ignore[arg-type]
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())

    refuses(UsageError, f"compress.method is {method}, which weighs inputs by text: no blocks were given", blocks=None)
    refuses(UsageError, "kept in multiples of 128, but no MLP has more than 64", multiple=128)
    refuses(UsageError, "with neurons in multiples of 32 at most 50.0% of the MLP", multiple=32, reduction=0.6)
    before["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    refuses(DataError, "the neurons that model.layers.1.mlp.down_proj reads are zero on all of the text")
