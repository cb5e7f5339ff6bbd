"""What the process of `test_a_model_that_cannot_be_split_is_refused` runs."""

from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekd.errors import ResourceError, UsageError
from sparsekd.models import split


def made() -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))  # type: ignore[arg-type]


dist.init_process_group("gloo")
tokens = torch.zeros(1, 3, dtype=torch.long)

odd = made()
odd.model.layers[1].gain = torch.nn.Parameter(torch.tensor(1.0))
try:
    split(odd)
except UsageError as error:
    assert "LlamaForCausalLM cannot be split by FSDP: " in str(error) and "scalar" in str(error), error
else:
    raise AssertionError("a scalar was split")

model = made()
expected = model(tokens).logits
split(model)
assert torch.equal(model(tokens).logits, expected)


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


model.model.layers[1].register_forward_pre_hook(full)
try:
    model(tokens)
except ResourceError as error:
    assert "out of memory in a pass of LlamaForCausalLM, which is split over 1 processes: each device" in str(error)
else:
    raise AssertionError("memory did not run out")
dist.destroy_process_group()
