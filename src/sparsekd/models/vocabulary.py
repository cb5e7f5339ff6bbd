"""The tokens that a model and its tokenizer, or several models, share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.errors import DataError, MismatchError
from sparsekd.models.identity import tokenizer_hash

_LARGEST_PADDING = 1024  # models round their embeddings up to a multiple of at most this


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `DataError` when the tokenizer makes ids that the model has no embedding for, or its config is damaged."""
    longest: Any = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise DataError(f"model {name}: model_max_length in tokenizer_config.json is {longest!r}: expected a number")
    embedding: Any = model.get_input_embeddings()
    embeddings = embedding.weight.shape[0]
    largest = _largest_id(tokenizer)
    if largest >= embeddings:
        raise DataError(
            f"model {name}: the tokenizer does not match: it makes ids up to {largest}, the model has {embeddings} "
            "embeddings; use the tokenizer that the model was trained with"
        )


def real_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that the tokenizer can make; embeddings beyond them are padding, whose logits mean nothing."""
    return min(int(model.config.get_text_config().vocab_size), _largest_id(tokenizer) + 1)


def require_same_tokenizer(
    teacher: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, name: str, dense: str
) -> None:
    """Raises `MismatchError` for a teacher `name` whose token ids do not mean what they do to the model `dense`."""
    if tokenizer_hash(teacher) != tokenizer_hash(own):
        raise MismatchError(f"teacher {name}: its tokenizer is not that of {dense}, whose tokens it is to predict")


def shared_vocab_size(sizes: Mapping[str, int]) -> int:
    """The tokens that models of one family all know, whose embeddings are padded to different sizes; by what to call
    them. Raises `MismatchError` for vocabularies that differ by more than padding."""
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[large] - sizes[small] >= _LARGEST_PADDING:
        raise MismatchError(
            f"{large} has a vocabulary of {sizes[large]} tokens, {small} one of {sizes[small]}: expected models of one "
            "family"
        )
    return sizes[small]


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)
