"""The truncation: optimality against the Cholesky form, every architecture, and bad numbers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import cut, section
from elsewhere import in_two_processes
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import sparsekd
from sparsekd import convert, files, models, teacher
from sparsekd.compression import directions as lowrank
from sparsekd.compression import plan_for, statistics
from sparsekd.compression.calibration import batches_of
from sparsekd.compression.probe import Probe
from sparsekd.errors import DataError, UsageError
from sparsekd.models.anatomy import find_mlps, linear_weight
from sparsekd.models.forms._layers import CompressedLinear
from sparsekd.models.forms.lowrank import FORMATS, put
from sparsekd.teacher.cache import Targets

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]


class Everything:
    """A teacher that leaves next to nothing to the tail."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, block_id: int, tokens: Any) -> Targets:
        block = torch.from_numpy(tokens.astype("int64"))[None]
        return teacher.distributions(self.model, block, top_k=self.model.config.vocab_size - 1)[0]


MakeModel = Callable[..., PreTrainedModel]


def tokens(model: PreTrainedModel, count: int = 12, length: int = 32) -> torch.Tensor:
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
        (lowrank.from_output_gram(weight @ gram @ weight.T, full), lowrank.regularised(full)),
        (lowrank.from_input_gram(weight, gram, diagonal), torch.diag(lowrank.regularised(diagonal))),
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
        result = cut(model, blocks, section(reduction=0.4, method="two-sided", allocation=allocation))
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
@pytest.mark.parametrize("format", ["pivot", "lowrank"])
@pytest.mark.parametrize(
    ("method", "allocation"),
    [("whitened", "uniform"), ("svd", "uniform"), ("two-sided", "uniform"), ("two-sided", "global")],
)
def test_every_architecture(
    architecture: str, format: str, method: str, allocation: str, make_model: MakeModel
) -> None:
    model = make_model(architecture)
    blocks = tokens(model)
    attention = {
        name: value.clone() for name, value in model.state_dict().items() if "attn" in name or "attention" in name
    }
    dense = model(blocks).logits
    before = sum(parameter.numel() for parameter in model.parameters())
    options = {"method": method, "allocation": allocation, "format": format}
    result = cut(model, blocks, section(reduction=0.3, **options))
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
    cut(model, blocks, section(reduction=1e-9, method="whitened", format="pivot"))
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
        cut(model, blocks, section(reduction=0.5, method=method, format="lowrank"))
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
    result = cut(model, blocks, section(reduction=0.4, method="whitened", format="lowrank"))
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


@pytest.mark.parametrize(
    ("method", "where"), [("whitened", r"layers\.0\.mlp\.down_proj"), ("two-sided", "before decoder layer 0")]
)
def test_non_finite_activations_name_layer_and_blocks(method: str, where: str, make_model: MakeModel) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.inf
    blocks = tokens(model)
    blocks[blocks == 5] = 6
    blocks[3, 0] = 5
    with pytest.raises(DataError, match=rf"{where}.* not finite in blocks 2 to 3"):
        sparsekd.compress(model, blocks, method=method, batch_size=2)


def test_a_damaged_output_projection_is_named(make_model: MakeModel) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(DataError, match="the model's output is not finite: its weights are damaged"):
        statistics.collect(model, [tokens(model, 2, 16) % 7], curvature=True)


def test_a_weight_that_is_no_matrix_is_refused(make_model: MakeModel) -> None:
    """As packed weights of quantised layers are."""
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(1024, 1))
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj is \(1024, 1\).* expected .* \(64, 32\)"):
        sparsekd.compress(model, tokens(model))


def test_global_allocation_needs_curvature_or_the_probe(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="two-sided"):
        sparsekd.compress(make_model("llama"), None, method="svd", allocation="global")


def test_unknown_option_is_named(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="reducton"):
        sparsekd.compress(make_model("llama"), None, reducton=0.2)


# ---- formats


