"""What models say: how each goes on from the same prompts, always with its likeliest token.

The prompts of a batch are read side by side as far as the shortest one goes, so that nothing has to be padded. From
there on each row is fed the rest of its own prompt, and then what the model says.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd.corpus import beginning
from sparsekd.device import Batches
from sparsekd.errors import UsageError
from sparsekd.evaluate.speed import Serving
from sparsekd.models import float32_head, real_vocab_size
from sparsekd.records import Record

NUM_TOKENS = 48  # that a model says at most
_TOGETHER = 16  # prompts
_GRAM = 4  # tokens of a sequence that is looked for twice


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt."""

    prompt: str
    text: str
    tokens: list[int]  # without the end-of-sequence token
    ends: list[int]  # characters of the text up to the end of each token
    has_ended: bool  # by itself, with an end-of-sequence token
    repetition: float


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """How `model` goes on from each of `prompts`, for at most `NUM_TOKENS` tokens: a `Continuation` each.

    Raises what `prompt_ids` raises, and `ResourceError` where memory does not hold a single prompt.
    """
    ids = prompt_ids(model, tokenizer, prompts)
    run, stops = _in_float32(model, real_vocab_size(model, tokenizer)), _stop_tokens(model, tokenizer)

    def go_on(batch: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
        session = Serving(model, run)
        new: list[list[int]] = [[] for _ in batch]
        lengths = [len(row) for row in batch]
        for position in range(min(lengths), min(max(lengths) + NUM_TOKENS, _context(model))):
            read = torch.tensor([(row + said)[:position] for row, said in zip(batch, new, strict=True)])
            following = session.decode(read[:, -1]) if session.has_cache else session.prefill(read)
            for length, said, token in zip(lengths, new, following.tolist(), strict=True):
                if length <= position:
                    said.append(token)
            on_tokens(sum(0 <= position - length < NUM_TOKENS for length in lengths))
            if all(len(said) >= NUM_TOKENS or stops & set(said) for said in new):
                break
        return [_up_to_stop(said[:NUM_TOKENS], stops) for said in new]

    by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    batches = Batches(_TOGETHER, "prompts at once", "the length of evaluate.prompts", say)
    found = itertools.chain.from_iterable(batches.run([ids[number] for number in by_length], go_on))
    by_number = dict(zip(by_length, found, strict=True))
    return [
        asdict(_continuation(tokenizer, prompt, ids[number], *by_number[number]))
        for number, prompt in enumerate(prompts)
    ]


def prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt's tokens, after what the tokenizer by default puts before a text; special tokens may be spelled out.
    Raises `UsageError` for a prompt that leaves no room in the model's context."""
    begin, longest = beginning(tokenizer), _context(model) - 1
    ids = [begin + tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts]
    for number, row in enumerate(ids, 1):
        if not 1 <= len(row) <= longest:
            raise UsageError(
                f"evaluate.prompts: number {number} has {len(row)} tokens: expected 1 to {longest}, so that one more "
                "fits into the model's context"
            )
    return ids


def compare(said: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """What models say, by their names, each record with the number of tokens after which it parts from what the first
    model says; None where it never does."""
    first = next(iter(said.values()), [])
    return {
        name: [one | {"parts_at": _parts_at(one, other)} for one, other in zip(records, first, strict=True)]
        for name, records in said.items()
    }


def repetition(tokens: Sequence[int]) -> float:
    """The share of sequences of four tokens that occurred before: seq-rep-4 of Welleck et al., "Neural Text Generation
    with Unlikelihood Training", 2020, arXiv 1908.04319."""
    grams = [tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _context(model: PreTrainedModel) -> int:
    """Tokens that the model's positions are for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _in_float32(model: PreTrainedModel, vocab_size: int) -> Callable[..., Any]:
    """The model with logits that are not rounded, and none for the vocabulary's padding."""

    def run(**inputs: Any) -> Any:
        with float32_head(model):
            found = model(**inputs)
        found.logits = found.logits[..., :vocab_size]
        return found

    return run


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[Any]:
    """The model's end-of-sequence tokens, which may be several, and the tokenizer's."""
    found: list[Any] = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
    return {token for one in found for token in (one if isinstance(one, list) else [one])}


def _up_to_stop(tokens: list[int], stops: set[Any]) -> tuple[list[int], bool]:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return tokens[:end], end is not None


def _continuation(tokenizer: Any, prompt: str, ids: list[int], tokens: list[int], has_ended: bool) -> Continuation:
    # beside the prompt's last token, since some tokenizers leave out a space at the beginning of what they decode
    texts = [
        tokenizer.decode([ids[-1], *tokens[:count]], clean_up_tokenization_spaces=False)
        for count in range(len(tokens) + 1)
    ]
    start, whole = len(texts[0]), texts[-1]
    # a token may end within a character, which shows as another one then
    ends = [num_common(whole, text) - start for text in texts[1:]]
    return Continuation(prompt, whole[start:], tokens, ends, has_ended, repetition(tokens))


def _parts_at(one: Record, other: Record) -> int | None:
    if all(one[key] == other[key] for key in ("tokens", "has_ended")):
        return None
    return num_common(one["tokens"], other["tokens"])


def num_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the beginning that two sequences have in common."""
    differs = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))
