"""What models say, against a loop that reads everything again for each token, and against cases with known answers."""

import functools
from typing import Any

import pytest
import torch
from tiny import paragraphs, sharpened
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsekd.errors import UsageError
from sparsekd.evaluate import continuations
from sparsekd.evaluate.continuations import NUM_TOKENS, compare, generate, prompt_ids, repetition

PROMPTS = ["The quiet river", "A", "In winter the market by the old bridge\nis", "Copper and silver"]


@torch.inference_mode()
def one_by_one(model: PreTrainedModel, ids: list[int], vocab_size: int) -> list[int]:
    """The likeliest tokens after one prompt, each from all that is before it."""
    rows = torch.tensor([ids])
    for _ in range(NUM_TOKENS):
        token = model(input_ids=rows, use_cache=False).logits[0, -1, :vocab_size].argmax()
        rows = torch.cat([rows, token.reshape(1, 1)], -1)
    return rows[0, len(ids) :].tolist()


def expected(model: PreTrainedModel, tokenizer: Any) -> list[list[int]]:
    return [one_by_one(model, ids, len(tokenizer)) for ids in prompt_ids(model, tokenizer, PROMPTS)]


def tokens(said: list[dict[str, Any]]) -> list[list[int]]:
    return [one["tokens"] for one in said]


@pytest.mark.parametrize("together", [1, 3, 16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_prompts_of_all_lengths_together_are_as_each_alone(
    architecture: str, together: int, make_model: Any, tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(continuations, "_TOGETHER", together)
    model = sharpened(make_model(architecture))
    model.generation_config.eos_token_id = None
    tokenizer = without_end(tokenizer)
    counted: list[int] = []
    said = generate(model, tokenizer, PROMPTS, on_tokens=counted.append)
    assert tokens(said) == expected(model, tokenizer)
    assert [one["prompt"] for one in said] == PROMPTS
    assert [one["text"] for one in said] == [tokenizer.decode(one["tokens"]) for one in said]
    assert not any(one["has_ended"] for one in said)
    assert sum(counted) == NUM_TOKENS * len(PROMPTS)


def without_end(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer, which knows no end-of-sequence token."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))


def test_it_ends_at_any_of_the_end_of_sequence_tokens(make_model: Any, tokenizer: Any) -> None:
    model = sharpened(make_model("llama"))
    whole = expected(model, tokenizer)
    stop = whole[0][5]
    model.generation_config.eos_token_id = [0, stop]
    said = generate(model, tokenizer, PROMPTS)
    for one, tokens in zip(said, whole, strict=True):
        end = min((tokens.index(token) for token in (0, stop) if token in tokens), default=None)
        assert one["tokens"] == tokens[:end]
        assert one["has_ended"] == (end is not None)
    assert said[0]["has_ended"] and len(said[0]["tokens"]) <= 5


def test_a_model_without_a_cache_says_the_same(make_model: Any, tokenizer: Any) -> None:
    model = sharpened(make_model("llama"))
    said = generate(model, tokenizer, PROMPTS)
    forward = model.forward

    @functools.wraps(forward)
    def cacheless(*arguments: Any, **options: Any) -> Any:
        found = forward(*arguments, **options)
        found.past_key_values = None
        return found

    model.forward = cacheless
    assert generate(model, tokenizer, PROMPTS) == said


def test_the_vocabulary_s_padding_is_never_said(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama", vocab_size=len(tokenizer) + 8)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] *= 100
    for one in generate(model, tokenizer, PROMPTS):
        assert max(one["tokens"], default=0) < len(tokenizer)


def test_a_prompt_has_to_fit_into_the_model_s_context(make_model: Any, tokenizer: Any) -> None:
    model = make_model("llama", max_position_embeddings=40)
    model.generation_config.eos_token_id = None
    plain = without_end(tokenizer)
    short, long = "river", "river " * 18
    read = [len(ids) for ids in prompt_ids(model, plain, [short, long])]
    said = generate(model, plain, [short, long])
    assert [length + len(one["tokens"]) for length, one in zip(read, said, strict=True)] == [40, 40]
    with pytest.raises(UsageError, match=r"^evaluate\.prompts: number 2 has \d+ tokens: expected 1 to 39, "):
        generate(model, plain, [short, long * 3])


def test_a_prompt_begins_as_a_text_does_and_may_spell_out_special_tokens(make_model: Any, gemma_like: Any) -> None:
    model = make_model("llama", vocab_size=len(gemma_like))
    (ids,) = prompt_ids(model, gemma_like, ["river<|endoftext|>"])
    assert ids[0] == gemma_like.bos_token_id and ids[-1] == gemma_like.eos_token_id
    assert gemma_like.decode(ids[1:-1]) == "river"


@pytest.mark.parametrize(
    ("said", "share"),
    [([], 0.0), ([1, 1, 1], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2), ([7] * 13, 0.9)],
)
def test_repetition_is_the_share_of_sequences_that_occurred_before(said: list[int], share: float) -> None:
    assert repetition(said) == pytest.approx(share)


def test_models_part_at_the_first_token_that_differs() -> None:
    def said(*tokens: int, has_ended: bool = False) -> dict[str, Any]:
        return {"tokens": list(tokens), "has_ended": has_ended}

    first = [said(1, 2, 3), said(1, 2, 3), said(1, 2, 3), said(1, 2, has_ended=True), said(1, has_ended=True)]
    other = [said(1, 2, 3), said(1, 5, 3), said(4, 2, 3), said(1, 2, 3), said(1, has_ended=True)]
    found = compare({"dense": first, "small": other})
    assert [one["parts_at"] for one in found["dense"]] == [None] * 5
    assert [one["parts_at"] for one in found["small"]] == [None, 1, 0, 2, None]
    assert compare({}) == {}


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer that leaves out the space at the beginning of what it decodes, as Llama 2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(paragraphs(50, seed=0), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_text_keeps_the_space_that_it_begins_with() -> None:
    plain = metaspace()
    said = plain("river bridge", add_special_tokens=False).input_ids
    assert not plain.decode(said).startswith(" ")
    one = continuations._continuation(plain, "The", plain("market").input_ids, said, False)
    assert one.text == " river bridge"
    assert one.text[: one.ends[-1]] == one.text


def test_a_token_ends_between_characters(tokenizer: Any) -> None:
    text = " caf\u00e9 \u20ac5"  # of which several tokens are parts of a character
    said = tokenizer(text).input_ids
    one = continuations._continuation(tokenizer, "A", tokenizer("A").input_ids, said, False)
    assert one.text == text
    assert one.ends == sorted(one.ends) and one.ends[-1] == len(text) and len(one.ends) == len(said)
    for count, end in enumerate(one.ends, 1):
        assert tokenizer.decode(said[:count]).rstrip("\ufffd") == text[:end]
