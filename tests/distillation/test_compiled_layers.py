"""A training whose layers are compiled: the same losses, one compilation, and a model that is left as it was."""

import copy
import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from narrowing import chosen, narrow
from torch._dynamo.testing import CompileCounterWithBackend
from training import OPTIONS, data
from transformers import PreTrainedModel

from sparsekd import distillation
from sparsekd.distillation import History, fused, loop, worker
from sparsekd.models import find_layers
from sparsekd.teacher import Cache

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the compiler looks at
SETTINGS = replace(OPTIONS, batch_size=5)  # in micro batches of two, two and one


@pytest.fixture
def compiled(teacher: PreTrainedModel, blocks: torch.Tensor, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training as on a GPU, by a backend; of a model without layers of ours, which the tests check too."""
    monkeypatch.setattr(fused, "_compiled_step", fused._plain_step)  # the compiler cannot read the tests' checks
    monkeypatch.setattr(loop, "is_worth_compiling", lambda student, options, num_tokens: True)

    def train(backend: Any, model: PreTrainedModel = teacher) -> History:
        monkeypatch.setattr(loop, "compiled", functools.partial(worker.compiled, backend=backend))
        torch._dynamo.reset()
        student = copy.deepcopy(model)
        history = distillation.train(student, data(blocks, cache), SETTINGS)
        assert all(layer._compiled_call_impl is None for layer in find_layers(student))
        return history

    return train


@pytest.fixture
def plain(teacher: PreTrainedModel, blocks: torch.Tensor, cache: Cache) -> History:
    return distillation.train(copy.deepcopy(teacher), data(blocks, cache), SETTINGS)


def test_compiled_layers_train_alike(compiled: Callable[[Any], History], plain: History) -> None:
    """Validations, and batches of another shape than the first, run as they are and compile nothing."""
    counter: Any = CompileCounterWithBackend("aot_eager")
    found = compiled(counter)
    assert counter.frame_count == 1
    assert [step.loss for step in found.steps] == pytest.approx([step.loss for step in plain.steps], rel=1e-5)
    assert [one.loss for one in found.validations] == pytest.approx([one.loss for one in plain.validations], rel=1e-5)


def test_every_kind_of_layer_is_compiled(compiled: Callable[..., History], make_model: Any) -> None:
    """As where neurons were taken out; torch leaves all kinds but the first few as they are."""
    student = make_model("llama", num_hidden_layers=4)
    narrow(student, chosen(student, 8, 8, 12, 16))
    assert worker.num_kinds(student) == 3
    counter: Any = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(counter, student)
    assert counter.frame_count == 3


def test_layers_that_cannot_be_compiled_run_as_they_are(compiled: Callable[[Any], History], plain: History) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    found = compiled(broken)
    assert [step.loss for step in found.steps] == pytest.approx([step.loss for step in plain.steps], rel=1e-5)


@pytest.mark.usefixtures("processor_with_bfloat16")
def test_on_a_processor_long_trainings_in_bfloat16_are_compiled(
    teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    long = worker.compiled_from("cpu", 1)
    assert worker.is_worth_compiling(teacher, OPTIONS, long)
    assert not worker.is_worth_compiling(teacher, OPTIONS, long - 1)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "num_kinds", lambda student: 3)
        longer = worker.compiled_from("cpu", 3)
        assert longer > long
        assert worker.is_worth_compiling(teacher, OPTIONS, longer)
        assert not worker.is_worth_compiling(teacher, OPTIONS, longer - 1)
    assert not worker.is_worth_compiling(teacher, replace(OPTIONS, precision="float32"), long)
    assert not worker.is_worth_compiling(teacher, replace(OPTIONS, gradient_checkpointing=True), long)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not worker.is_worth_compiling(teacher, OPTIONS, long)
