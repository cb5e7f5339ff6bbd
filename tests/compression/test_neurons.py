"""Neurons taken out and made up for: the formulas on small matrices, then whole models."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from elsewhere import in_two_processes, layers_away
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsekd
from sparsekd.compression import Batch, Calibration, batches_of, narrowing
from sparsekd.compression.removal import refitted, removal
from sparsekd.compression.walk import Walk
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_mlps, forms, shape

ARCHITECTURES = [
    "bloom",
    "cohere2",
    "falcon",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mpt",
    "nemotron",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
    "starcoder2",
]


def tokens(count: int = 48) -> Tensor:
    return torch.randint(0, 300, (count, 32), generator=torch.Generator().manual_seed(1))


def mlp(neurons: int = 10, hidden: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """The output matrix of an MLP, the second moment of its neurons, and a curvature."""
    made = torch.Generator().manual_seed(0)
    gate, up, inputs = (
        torch.randn(*size, generator=made).double() for size in ((neurons, hidden), (neurons, hidden), (400, hidden))
    )
    values = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
    gradients = torch.randn(50, hidden, generator=made).double()
    weight = torch.randn(hidden, neurons, generator=made).double()
    return weight, values.T @ values / len(values), gradients.T @ gradients / len(gradients)


def loss_of(weight: Tensor, gram: Tensor, metric: Tensor, kept: list[int], ridge: float = 1e-3) -> float:
    """Half of `tr(G D C D^T)` for the change D that is left when the kept neurons are fitted as well as can be."""
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    change = weight.clone()
    if kept:
        change[:, kept] -= weight @ damped[:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    return float(0.5 * torch.trace(metric @ change @ damped @ change.T))


def test_the_loss_of_every_width_is_the_formula_s_and_close_to_the_best_set_s() -> None:
    weight, gram, metric = mlp()
    found = removal(weight, gram, metric)
    assert found.losses[0] == 0 and (found.losses.diff() > 0).all()
    greedy = best = 0.0
    for gone in range(1, len(gram)):
        kept = found.kept(len(gram) - gone).tolist()
        exact = loss_of(weight, gram, metric, kept)
        assert float(found.losses[gone]) == pytest.approx(exact, rel=1e-8)
        sets = itertools.combinations(range(len(gram)), len(gram) - gone)
        greedy, best = exact, min(loss_of(weight, gram, metric, list(one)) for one in sets)
        assert greedy <= 1.05 * best


def test_several_neurons_at_a_time_cost_what_the_formula_says() -> None:
    weight, gram, metric = mlp(neurons=300, hidden=20)  # four in a step
    found = removal(weight, gram, metric)
    for gone in (4, 100, 200):
        assert float(found.losses[gone]) == pytest.approx(
            loss_of(weight, gram, metric, found.kept(300 - gone).tolist()), rel=1e-8
        )


def test_no_other_columns_fit_better() -> None:
    weight, gram, _ = mlp()
    kept = torch.tensor([1, 3, 4, 8])
    columns = refitted(weight @ gram[:, kept], gram[kept][:, kept], weight[:, kept], ridge=0.0).requires_grad_()
    change = weight.index_add(1, kept, -columns)
    torch.trace(change @ gram @ change.T).backward()
    assert columns.grad is not None
    assert columns.grad.abs().max() < 1e-8


def test_what_is_kept_whole_stays_as_it_is(make_model: Any) -> None:
    for architecture in ("llama", "gpt2"):  # without and with biases
        model = make_model(architecture)
        mlps = find_mlps(model)
        kept = {one: torch.arange(shape(model.get_submodule(one.output))[0]) for one in mlps}
        walk = Calibration(model, batches_of(tokens(), 4)).walk()
        outputs, biases = narrowing.compensated(model, kept, walk)
        for one in mlps:
            old = sparsekd.models.linear_weight(model.get_submodule(one.output))
            assert torch.allclose(outputs[one], old, atol=1e-6)
            if one in biases:
                assert torch.allclose(biases[one], model.get_submodule(one.output).bias, atol=1e-6)


def test_a_bias_takes_up_the_mean_of_what_is_gone(make_model: Any) -> None:
    model = make_model("gpt2").double()
    dense, calibration = copy.deepcopy(model), Calibration(model, batches_of(tokens(), 4))
    mlps = find_mlps(model)
    kept = {one: torch.arange(0, shape(model.get_submodule(one.output))[0], 2) for one in mlps}
    outputs, biases = narrowing.compensated(model, kept, calibration.walk())
    first = mlps[0]
    values = torch.cat([neurons for neurons, _ in Walk(dense, [tokens()]).look(0)]).double()
    weights = narrowing.weights_of(values)[:, 0] ** 2
    before = values @ sparsekd.models.linear_weight(dense.get_submodule(first.output)).T
    after = values[:, kept[first]] @ outputs[first].T + biases[first] - dense.get_submodule(first.output).bias
    mean = ((after - before) * weights[:, None]).sum(0) / weights.sum()
    assert mean.abs().max() < 1e-3 * before.abs().mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    model = architectures.made(architecture)
    widest = max(shape(model.get_submodule(one.output))[0] for one in find_mlps(model))
    text = torch.randint(0, 64, (-(-10 * widest // 32), 32), generator=torch.Generator().manual_seed(1))
    before = sum(p.numel() for p in model.parameters())
    sparsekd.compress(model, text, reduction=0.3, method="neurons", multiple=2)
    description = forms.description_of(model)
    assert description is not None and description.form == "width"
    assert sum(p.numel() for p in model.parameters()) <= before - 0.3 * description.dense.mlp
    with torch.no_grad():
        assert torch.isfinite(model(text[:2], use_cache=False).logits).all()


def test_where_a_norm_follows_the_mlp_the_residual_stream_is_left_alone(make_model: Any) -> None:
    def adds(model: Any) -> bool:
        return Walk(model, [tokens(4) % 64]).adds_its_mlp(0)

    assert adds(make_model("llama")) and adds(make_model("gpt_neox")) and adds(make_model("gpt2"))
    assert not adds(architectures.made("gemma2"))


def test_a_few_positions_too_large_to_add_to_do_not_hide_it(make_model: Any) -> None:
    """Trained models have them, SmolLM2 at a text's first token: there a small change is rounded away."""
    model = make_model("llama")
    text = tokens(4) % 64
    with torch.no_grad():
        model.get_input_embeddings().weight[text[0, :2].unique()] *= 1e9
    assert Walk(model, [text]).adds_its_mlp(0)


