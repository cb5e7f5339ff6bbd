"""Packed documents that do not see each other.

Shape letters: B blocks, L positions.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def document_positions(tokens: Int[Tensor, "B L"], separator: int) -> Int[Tensor, "B L"]:
    """Each token's position in its own document, where documents are packed and `separator` ends one.

    A transformers model that is given such positions and no attention mask keeps the documents apart.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:] * (tokens[:, :-1] == separator)
    return index - starts.cummax(1).values


def document_inputs(tokens: Int[Tensor, "B L"], separator: int | None) -> dict[str, Tensor]:
    """What a model is called with for packed documents to be kept apart; without a `separator` they see each other."""
    apart = {} if separator is None else {"position_ids": document_positions(tokens, separator)}
    return {"input_ids": tokens} | apart
