"""The truncation: optimality against the Cholesky form, every architecture, and bad numbers."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import sparsekd
from sparsekd.compression import lowrank, plan, statistics, truncate
from sparsekd.errors import DataError, UsageError
from sparsekd.models import find_mlps

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]
MakeModel = Callable[[str], PreTrainedModel]


def tokens(model: PreTrainedModel, count: int = 8, length: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (count, length), generator=generator)


@pytest.mark.parametrize("rank", [3, 10, 20])
def test_whitened_is_the_optimum_that_the_cholesky_form_finds(rank: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 24, dtype=torch.float64) * torch.logspace(0, -3, 24, dtype=torch.float64)
    weight, gram = torch.randn(40, 24, dtype=torch.float64), x.T @ x / 500
    projection = lowrank.from_input_gram(weight, gram)
    up, down = projection.factors(weight, rank)
    lost = ((x @ (weight - up @ down).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()

    factor = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ factor)
    best = u[:, :rank] * s[:rank] @ v[:rank] @ torch.linalg.inv(factor)
    optimum = ((x @ (weight - best).T) ** 2).sum() / ((x @ weight.T) ** 2).sum()
    assert lost.item() == pytest.approx(optimum.item(), rel=1e-6)
    assert projection.relative_error(rank) == pytest.approx(lost.item(), rel=1e-6)


def test_output_gram_finds_the_same_as_the_input_gram() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(500, 40, dtype=torch.float64), torch.randn(16, 40, dtype=torch.float64)
    y = x @ weight.T
    by_output = lowrank.from_output_gram(y.T @ y / 500)
    by_input = lowrank.from_input_gram(weight, x.T @ x / 500)
    products = [torch.matmul(*projection.factors(weight, 5)) for projection in (by_output, by_input)]
    assert torch.allclose(*products, atol=1e-8)


def test_two_sided_is_the_optimum_in_the_metric_of_the_curvature() -> None:
    """Against the textbook form with explicit square roots, for a full and for a diagonal curvature."""
    torch.manual_seed(0)
    weight, x = torch.randn(12, 30, dtype=torch.float64), torch.randn(400, 30, dtype=torch.float64)
    g = torch.randn(400, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    gram, full = x.T @ x / 400, g.T @ g / 400
    diagonal = full.diagonal().clone()
    cases = [
        (lowrank.from_output_gram(weight @ gram @ weight.T, full), lowrank._regularised(full)),
        (lowrank.from_input_gram(weight, gram, diagonal), torch.diag(lowrank._regularised(diagonal))),
    ]
    for projection, metric in cases:
        up, down = projection.factors(weight, 4)
        change = weight - up @ down
        lost = torch.trace(change.T @ metric @ change @ gram)
        roots = [v * w.sqrt() @ v.T for w, v in map(torch.linalg.eigh, (metric, gram))]
        singular = torch.linalg.svdvals(roots[0] @ weight @ roots[1])
        assert lost.item() == pytest.approx(float(singular[4:].square().sum()), rel=1e-6)
        assert float(projection.energy[4:].sum()) == pytest.approx(lost.item(), rel=1e-6)


def test_curvature_is_the_fisher_matrix_of_the_output(make_model: MakeModel) -> None:
    """After the last layer it can be worked out: J^T (diag p - p p^T) J with J from the norm and the output weight."""
    torch.manual_seed(0)
    model = make_model("gpt_neox")
    blocks = tokens(model, 256, 32)
    mlp = find_mlps(model)[-1]
    found = statistics.collect(model, blocks.split(8), curvature=True)[mlp].output_curvature
    assert found.num_tokens == 256 * 32
    rows: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        rows.append(output.detach())

    handle = model.gpt_neox.layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        model(blocks)
    handle.remove()
    final = rows[0].flatten(0, 1)
    expected = torch.zeros(32, 32)
    head = model.get_output_embeddings()
    for row in final[::61]:
        jacobian = torch.autograd.functional.jacobian(lambda y: head(model.gpt_neox.final_layer_norm(y)), row)
        p = head(model.gpt_neox.final_layer_norm(row)).softmax(-1).detach()
        expected += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(final[::61])
    assert float((found.mean().float() - expected).norm() / expected.norm()) < 0.2  # sampling noise of 8,192 labels


def test_global_allocation_beats_uniform_where_matrices_differ(make_model: MakeModel) -> None:
    lost = {}
    for allocation in ("uniform", "global"):
        model = make_model("llama")
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(0.01)  # this layer's MLP hardly matters
            model.model.layers[1].mlp.down_proj.weight.mul_(20)
        blocks = tokens(model)
        dense = model(blocks).logits
        result = truncate(model, blocks, reduction=0.4, method="two-sided", allocation=allocation)
        lost[allocation] = (model(blocks).logits - dense).norm().item()
        assert 0.4 <= result.mlp_reduction < 0.45
    assert lost["global"] < 0.7 * lost["uniform"]


def test_svd_is_the_truncated_svd_of_the_weight() -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(30, 12), torch.randn(12, 30)):
        up, down = lowrank.from_input_gram(weight, None).factors(weight, 4)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        assert torch.allclose(up @ down, u[:, :4] * s[:4] @ v[:4], atol=1e-4)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(30, 12),
        torch.ones(30, 12),  # rank 1
        torch.randn(30, 12, generator=torch.Generator().manual_seed(0)) * 1e18,
        torch.randn(30, 12, generator=torch.Generator().manual_seed(0)) * 1e-20,
        torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.randn(12, 30, generator=torch.Generator().manual_seed(0)).T,  # not contiguous
    ],
    ids=["zero", "rank one", "huge", "tiny", "bf16", "strided"],
)
def test_awkward_weights_give_finite_factors(weight: torch.Tensor) -> None:
    gram = torch.zeros(12, 12, dtype=torch.float64)
    gram[:5, :5] = torch.eye(5, dtype=torch.float64)  # rank deficient statistics
    for statistics_gram in (None, gram):
        up, down = lowrank.from_input_gram(weight, statistics_gram).factors(weight, 6)
        assert torch.isfinite(up).all()
        assert torch.isfinite(down).all()


def test_factors_are_balanced() -> None:
    weight = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    up, down = lowrank.from_input_gram(weight, None).factors(weight, 6)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer_format", ["pivot", "lowrank"])
@pytest.mark.parametrize(
    ("method", "allocation"),
    [("whitened", "uniform"), ("svd", "uniform"), ("two-sided", "uniform"), ("two-sided", "global")],
)
def test_every_architecture(
    architecture: str, layer_format: str, method: str, allocation: str, make_model: MakeModel
) -> None:
    model = make_model(architecture)
    blocks = tokens(model)
    attention = {
        name: value.clone() for name, value in model.state_dict().items() if "attn" in name or "attention" in name
    }
    dense = model(blocks).logits
    before = sum(parameter.numel() for parameter in model.parameters())
    options = {"method": method, "allocation": allocation, "layer_format": layer_format}
    result = truncate(model, blocks, reduction=0.3, **options)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (before, after) == (result.model_parameters_before, result.model_parameters_after)
    assert result.mlp_reduction >= 0.3
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in attention.items())
    assert attention
    change = ((model(blocks).logits - dense).norm() / dense.norm()).item()
    assert 1e-4 < change < 0.7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_rank_pivot_model_computes_what_the_dense_one_does(architecture: str, make_model: MakeModel) -> None:
    model = make_model(architecture)
    blocks = tokens(model)
    dense = model(blocks).logits
    truncate(model, blocks, reduction=1e-9, method="whitened", layer_format="pivot")
    # all but the last direction at most is kept, so what is left of the difference is rounding and one direction
    assert ((model(blocks).logits - dense).norm() / dense.norm()).item() < 0.05


def test_whitened_hurts_less_than_svd_where_inputs_are_uneven(make_model: MakeModel) -> None:
    lost = {}
    for method in ("whitened", "svd"):
        model = make_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.copy_(torch.logspace(1, -1, 32))
        blocks = tokens(model)
        dense = model(blocks).logits
        truncate(model, blocks, reduction=0.5, method=method, layer_format="lowrank")
        lost[method] = (model(blocks).logits - dense).norm().item()
    assert lost["whitened"] < 0.8 * lost["svd"]


def test_predicted_error_of_the_first_matrix_is_the_measured_one(make_model: MakeModel) -> None:
    model = make_model("llama")
    blocks = tokens(model)
    seen: list[torch.Tensor] = []
    name = find_mlps(model)[0].inputs[0]
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(blocks)
    handle.remove()
    weight = model.get_submodule(name).weight.detach().clone()
    result = truncate(model, blocks, reduction=0.4, method="whitened", layer_format="lowrank")
    layer = model.get_submodule(name)
    x = seen[0].flatten(0, 1)
    measured = (layer(x) - x @ weight.T).square().sum() / (x @ weight.T).square().sum()
    assert result.matrices[0].relative_error == pytest.approx(measured.item(), rel=1e-3)


def test_one_outlier_token_does_not_own_the_statistics() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    x[0] = 1e4
    gram = statistics.Gram(8)
    gram.add(x)
    share = torch.linalg.eigvalsh(gram.mean())[-1] / gram.mean().trace()
    assert float(share) < 0.3


def test_same_input_gives_the_same_bytes(make_model: MakeModel) -> None:
    states = []
    for _ in range(2):
        model = make_model("llama")
        sparsekd.compress(model, tokens(model), reduction=0.3)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("reduction", [0.0, -0.1, 0.96, 1.0, float("nan")])
def test_reduction_out_of_range(reduction: float, make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="reduction"):
        sparsekd.compress(make_model("llama"), None, reduction=reduction, method="svd")


def test_non_finite_weight_is_named_and_the_model_unchanged(make_model: MakeModel) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        sparsekd.compress(model, tokens(model))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_non_finite_activations_are_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1)
        model.model.embed_tokens.weight[5] = torch.inf
    blocks = tokens(model)
    blocks[0, 0] = 5
    with pytest.raises(DataError, match="not finite"):
        sparsekd.compress(model, blocks)


def test_global_allocation_needs_curvature(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="two-sided"):
        sparsekd.compress(make_model("llama"), None, method="svd", allocation="global")


def test_compressing_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    sparsekd.compress(model, tokens(model))
    with pytest.raises(UsageError, match="already"):
        sparsekd.compress(model, tokens(model))


def test_plan_needs_no_weights(make_model: MakeModel) -> None:
    model = make_model("llama")
    expected = plan(model, 0.3, "pivot")
    assert plan(model.to("meta"), 0.3, "pivot") == expected