def test_one_width_opens_without_sparsekd(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = sparsekd.compress(
        make_model("llama"), tokens(), reduction=0.4, method="neurons", allocation="uniform", multiple=4
    )
    assert len({layer["neurons"] for layer in forms.description_of(model).layers.values()}) == 1  # type: ignore[union-attr]
    sparsekd.save(model, tokenizer, tmp_path / "model")
    script = (
        "import sys, torch; sys.modules['sparsekd'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        "with torch.no_grad(): print(model(torch.arange(20)[None]).logits.double().sum().item())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(found.stdout) == pytest.approx(
            float(model(torch.arange(20)[None]).logits.double().sum()), rel=1e-6
        )


def test_the_global_budget_is_predicted_to_cost_no_more_than_one_width(make_model: Any) -> None:
    from cutting import cut, section

    losses = {}
    for allocation in ("global", "uniform"):
        plan = cut(
            make_model("llama"),
            tokens(),
            section(method="neurons", reduction=0.4, allocation=allocation, multiple=4),
        )
        assert plan.mlp_reduction >= 0.4 and plan.predicted_kl_by_allocation is not None
        assert plan.predicted_kl == plan.predicted_kl_by_allocation[allocation]
        losses[allocation] = plan.predicted_kl
    assert losses["global"] <= losses["uniform"]


def test_a_layer_at_a_time_on_another_device(make_model: Any) -> None:
    """The same choice and fit, and every layer at home afterwards: `cpu:0` stands for a GPU."""
    model = make_model("llama")
    away = layers_away(model)
    made = []
    for device in (None, torch.device("cpu", 0)):
        calibration = Calibration(model, batches_of(tokens(), 4), device=device)
        removals = narrowing.removals_of(model, calibration)
        kept = {one: found.kept(20) for one, found in removals.items()}
        made.append(list(narrowing.compensated(model, kept, calibration.walk())[0].values()))
        assert not away
    assert all(torch.equal(here, there) for here, there in zip(*made, strict=True))


def test_two_walks_of_a_layer_keep_each_its_own_neurons(make_model: Any) -> None:
    model = make_model("llama")
    first = Walk(model, tokens(8).split(2))
    second = first.copy()
    second.hidden = [2 * hidden for hidden in second.hidden]
    alone = [[neurons for neurons, _ in walk.look(0)] for walk in (first, second)]
    for (one, _), (other, _), *expected in zip(first.look(0), second.look(0), *alone, strict=True):
        assert torch.equal(one, expected[0]) and torch.equal(other, expected[1])


def _made(model: PreTrainedModel) -> list[Tensor]:
    calibration = Calibration(model, [Batch(range(2), part) for part in tokens(50).split(2)], seed=3)
    removals = narrowing.removals_of(model, calibration)
    kept = {one: found.kept(20) for one, found in removals.items()}
    outputs, _ = narrowing.compensated(model, kept, calibration.walk())
    return [value for one, found in removals.items() for value in (found.losses, outputs[one])]


def _model_of_a_process() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).eval()


def _made_in_a_process() -> list[Tensor]:
    return _made(_model_of_a_process())


def test_two_processes_choose_and_fit_what_one_does() -> None:
    first, second = in_two_processes(_made_in_a_process)
    for alone, one, other in zip(_made_in_a_process(), first, second, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(alone, one, rtol=1e-10, atol=1e-10 * float(one.abs().max()))


def test_bad_input_is_named_and_changes_nothing(make_model: Any) -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuses(error: type[Exception], says: str, **options: Any) -> None:
        with pytest.raises(error, match=says):
            sparsekd.compress(model, **({"blocks": tokens()} | options), method="neurons", reduction=0.3)  # type: ignore[arg-type]

    refuses(UsageError, "weighs inputs by text: no blocks were given", blocks=None)
    refuses(UsageError, "statistics of 64 dimensions from 32 tokens: expected at least 64", blocks=tokens(1))
    refuses(UsageError, "kept in multiples of 128, but no MLP has more than 64", multiple=128)
    with torch.no_grad():
        kept = model.model.layers[1].mlp.up_proj.weight.clone()
        model.model.layers[1].mlp.up_proj.weight.zero_()
    refuses(DataError, "the neurons that model.layers.1.mlp.down_proj reads are zero on all of the text", multiple=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
