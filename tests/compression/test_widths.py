"""The plan of form `width`: the largest width that removes enough, in parameters that the model then has."""

from typing import Any

import pytest
import torch
from architectures import made
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowing import chosen, narrow

from sparsekd import compression, models
from sparsekd.compression import widths
from sparsekd.errors import UsageError
from sparsekd.models import find_mlps, forms, num_parameters

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"]


def mlp_parameters(model: Any) -> int:
    return sum(num_parameters(model.get_submodule(name)) for mlp in find_mlps(model) for name in mlp.matrices)


def neurons(planned: compression.Plan) -> list[int]:
    """Of each MLP once."""
    return list({line.name.rpartition(".")[0]: line.neurons or 0 for line in planned.matrices}.values())


def cut(model: Any, planned: compression.Plan) -> None:
    narrow(model, chosen(model, *neurons(planned)), planned.reduction)


@pytest.mark.parametrize("reduction", [0.1, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plan_is_what_the_model_then_has(architecture: str, reduction: float, make_model: Any) -> None:
    model = make_model(architecture)
    with torch.device("meta"):
        assert widths.uniform(make_model(architecture), reduction, 1, "x") == widths.uniform(model, reduction, 1, "x")
    planned = widths.uniform(model, reduction, 1, "x")
    assert (planned.mlp_parameters_before, planned.model_parameters_before) == (
        mlp_parameters(model),
        num_parameters(model),
    )
    assert planned.mlp_reduction >= reduction
    width = neurons(planned)[0]
    wider = widths.plan_of(planned, {mlp.output.rpartition(".")[0]: width + 1 for mlp in find_mlps(model)})
    assert wider.mlp_reduction < reduction
    cut(model, planned)
    assert (planned.mlp_parameters_after, planned.model_parameters_after) == (
        mlp_parameters(model),
        num_parameters(model),
    )
    assert planned.model_parameters_stored == num_parameters(model)
    for line in planned.matrices:
        assert line.parameters_after == num_parameters(model.get_submodule(line.name))
        assert (line.rank, line.zeros) == (None, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_widths_by_layer_are_counted_alike(architecture: str, make_model: Any) -> None:
    model = make_model(architecture)
    planned = widths.uniform(model, 0.4, 1, "x")
    names = [mlp.output.rpartition(".")[0] for mlp in find_mlps(model)]
    other = widths.plan_of(planned, dict(zip(names, (20, 50), strict=True)))
    assert neurons(other) == [20, 50] and neurons(planned) != [20, 50]
    cut(model, other)
    assert [line.parameters_after for line in other.matrices] == [
        num_parameters(model.get_submodule(line.name)) for line in other.matrices
    ]
    assert other.mlp_parameters_before == planned.mlp_parameters_before


@pytest.mark.parametrize("first", [(40,), (40, 50)], ids=["one width", "widths by layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_further_cut_counts_from_the_dense_model(architecture: str, first: Any, make_model: Any) -> None:
    dense, model = make_model(architecture), make_model(architecture)
    narrow(model, chosen(model, *first), reduction=0.2)
    expected, planned = widths.uniform(dense, 0.75, 1, "x"), widths.uniform(model, 0.75, 1, "x")
    assert [line.parameters_before for line in planned.matrices] == [
        line.parameters_before for line in expected.matrices
    ]
    assert neurons(planned) == neurons(expected)
    assert planned.model_parameters_before == expected.model_parameters_before
    shape = models.shape(model.get_submodule(planned.matrices[0].name))
    assert (planned.matrices[0].in_features, planned.matrices[0].out_features) == shape
    cut(model, planned)
    assert planned.model_parameters_after == num_parameters(model)
    assert forms.dense_sizes(model) == forms.dense_sizes(dense)


def test_an_mlp_that_is_narrower_already_stays_as_it_is(make_model: Any) -> None:
    model = make_model("llama")
    narrow(model, chosen(model, 8, 60), reduction=0.4)
    planned = widths.uniform(model, 0.5, 1, "x")
    assert neurons(planned) == [8, 56] and planned.mlp_reduction == 0.5


def test_dense_mlps_of_several_widths() -> None:
    model = made("gemma3n_text")
    planned = widths.uniform(model, 0.3, 8, "x")
    assert neurons(planned) == [56, 56, 56, 56] and planned.mlp_reduction >= 0.3
    assert neurons(widths.uniform(model, 0.1, 8, "x")) == [64, 64, 80, 80]


@given(st.floats(0.01, 0.97), st.sampled_from([1, 2, 8, 16, 24]))
@settings(max_examples=30, deadline=None)
def test_the_width_is_the_largest_multiple_that_removes_enough(reduction: float, multiple: int) -> None:
    with torch.device("meta"):
        model = made("opt")
    try:
        planned = widths.uniform(model, reduction, multiple, "x")
    except UsageError:
        assert widths.uniform(model, 0.01, multiple, "x").mlp_reduction < 1
        planned = widths.plan_of(
            widths.uniform(model, 0.01, 1, "x"), {f"model.decoder.layers.{number}": multiple for number in range(4)}
        )
        assert planned.mlp_reduction < reduction
        return
    width = neurons(planned)[0]
    assert width % multiple == 0 and planned.mlp_reduction >= reduction - 1e-6
    names = [line.name.rpartition(".")[0] for line in planned.matrices]
    assert widths.plan_of(planned, dict.fromkeys(names, width + multiple)).mlp_reduction < reduction


def test_a_whole_number_is_not_lost_to_rounding(make_model: Any) -> None:
    model = make_model("llama", intermediate_size=100)
    for left in range(1, 100):
        assert neurons(widths.uniform(model, 1 - left / 100, 1, "x")) == [left, left]


def test_what_cannot_be_planned_is_refused(make_model: Any) -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match="kept in multiples of 128, but no MLP has more than 64: expected less"):
        widths.uniform(model, 0.3, 128, "x")
    with pytest.raises(
        UsageError, match=r"reduction is 0.9: with neurons in multiples of 16 at most 75\.0% of the MLP"
    ):
        widths.uniform(model, 0.9, 16, "x")
    narrow(model, chosen(model, 32))
    with pytest.raises(UsageError, match=r"reduction is 0\.5, but 50\.0% of the dense MLP.* already: expected more"):
        widths.uniform(model, 0.5, 1, "x")
    for method, form in (("svd", "lowrank"), ("magnitude", "mask")):
        other = compression.compress(make_model("llama"), reduction=0.3, method=method)
        with pytest.raises(UsageError, match=f"compress.method is neurons, but .*_proj is {form} already: prune"):
            widths.uniform(other, 0.5, 1, "neurons")
