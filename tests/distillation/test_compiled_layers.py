"""A training whose layers are compiled: the same losses, one compilation, and a model that is left as it was."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from training import OPTIONS, data
from transformers import PreTrainedModel

from sparsekd import distillation
from sparsekd.distillation import loop, losses, worker
from sparsekd.models import find_layers
from sparsekd.teacher import Cache


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the compiler looks at
def test_compiled_layers_train_alike(
    teacher: PreTrainedModel, blocks: torch.Tensor, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validations between the steps, and the last step's shorter batch, run as they are and compile nothing."""
    student, twin = copy.deepcopy(teacher), copy.deepcopy(teacher)  # without layers of ours, which are checked too
    plain = distillation.train(twin, data(blocks, cache), OPTIONS)
    counter: Any = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(loop, "is_compiled", lambda device, num_tokens: True)
    monkeypatch.setattr(loop, "compiled", functools.partial(worker.compiled, backend=counter))

    def as_it_is(numbers: Any, mode: Any, tempered: bool) -> Any:  # the compiler cannot read the tests' checks
        return functools.partial(losses._chunk, numbers=numbers, mode=mode, tempered=tempered)

    monkeypatch.setattr(losses, "_compiled_step", as_it_is)
    torch._dynamo.reset()
    found = distillation.train(student, data(blocks, cache), OPTIONS)
    assert counter.frame_count == 1
    assert [step.loss for step in found.steps] == pytest.approx([step.loss for step in plain.steps], rel=1e-5)
    assert [one.loss for one in found.validations] == pytest.approx([one.loss for one in plain.validations], rel=1e-5)
    assert all(layer._compiled_call_impl is None for layer in find_layers(student))
