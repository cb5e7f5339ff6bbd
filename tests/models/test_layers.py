"""The compressed formats: known answers, parameter counts, and the choice of pivots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import sparsekd
from sparsekd import compression
from sparsekd.models.forms._layers import ColumnPivotLinear, LowRankLinear, RowPivotLinear
from sparsekd.models.forms._pivots import common_pivots
from sparsekd.models.forms.lowrank import FORMATS, make_layer, num_weights, rank_for

LAYERS = {"lowrank": LowRankLinear, "pivot rows": RowPivotLinear, "pivot columns": ColumnPivotLinear}


def factors(out_features: int, in_features: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out_features, rank, generator=generator)
    return up, torch.randn(rank, in_features, generator=generator)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("out_features", "in_features"), [(24, 10), (10, 24), (12, 12)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_layer_computes_the_product_of_its_factors(
    name: str, out_features: int, in_features: int, bias: bool, grad: bool
) -> None:
    up, down = factors(out_features, in_features, 6)
    offset = torch.randn(out_features) if bias else None
    layer = make_layer(LAYERS[name].kind, up, down, offset)
    x = torch.randn(3, 5, in_features)
    expected = x @ (up @ down).T + (0 if offset is None else offset)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    assert y.shape == (3, 5, out_features)
    assert torch.allclose(y, expected, atol=2e-4)
    again_up, again_down = layer.factors()
    assert torch.allclose(again_up @ again_down, up @ down, atol=2e-4)


@pytest.mark.parametrize("layer_format", FORMATS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_off_loaded_weights_are_fetched(
    where: str, architecture: str, layer_format: str, make_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """accelerate keeps them on the meta device between two calls of a layer, where numbers are not."""
    model: Any = compression.compress(make_model(architecture), reduction=0.4, method="svd", format=layer_format)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        if where == "cpu":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert torch.equal(model(tokens).logits, expected)


def test_hooks_on_the_inner_layers_see_their_calls() -> None:
    layer = make_layer("row-pivot", *factors(24, 10, 6))
    seen = []
    for part in (layer.pivots, layer.rest):
        part.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        layer(torch.randn(3, 10))
    assert seen == [layer.pivots, layer.rest]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_has_the_weights_that_are_counted(name: str) -> None:
    layer = make_layer(LAYERS[name].kind, *factors(24, 10, 6))
    assert sum(parameter.numel() for parameter in layer.parameters()) == num_weights(10, 24, 6, name.split()[0])


@pytest.mark.parametrize(("name", "shape"), [("pivot rows", (24, 10)), ("pivot columns", (10, 24))])
def test_full_rank_pivot_costs_exactly_the_dense_layer(name: str, shape: tuple[int, int]) -> None:
    assert num_weights(10, 24, 10, "pivot") == 240
    up, down = factors(*shape, 10)
    x = torch.randn(4, shape[1])
    assert torch.allclose(make_layer(LAYERS[name].kind, up, down)(x), x @ (up @ down).T, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train(name: str) -> None:
    layer = make_layer(LAYERS[name].kind, *factors(24, 10, 6))
    layer(torch.randn(16, 10)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_pivot_rows_can_be_compiled_away_from_the_writing_in_place() -> None:
    """torch.export traces the layer: what it makes computes the same."""
    layer = make_layer("row-pivot", *factors(24, 10, 6))
    x = torch.randn(3, 10)
    exported = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), layer(x), atol=1e-5)


def test_an_adapter_around_a_part_is_not_passed_by() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = make_layer("row-pivot", *factors(24, 10, 6))
    plain = layer.rest
    layer.rest = Doubled(6, 18, bias=False)
    layer.rest.weight = plain.weight
    with torch.no_grad():
        x = torch.randn(3, 10)
        changed = layer(x)
        layer.rest = plain
        assert torch.allclose(changed[:, 6:], 2 * layer(x)[:, 6:], atol=1e-5)


def degenerate(kind: str, rows: int, columns: int) -> torch.Tensor:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return {
        "zero": torch.zeros(rows, columns),
        "rank one": torch.outer(matrix[:, 0], matrix[0]),
        "one number": torch.zeros(rows, columns).index_put_((torch.tensor(-1), torch.tensor(-1)), torch.tensor(1.0)),
        "half empty": matrix * (torch.arange(rows) >= rows // 2)[:, None] * (torch.arange(columns) >= columns // 2),
    }[kind]


@pytest.mark.parametrize("which", ["all", "gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["zero", "rank one", "one number", "half empty"])
@pytest.mark.parametrize("method", ["whitened", "two-sided", "svd"])
def test_pivots_of_matrices_without_full_rank_are_exact(
    method: str, kind: str, which: str, make_model: Callable[[str], PreTrainedModel]
) -> None:
    """What the truncation loses is in both formats; the pivots, which such matrices lack, add nothing to it."""
    tokens = torch.randint(0, 300, (20, 32), generator=torch.Generator().manual_seed(0))
    model: Any = make_model("llama")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj") and ".mlp." in name and which in ("all", name.rpartition(".")[2]):
                module.weight.copy_(degenerate(kind, *module.weight.shape))
    compression.compress(model, tokens, method=method, format="lowrank", reduction=0.4)
    with torch.no_grad():
        expected = model(tokens).logits
        found = sparsekd.convert(model, "pivot")(tokens).logits
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert max(float(parameter.detach().abs().max()) for parameter in model.parameters()) < 1e3


@given(st.integers(10, 60), st.lists(st.integers(1, 10), min_size=1, max_size=3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_common_pivots_suit_all_matrices(rows: int, ranks: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(rows, rank, generator=generator, dtype=torch.float64) for rank in ranks]
    order = common_pivots(matrices)
    assert sorted(order.tolist()) == list(range(rows))
    for matrix in matrices:
        rank = matrix.shape[1]
        coefficients = torch.linalg.solve(matrix[order[:rank]], matrix[order[rank:]], left=False)
        assert coefficients.numel() == 0 or float(coefficients.abs().max()) < 50


def test_pivots_of_one_matrix_have_small_coefficients() -> None:
    matrix = torch.randn(300, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = common_pivots([matrix])
    coefficients = torch.linalg.solve(matrix[order[:100]], matrix[order[100:]], left=False)
    assert float(coefficients.abs().max()) < 2.5


@given(
    st.integers(2, 300),
    st.integers(2, 300),
    st.floats(0.01, 0.95),
    st.sampled_from(sorted(FORMATS)),
)
def test_rank_is_the_largest_within_the_budget(inputs: int, outputs: int, reduction: float, name: str) -> None:
    budget = (1 - reduction) * inputs * outputs
    rank = rank_for(inputs, outputs, budget, name)
    assert 1 <= rank <= min(inputs, outputs)
    assert rank == 1 or num_weights(inputs, outputs, rank, name) <= budget + 1e-6 * inputs * outputs
    if rank < min(inputs, outputs):
        assert num_weights(inputs, outputs, rank + 1, name) > budget - 1e-6 * inputs * outputs


def test_pivot_keeps_more_ranks_for_the_same_weights() -> None:
    # compression.md section 3.3: SmolLM2-135M at 15 %
    assert rank_for(576, 1536, 0.85 * 576 * 1536, "lowrank") == 356
    assert rank_for(576, 1536, 0.85 * 576 * 1536, "pivot") == 453