def full_rank_factors(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for mlp in find_mlps(model):
        for name in mlp.matrices:
            weight = linear_weight(model.get_submodule(name)).detach()
            rank = min(weight.shape)
            found[name] = lowrank.from_input_gram(weight, None).factors(weight, rank)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer_format", FORMATS)
def test_full_rank_leaves_the_logits_as_they_are(architecture: str, layer_format: str, make_model: MakeModel) -> None:
    model = make_model(architecture)
    blocks = tokens(model)
    dense = model(blocks).logits
    put(model, full_rank_factors(model), layer_format)
    assert any(isinstance(module, CompressedLinear) for module in model.modules())
    assert torch.allclose(model(blocks).logits, dense, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(blocks).logits, dense, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_formats_convert_without_loss(architecture: str, make_model: MakeModel) -> None:
    model = make_model(architecture)
    blocks = tokens(model)
    cut(model, blocks, section(reduction=0.3, method="two-sided", allocation="global", format="pivot"))
    logits = model(blocks).logits
    sizes = {}
    for layer_format in ("lowrank", "pivot"):
        convert(model, layer_format)
        assert models.forms.describe(model)["format"] == layer_format
        assert torch.allclose(model(blocks).logits, logits, atol=1e-5)
        sizes[layer_format] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["pivot"] < sizes["lowrank"]


def test_convert_refuses_a_dense_model_and_an_unknown_format(make_model: MakeModel) -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match="not compressed"):
        convert(model, "pivot")
    with pytest.raises(UsageError, match="zip"):
        convert(model, "zip")


def test_neurons_that_a_norm_tells_apart_are_not_renumbered(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.inner_norm = torch.nn.LayerNorm(64)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp.*lowrank"):
        cut(model, tokens(model), section(format="pivot"))
    cut(model, tokens(model), section(format="lowrank"))


def test_a_fused_matrix_whose_halves_interleave_is_not_renumbered(make_model: MakeModel) -> None:
    model = make_model("phi3")

    def interleaved(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up_proj(x)
        return self.down_proj(self.activation_fn(both[..., ::2]) * both[..., 1::2])

    for layer in model.model.layers:
        layer.mlp.forward = interleaved.__get__(layer.mlp)
    with pytest.raises(UsageError, match="lowrank"):
        cut(model, tokens(model), section(format="pivot"))


# ---- ranks


def test_svd_with_the_papers_tiers(make_model: MakeModel) -> None:
    model = make_model("llama", num_hidden_layers=8)
    result = cut(model, None, section(reduction=0.3, method="svd", allocation="energy"))
    assert 0.3 <= result.mlp_reduction < 0.32
    kept = [1 - matrix.relative_error for matrix in result.matrices]
    middle, outer = kept[6:18], kept[:6] + kept[18:]
    assert max(middle) < min(outer)
    # every middle matrix keeps the threshold, within what one direction carries
    assert max(middle) - min(middle) < 0.06


def test_ranks_in_multiples_and_a_cap(make_model: MakeModel) -> None:
    for allocation in ("uniform", "global"):
        options = section(reduction=0.4, method="two-sided", allocation=allocation, rank_multiple=8)
        result = cut(make_model("llama"), tokens(make_model("llama")), options)
        assert all(matrix.rank is None or matrix.rank % 8 == 0 for matrix in result.matrices)
        assert result.mlp_reduction >= 0.4
    options = section(reduction=0.3, method="two-sided", allocation="global", rank_cap=0.8)
    result = cut(make_model("llama"), tokens(make_model("llama")), options)
    assert max(matrix.rank or 32 for matrix in result.matrices) <= 25


def test_a_reduction_that_no_rank_reaches(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match="at most"):
        cut(make_model("llama"), None, section(reduction=0.95, method="svd", rank_multiple=16))


def test_ranks_of_an_earlier_plan(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    first = cut(model, tokens(model), section(reduction=0.4, method="two-sided", allocation="global"))
    files.write_json(tmp_path / "plan.json", first.as_dict())
    options = section(reduction=0.4, method="whitened", ranks_from=str(tmp_path / "plan.json"))
    second = cut(make_model("llama"), tokens(model), options)
    assert [matrix.rank for matrix in second.matrices] == [matrix.rank for matrix in first.matrices]
    other = make_model("llama", intermediate_size=96)
    with pytest.raises(DataError, match=r"another model: .*gate_proj is 96 x 32, there it is 64 x 32"):
        cut(other, tokens(other), options)
    deeper = make_model("llama", num_hidden_layers=1)
    with pytest.raises(DataError, match=r"this one has no .*layers\.1"):
        cut(deeper, tokens(deeper), options)


def test_too_few_tokens(make_model: MakeModel) -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match=r"32 dimensions from 31 tokens: expected at least 32, better 320"):
        cut(model, tokens(model)[:1, :31], section())
    with pytest.warns(UserWarning, match=r"32 dimensions from 319 tokens: at least 320"):
        cut(copy.deepcopy(model), tokens(model)[:10].flatten()[None, :319], section())
    heard: list[str] = []
    options = section(method="two-sided", allocation="global", probe_tokens=32, batch_size=1)
    cut(model, tokens(model), options, warn=heard.append)
    assert heard == []
    cut(make_model("llama"), tokens(model), options.by("two-sided", probe_tokens=96), warn=heard.append)
    assert len(heard) == 1 and "from 288 tokens" in heard[0]  # the probe's tokens do not count


# ---- the probe


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_measures_what_a_whole_pass_measures(architecture: str, make_model: MakeModel) -> None:
    """From the matrix's own layer on, and with the model as it was afterwards."""
    model = make_model(architecture)
    blocks = tokens(model)

    everything = Everything(model)
    probe = Probe(model, batches_of(blocks, 3), everything)
    log_p = model(blocks).logits[:, :-1].log_softmax(-1)
    assert abs(probe.of_all()) < 1e-6
    name = find_mlps(model)[1].output
    weight = linear_weight(model.get_submodule(name)).detach().clone()
    up, down = lowrank.from_input_gram(weight, None).factors(weight, 4)
    found = probe.of_one(name, (up, down))
    assert torch.equal(linear_weight(model.get_submodule(name)), weight)
    with torch.no_grad():
        linear_weight(model.get_submodule(name)).copy_(up @ down)
    log_q = model(blocks).logits[:, :-1].log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert found == pytest.approx(expected, rel=2e-2)
    assert probe.of_all() == pytest.approx(expected, rel=2e-2)


def test_curvature_predicts_what_the_probe_measures(make_model: MakeModel) -> None:
    """To second order: a cut of one matrix, many tokens, in a model whose MLPs are loud enough to be measured."""
    model = make_model("llama")
    with torch.no_grad():
        for mlp in find_mlps(model):
            for name in mlp.matrices:
                linear_weight(model.get_submodule(name)).mul_(8)
    blocks = tokens(model, 64, 64)
    options = section(reduction=0.1, method="two-sided", allocation="global", probe_tokens=1024, batch_size=8)

    everything = Everything(model)
    result = cut(model, blocks, options, teacher=everything)
    ratios = [m.probed_kl / m.predicted_at_probed_rank for m in result.matrices]
    assert all(0.5 < ratio < 2 for ratio in ratios)
    assert result.measured_kl is not None and result.predicted_kl is not None
    assert 0 < result.measured_kl < 10 * result.predicted_kl


def test_the_probes_tokens_are_not_those_of_the_statistics(make_model: MakeModel, monkeypatch: Any) -> None:
    model = make_model("llama")
    blocks, seen, probed = tokens(model), [], []
    collect = statistics.collect
    monkeypatch.setattr(
        statistics, "collect", lambda m, batches, **rest: seen.extend(batches) or collect(m, batches, **rest)
    )
    options = section(reduction=0.3, method="two-sided", allocation="global", probe_tokens=40, batch_size=2)

    class Watched(teacher.Online):
        def read(self, block_id: int, tokens: Any) -> Targets:
            probed.append((block_id, tokens.tolist()))
            return super().read(block_id, tokens)

    cut(model, blocks, options, teacher=Watched(model, 32))
    assert torch.equal(torch.cat(seen), blocks[:10])
    assert probed == [(number, blocks[number].tolist()) for number in range(10, len(blocks))]
    with pytest.raises(UsageError, match="probe_tokens is 999"):
        cut(make_model("llama"), blocks, section(probe_tokens=999))


def test_probe_makes_global_allocation_possible_for_every_method(make_model: MakeModel) -> None:
    model = make_model("llama")
    result = cut(
        model, tokens(model, 16), section(reduction=0.3, method="whitened", allocation="global", probe_tokens=64)
    )
    assert 0.3 <= result.mlp_reduction < 0.35
    assert len({matrix.rank for matrix in result.matrices}) > 2


# ---- rounds


def test_truncation_of_trained_factors_is_the_optimum_through_their_bottleneck(make_model: MakeModel) -> None:
    """compression.md 3.2: with W = A B, A = Q R and z = B x, the best rank-r change has the loss that the eigenvalues
    of R E[z z^T] R^T leave out."""
    torch.manual_seed(0)
    up, down = torch.randn(40, 20, dtype=torch.float64), torch.randn(20, 24, dtype=torch.float64)
    x = torch.randn(500, 24, dtype=torch.float64)
    projection = lowrank.from_input_gram(up @ down, x.T @ x / 500)
    z = x @ down.T
    r = torch.linalg.qr(up)[1]
    values = torch.linalg.eigvalsh(r @ (z.T @ z / 500) @ r.T).flip(0)
    assert len(projection.energy) == 20
    assert torch.allclose(projection.energy, values, rtol=1e-8)
    a, b = projection.factors(up @ down, 7)
    lost = ((x @ (up @ down - a @ b).T) ** 2).sum() / 500
    assert lost.item() == pytest.approx(values[7:].sum().item(), rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer_format", FORMATS)
def test_rounds_go_on_from_the_compressed_model(architecture: str, layer_format: str, make_model: MakeModel) -> None:
    model = make_model(architecture)
    blocks = tokens(model)
    dense = sum(parameter.numel() for parameter in model.parameters())
    before: list[int | None] = []
    for reduction in (0.2, 0.4, 0.6):
        options = section(reduction=reduction, method="two-sided", allocation="global", format=layer_format)
        result = cut(model, blocks, options)
        assert reduction <= result.mlp_reduction < reduction + 0.05
        assert result.model_parameters_before == dense
        assert result.model_parameters_after == sum(parameter.numel() for parameter in model.parameters())
        ranks = [matrix.rank for matrix in result.matrices]
        assert all(old is None or new <= old for old, new in zip(before, ranks, strict=False))
        before = ranks
    with pytest.raises(UsageError, match="removed already"):
        cut(model, blocks, section(reduction=0.6, format=layer_format))


# ---- packed documents


def test_packed_documents_count_as_if_each_were_alone(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_drawn", lambda logits, generator: logits.argmax(-1))  # the same labels
    model, separator = make_model("llama"), 5
    packed = tokens(model, 1, 32) % 50 + 6
    packed[0, [11, 31]] = separator
    alone = [packed[:, :12], packed[:, 12:]]
    expected = statistics.collect(model, alone, curvature=True)
    apart = statistics.collect(model, [packed], curvature=True, separator=separator)
    together = statistics.collect(model, [packed], curvature=True)
    for mlp, seen in expected.items():
        for a, b in zip(seen.grams(), apart[mlp].grams(), strict=True):
            assert torch.allclose(a.sum, b.sum, rtol=1e-4, atol=1e-5 * a.sum.abs().max().item())
    mlp = list(expected)[-1]
    assert not torch.allclose(expected[mlp].input.sum, together[mlp].input.sum, rtol=1e-2)
    norms = statistics.input_norms(model, alone)
    for name, norm in statistics.input_norms(model, [packed], separator=separator).items():
        assert torch.allclose(norms[name], norm, rtol=1e-4)
    assert Probe(model, batches_of(packed, 1), separator=separator).of_all() == pytest.approx(0, abs=1e-6)


# ---- several processes, other devices


def _gathered() -> tuple[list[torch.Tensor], list[int]]:
    model = _model_of_a_process()
    moments = statistics.collect(model, tokens(model, 10, 32).split(2), curvature=True, seed=3)
    grams = [gram for seen in moments.values() for gram in seen.grams()]
    return [gram.sum for gram in grams], [gram.num_tokens for gram in grams]


def test_two_processes_take_the_statistics_that_one_takes() -> None:
    (sums, counts), _ = in_two_processes(_gathered)
    alone, expected = _gathered()
    assert expected == counts
    for one, both in zip(alone, sums, strict=True):
        assert torch.allclose(one, both, rtol=1e-10, atol=1e-10 * both.abs().max().item())


@pytest.mark.parametrize("curvature", [False, True])
def test_statistics_a_layer_at_a_time_on_another_device(curvature: bool, make_model: MakeModel) -> None:
    """The same sums, and never two layers there: `cpu:0` stands for a GPU, the visits are the same."""
    model = make_model("llama")
    there: set[int] = set()
    most = 0

    def counted(self: torch.nn.Module, place: torch.device) -> torch.nn.Module:
        nonlocal most
        (there.add if place == torch.device("cpu", 0) else there.discard)(id(self))
        most = max(most, len(there))
        return self

    for layer in model.model.layers:
        layer.to = counted.__get__(layer)
    batches = tokens(model).split(2)
    expected = statistics.collect(model, batches, curvature=curvature)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = statistics.collect(model, batches, curvature=curvature, device=torch.device("cpu", 0))
    for mlp, seen in expected.items():
        for a, b in zip(seen.grams(), found[mlp].grams(), strict=True):
            assert torch.equal(a.sum, b.sum)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (most, there) == (1, set())


def _model_of_a_process() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_plan_needs_no_weights(make_model: MakeModel) -> None:
    model = make_model("llama")
    expected = plan_for(model, section(reduction=0.3))
    assert plan_for(model.to("meta"), section(reduction=0.3)) == expected


# ---- number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_solved_in_float32(dtype: torch.dtype, make_model: MakeModel) -> None:
    """Rounded once, when it is given back; in float16 the curvature's gradients would underflow besides."""
    half, whole = make_model("llama").to(dtype), make_model("llama").to(dtype).float()
    for reduction in (0.2, 0.4):
        for model in (half, whole):
            sparsekd.compress(model, tokens(model), reduction=reduction, method="two-sided", allocation="global")
        assert half.dtype == dtype and whole.dtype == torch.float32
        whole.to(dtype)
        for (name, found), expected in zip(half.named_parameters(), whole.parameters(), strict=True):
            assert found.dtype == dtype and torch.equal(found, expected), name
        whole.float()
