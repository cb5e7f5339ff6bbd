"""Methods that remove layers: what they weigh them by, against a direct computation; how many go; what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import made
from cutting import cut, section
from elsewhere import in_two_processes, layers_away
from tiny import sharpened
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from transformers import PreTrainedModel

import sparsekd
from sparsekd.compression import Calibration, batches_of, plan_for
from sparsekd.compression.methods import leave_out, shortgpt
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_layers, forms, mlp_parameters, num_parameters, skeleton
from sparsekd.models.forms import depth
from sparsekd.report import plots, tables

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gemma2"]
METHODS = {"shortgpt": {}, "leave-out": {"probe_tokens": 128}}


def tokens(count: int = 12) -> Tensor:
    return torch.randint(0, 60, (count, 16), generator=torch.Generator().manual_seed(1))


def built(architecture: str, num_layers: int = 4) -> PreTrainedModel:
    torch.manual_seed(0)
    return sharpened(made(architecture, num_hidden_layers=num_layers).eval())


def calibration(model: PreTrainedModel, **how: Any) -> Calibration:
    return Calibration(model, batches_of(tokens(), 4), **how)


def shorter(model: PreTrainedModel, *gone: int) -> PreTrainedModel:
    model = copy.deepcopy(model)
    depth.keep(model, [number for number in range(len(find_layers(model))) if number not in gone])
    return model


@torch.no_grad()
def kl(dense: Any, model: Any, text: Tensor) -> float:
    found, wanted = (one(text, use_cache=False).logits.double().log_softmax(-1) for one in (model, dense))
    return float(kl_div(found, wanted, log_target=True, reduction="sum") / text.numel())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_influence_is_that_of_the_hidden_states(architecture: str) -> None:
    model: Any = built(architecture)
    found = shortgpt.influences(calibration(model))
    last: list[Tensor] = []  # `hidden_states` has the final norm in place of what the last layer writes
    handle = find_layers(model)[-1].register_forward_hook(
        lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        hidden = model(tokens(), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    states = [*hidden[:-1], last[0]]
    expected = [1 - float(cosine_similarity(x, y, dim=-1).mean()) for x, y in itertools.pairwise(states)]
    assert list(found) == list(range(4)) and list(found.values()) == pytest.approx(expected, abs=1e-5)
    plan = cut(model, tokens(), section(method="shortgpt", reduction=0.5))
    (left,) = model.config.sparsekd["layers"].values()
    assert left["kept"] == sorted(sorted(range(4), key=expected.__getitem__)[2:])
    assert plan.layer_scores is not None and list(plan.layer_scores.values()) == list(found.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leaving_out_costs_the_kl_of_the_model_without_the_layer(architecture: str) -> None:
    dense = built(architecture)
    gone: list[int] = []
    losses: dict[int, float] = {}
    first: dict[int, float] = {}
    for _ in range(2):
        left = [number for number in range(4) if number not in gone]
        losses = {number: kl(dense, shorter(dense, *gone, number), tokens(8)) for number in left}
        first = first or losses
        gone.append(min(losses, key=losses.__getitem__))
    model: Any = copy.deepcopy(dense)
    plan = cut(model, tokens(), section(method="leave-out", reduction=0.5, probe_tokens=128))
    (left,) = model.config.sparsekd["layers"].values()
    assert left["kept"] == [number for number in range(4) if number not in gone]
    assert plan.layer_scores is not None
    assert list(plan.layer_scores.values()) == pytest.approx(list(first.values()), rel=1e-3, abs=1e-5)
    assert plan.measured_kl == pytest.approx(kl(dense, model, tokens(8)), rel=1e-3)
    assert plan.measured_kl == pytest.approx(min(losses.values()), rel=1e-3)


def test_of_two_layers_that_do_the_same_one_stays() -> None:
    """Without both, twice as much is missing as without one, which costs four times as much: only the second
    measurement sees it."""
    dense: Any = built("llama")
    with torch.no_grad():
        for layer in dense.model.layers:  # small changes, of which the KL is a square
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.mul_(0.02)
        dense.model.layers[2].load_state_dict(dense.model.layers[1].state_dict())
        dense.model.layers[3].mlp.down_proj.weight.zero_()
    start = calibration(dense).walk()
    whole = start.copy()
    for layer in whole.layers:
        whole.pass_through(layer)
    alone = leave_out.kl_without(start, whole, [0, 1, 2, 3])
    assert alone[3] == pytest.approx(0, abs=1e-6) and alone[1] == pytest.approx(alone[2], rel=0.1)
    after = leave_out.kl_without(start, whole, [0, 1, 3])
    assert after[1] == pytest.approx(4 * alone[1], rel=0.2)
    assert after[3] == pytest.approx(alone[2], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_is_gone(method: str, tokenizer: Any, tmp_path: Path) -> None:
    model = built("llama", 6)
    dense = num_parameters(model), mlp_parameters(model)
    for reduction, count in ((0.3, 2), (0.55, 3)):
        options = section(method=method, reduction=reduction, **METHODS[method])
        expected = plan_for(model, options)
        done = cut(model, tokens(), options)
        for plan in (expected, done):
            assert (plan.model_parameters_before, plan.mlp_parameters_before) == dense
            assert (plan.model_parameters_after, plan.mlp_parameters_after) == (
                num_parameters(model),
                mlp_parameters(model),
            )
            assert plan.mlp_reduction == pytest.approx(count / 6)
        sparsekd.save(model, tokenizer, tmp_path / str(count))
        again = plan_for(skeleton(str(tmp_path / str(count))), section(method=method, reduction=0.8, **METHODS[method]))
        assert (again.mlp_parameters_before, again.mlp_reduction) == (dense[1], pytest.approx(5 / 6))
        shown = done.as_dict()
        assert tables.left(shown) == "layers" and "removed" in plots.layers(shown)
        rows = tables.matrices(shown)
        assert sum(row[2] == "removed" and row[4] == "0" for row in rows) == 3 * (2 if count == 2 else 1)


@pytest.mark.parametrize(
    ("reduction", "count"), [(0.09, 1), (0.14, 1), (0.15, 2), (0.16, 2), (0.349, 3), (0.35, 4), (0.94, 9)]
)
def test_the_nearest_count_goes(reduction: float, count: int) -> None:
    plan = plan_for(built("gpt2", 10), section(method="shortgpt", reduction=reduction))
    assert plan.mlp_reduction == pytest.approx(count / 10)


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_named_and_changes_nothing(method: str) -> None:
    model: Any = built("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuses(error: type[Exception], says: str, blocks: Any = tokens(), one: Any = None, **options: Any) -> None:  # noqa: B008
        with pytest.raises(error, match=says):
            sparsekd.compress(
                one or model, blocks, **({"reduction": 0.5, "method": method} | METHODS[method] | options)
            )

    refuses(UsageError, "weighs inputs by text: no blocks were given", None)
    refuses(UsageError, "of which the model has 4 and one has to stay: 25.0% to 75.0% of the MLP", reduction=0.1)
    refuses(UsageError, "of which the model has 4 and one has to stay: 25.0% to 75.0% of the MLP", reduction=0.9)
    refuses(UsageError, "of which the model has 1 and one has to stay: nothing more can be", one=built("llama", 1))
    low_rank = sparsekd.compress(copy.deepcopy(model), reduction=0.2, method="svd")
    refuses(UsageError, "is lowrank already: prune the dense model instead", one=low_rank)
    kept = model.model.layers[1].mlp.up_proj.weight.clone()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 3e38
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    refuses(DataError, "makes of the text is not finite: the model's weights are damaged")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_(before["model.layers.1.mlp.down_proj.weight"])
        model.model.layers[1].mlp.up_proj.weight.copy_(kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_hidden_layers == 4 and forms.description_of(model) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_at_a_time_on_another_device(method: str) -> None:
    """The same choice, and every layer at home afterwards: `cpu:0` stands for a GPU."""
    model: Any = built("llama")
    plans = []
    for device in (None, torch.device("cpu", 0)):
        one = copy.deepcopy(model)
        away = layers_away(one)
        plans.append(cut(one, tokens(), section(method=method, reduction=0.5, **METHODS[method]), device=device))
        assert not away
    assert plans[0] == plans[1]


def _scores() -> list[float]:
    model = built("llama")
    text = calibration(model)
    start = text.walk()
    whole = start.copy()
    for layer in whole.layers:
        whole.pass_through(layer)
    return [
        *shortgpt.influences(text).values(),
        *leave_out.kl_without(start, whole, list(whole.layers)).values(),
    ]


def test_two_processes_find_what_one_does() -> None:
    first, second = in_two_processes(_scores)
    assert first == second == pytest.approx(_scores(), rel=1e-5, abs=1e-7)
    assert all(map(math.isfinite, first))
