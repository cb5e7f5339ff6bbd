"""The compressed formats: known answers, parameter counts, and the choice of pivot rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.layers import FORMATS, LowRankLinear, PivotLinear, dominant_rows, num_weights, rank_for


def factors(out_features: int, in_features: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out_features, rank, generator=generator)
    return up, torch.randn(rank, in_features, generator=generator)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), [(24, 10), (10, 24), (12, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_computes_the_product_of_its_factors(name: str, out_features: int, in_features: int, bias: bool) -> None:
    up, down = factors(out_features, in_features, 6)
    offset = torch.randn(out_features) if bias else None
    layer = FORMATS[name].from_factors(up, down, offset)
    x = torch.randn(3, 5, in_features)
    expected = x @ (up @ down).T + (0 if offset is None else offset)
    assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_layer_has_the_weights_that_are_counted(name: str) -> None:
    up, down = factors(24, 10, 6)
    layer = FORMATS[name].from_factors(up, down)
    assert sum(parameter.numel() for parameter in layer.parameters()) == num_weights(10, 24, 6, name)


def test_full_rank_pivot_costs_exactly_the_dense_layer() -> None:
    assert num_weights(10, 24, 10, "pivot") == 240
    up, down = factors(24, 10, 10)
    x = torch.randn(4, 10)
    assert torch.allclose(PivotLinear.from_factors(up, down)(x), x @ (up @ down).T, atol=1e-4)


def test_state_dict_round_trip_keeps_the_pivot_order() -> None:
    up, down = factors(24, 10, 6)
    layer = PivotLinear.from_factors(up, down)
    other = PivotLinear(10, 24, 6)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 10)
    assert torch.equal(layer(x), other(x))


def test_both_formats_train() -> None:
    up, down = factors(24, 10, 6)
    x = torch.randn(16, 10)
    for layer in (LowRankLinear.from_factors(up, down), PivotLinear.from_factors(up, down)):
        layer(x).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


@given(st.integers(2, 40), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_dominant_rows_span_the_others_with_small_coefficients(extra: int, rank: int, seed: int) -> None:
    matrix = torch.randn(rank + extra, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chosen, coefficients = dominant_rows(matrix, tolerance=1.05)
    others = [row for row in range(len(matrix)) if row not in set(chosen.tolist())]
    reordered = matrix[chosen.tolist() + others]
    assert float(coefficients.abs().max()) <= 1.05 + 1e-9
    assert torch.allclose(coefficients @ matrix[chosen], reordered, atol=1e-8)


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
