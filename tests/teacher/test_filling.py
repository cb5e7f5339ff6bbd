"""The pass that fills the cache when memory runs out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsekd.errors import ResourceError
from sparsekd.teacher import fill

VOCAB = 400
MADE_FROM: dict[str, Any] = {"tokenizer_hash": "t", "corpus_fingerprint": "c"}


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCAB, (count, 12), generator=torch.Generator().manual_seed(0))


class TooMany(torch.nn.Module):
    """An embedding that has no memory for more than `most` blocks, and how many it was asked for."""

    def __init__(self, inner: torch.nn.Module, most: int, error: Exception):
        super().__init__()
        self.inner, self.most, self.error, self.asked, self.weight = inner, most, error, [], inner.weight

    def forward(self, tokens: Tensor) -> Tensor:
        self.asked.append(len(tokens))
        if len(tokens) > self.most:
            raise self.error
        return self.inner(tokens)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["device", "host"])
def test_the_cache_is_filled_in_smaller_batches_when_memory_runs_out(
    error: Exception, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model, blocks = make_model("llama"), {i: row.numpy().astype(np.int32) for i, row in enumerate(tokens(10))}
    expected = fill(model, tmp_path / "one", blocks, batch_size=1, top_k=4, **MADE_FROM)
    limited: Any = model
    limited.model.embed_tokens = TooMany(limited.model.embed_tokens, 2, error)
    said: list[str] = []
    found = fill(model, tmp_path / "two", blocks, batch_size=8, top_k=4, say=said.append, **MADE_FROM)
    assert limited.model.embed_tokens.asked == [8, 4, 2, 2, 2, 2, 2]
    assert said[-1] == "  out of memory: cache.batch_size is 2 from here on"
    assert expected is not None and found is not None
    for i, block in blocks.items():
        ours, theirs = found.read(i, block), expected.read(i, block)
        assert torch.equal(ours.ids, theirs.ids) and torch.allclose(ours[1], theirs[1], atol=1e-3)
    limited.model.embed_tokens.most = 0
    with pytest.raises(ResourceError, match=r"out of memory with cache\.batch_size=1: lower corpus\.seq_len"):
        fill(model, tmp_path / "none", blocks, **MADE_FROM)


def test_other_errors_are_no_lack_of_memory(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model: Any = make_model("llama")
    model.model.embed_tokens = TooMany(model.model.embed_tokens, 0, RuntimeError("another one"))
    with pytest.raises(RuntimeError, match="another one"):
        fill(model, tmp_path / "none", {0: tokens(1)[0].numpy().astype(np.int32)}, **MADE_FROM)
    assert model.model.embed_tokens.asked == [1]
