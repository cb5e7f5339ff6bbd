"""Perplexity against brute force, both protocols, and its errors."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import paragraphs
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import sparsekd
from sparsekd.corpus.tokens import encode
from sparsekd.errors import DataError, ResourceError
from sparsekd.evaluate import ratio
from sparsekd.evaluate.perplexity import scored_bytes
from sparsekd.evaluate.windows import Window, choose, split

TEXT = "The quick brown fox jumps over the lazy dog while seven wizards mix bold potions quietly in a dim cave. " * 6


@pytest.fixture
def model(make_model: Any) -> PreTrainedModel:
    return make_model("llama")


def brute_force(model: PreTrainedModel, ids: list[int], context: int, stride: int) -> tuple[list[float], list[float]]:
    """(strict, paper) nats of every counted prediction, one window at a time."""
    strict: dict[int, float] = {}
    paper = []
    for start in range(0, len(ids), stride):
        window = torch.tensor(ids[start : start + context])
        if len(window) < 2:
            break
        with torch.no_grad():
            log_q = F.log_softmax(model(window[None]).logits[0, :-1].double(), -1)
        for offset, token in enumerate(window[1:].tolist()):
            nll = -float(log_q[offset, token])
            paper.append(nll)
            strict.setdefault(start + offset + 1, nll)
        if start + context >= len(ids):
            break
    return list(strict.values()), paper


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 16), (32, 5), (1000, 500)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_protocols_equal_brute_force(
    context: int, stride: int, batch_size: int, model: PreTrainedModel, tokenizer: Any
) -> None:
    found = sparsekd.perplexity(model, tokenizer, TEXT, context=context, stride=stride, batch_size=batch_size)
    ids = encode(tokenizer, TEXT)
    strict, paper = brute_force(model, ids, context, stride)
    assert found.num_tokens == len(strict)
    if stride < context:
        assert len(strict) == len(ids) - 1  # every token but the first, once
    assert found.paper_num_tokens == len(paper)
    assert found.perplexity == pytest.approx(math.exp(sum(strict) / len(strict)), rel=1e-5)
    assert found.paper_perplexity == pytest.approx(math.exp(sum(paper) / len(paper)), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (16, 5), (8, 8), (20, 20)])
def test_bits_per_byte_counts_the_bytes_of_scored_tokens(
    context: int, stride: int, model: PreTrainedModel, tokenizer: Any
) -> None:
    found = sparsekd.perplexity(model, tokenizer, TEXT, context=context, stride=stride)
    ids = encode(tokenizer, TEXT)
    scored = [t for start, end, fresh in split(len(ids), context, stride) for t in ids[start + 1 + fresh : end]]
    num_bytes = sum(len(tokenizer.decode([token]).encode()) for token in scored)
    if stride < context:
        assert num_bytes == len(TEXT.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * found.num_tokens / num_bytes, rel=1e-9)


def test_bytes_hold_the_spaces_that_decoding_leaves_out_at_a_beginning() -> None:
    backend = Tokenizer(WordLevel({"\u2581" + number * "w": number for number in range(11)}))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([2, 3]) == "ww www"  # the first space is gone
    windows = [Window(0, 4, 0), Window(2, 6, 1), Window(8, 10, 0)]  # tokens 1 to 5 and 9 are scored
    assert scored_bytes(tokenizer, torch.arange(1, 11), windows) == (3 + 4 + 5 + 6 + 7) + 11


@pytest.mark.parametrize(("max_tokens", "num_windows"), [(5, 1), (40, 5), (500, 62)])
def test_max_tokens_scores_windows_of_the_full_pass_spread_over_the_text(
    max_tokens: int, num_windows: int, model: PreTrainedModel, tokenizer: Any
) -> None:
    text = "\n\n".join(paragraphs(20, seed=3))
    options = {"context": 16, "stride": 8, "batch_size": 3}
    whole = sparsekd.perplexity(model, tokenizer, text, **options)
    found = sparsekd.perplexity(model, tokenizer, text, max_tokens=max_tokens, **options)
    ids = encode(tokenizer, text)
    windows = split(len(ids), 16, 8)
    places = [windows.index(window) for window in choose(windows, max_tokens)]
    assert len(places) == num_windows < len(windows)
    assert found.window_nll == pytest.approx([whole.window_nll[place] for place in places])
    assert found.window_tokens == [8] * num_windows and found.num_tokens == 8 * num_windows
    assert found.paper_num_tokens == 15 * num_windows
    num_bytes = sum(len(tokenizer.decode([t]).encode()) for i in places for t in ids[8 * i + 8 : 8 * i + 16])
    assert found.bits_per_byte == pytest.approx(sum(found.window_nll) / math.log(2) / num_bytes)


def test_a_text_s_own_length_as_max_tokens_is_all_of_it(model: PreTrainedModel, tokenizer: Any) -> None:
    whole, part = (
        sparsekd.perplexity(model, tokenizer, TEXT, context=16, stride=8, max_tokens=max_tokens)
        for max_tokens in (None, len(encode(tokenizer, TEXT)))
    )
    assert part == whole


def test_a_text_s_beginning_does_not_stand_for_it(model: PreTrainedModel, tokenizer: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10.0)
    text = "river " * 200 + " ".join(paragraphs(30, seed=4))
    whole = sparsekd.perplexity(model, tokenizer, text, context=16, stride=8)
    part = sparsekd.perplexity(model, tokenizer, text, context=16, stride=8, max_tokens=150)
    assert part.standard_error is not None
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.2)
    assert abs(part.perplexity - whole.perplexity) < 2 * part.standard_error


def test_uniform_model_has_the_vocabulary_as_perplexity(model: PreTrainedModel, tokenizer: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = sparsekd.perplexity(model, tokenizer, TEXT, context=16, stride=8)
    assert found.perplexity == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert found.standard_error is not None and found.standard_error < 1e-3


@pytest.mark.parametrize("stride", [16, 8])  # a token is predicted in two windows, in four
def test_a_token_s_predictions_in_several_windows_are_no_new_evidence(
    stride: int, model: PreTrainedModel, tokenizer: Any
) -> None:
    """Without attention a token's loss is the same in every window: both protocols know its mean equally well."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        model.get_output_embeddings().weight.mul_(10.0)
    text = "\n\n".join(paragraphs(60, seed=3))
    found = sparsekd.perplexity(model, tokenizer, text, context=32, stride=stride)
    assert found.paper_num_tokens > 1.9 * found.num_tokens
    assert found.paper_perplexity == pytest.approx(found.perplexity, rel=0.01)
    assert found.paper_standard_error == pytest.approx(found.standard_error, rel=0.02)


def test_ratio_of_a_model_to_itself_is_one_without_error(model: PreTrainedModel, tokenizer: Any) -> None:
    found = sparsekd.perplexity(model, tokenizer, TEXT, context=16, stride=8)
    assert ratio(found, found) == (1.0, 0.0)


def test_the_error_of_one_window_is_unknown(model: PreTrainedModel, tokenizer: Any) -> None:
    found = sparsekd.perplexity(model, tokenizer, TEXT, context=1000, stride=1000)
    assert (found.standard_error, found.paper_standard_error) == (None, None)
    assert ratio(found, found) == (1.0, None)


def test_paired_error_is_smaller_than_the_unpaired_one(model: PreTrainedModel, tokenizer: Any) -> None:
    words = [f"word{i} {'abcdefg'[i % 7] * (i % 5)}" for i in range(200)]
    dense = sparsekd.perplexity(model, tokenizer, " ".join(words), context=16, stride=8)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.9)
    other = sparsekd.perplexity(model, tokenizer, " ".join(words), context=16, stride=8)
    _, paired = ratio(other, dense)
    assert paired and dense.standard_error and other.standard_error
    assert paired < 0.5 * math.hypot(dense.standard_error / dense.perplexity, other.standard_error / other.perplexity)


def test_ratio_of_different_texts_is_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    whole = sparsekd.perplexity(model, tokenizer, TEXT, context=16, stride=8)
    part = sparsekd.perplexity(model, tokenizer, TEXT, context=16, stride=8, max_tokens=40)
    with pytest.raises(DataError, match="different text"):
        ratio(part, whole)


@pytest.mark.parametrize("text", ["", "a"])
def test_too_short_a_text_is_refused(text: str, model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="fewer than two"):
        sparsekd.perplexity(model, tokenizer, text)


def test_non_finite_loss_is_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        sparsekd.perplexity(model, tokenizer, TEXT)


def limited(model: PreTrainedModel, most: int, error: Exception) -> list[int]:
    """Lets a model fail on more than `most` windows at once; the numbers of windows that it was asked for."""
    forward, asked = model.forward, []

    def attempt(input_ids: torch.Tensor, **options: Any) -> Any:
        asked.append(len(input_ids))
        if len(input_ids) > most:
            raise error
        return forward(input_ids=input_ids, **options)

    model.forward = attempt  # type: ignore[method-assign]
    return asked


HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), HOST, MemoryError()])
def test_fewer_windows_go_together_when_memory_runs_out(
    error: Exception, model: PreTrainedModel, tokenizer: Any
) -> None:
    options = {"context": 16, "stride": 8}
    one_by_one = sparsekd.perplexity(model, tokenizer, TEXT, **options, batch_size=1)
    asked = limited(model, 1, error)
    found = sparsekd.perplexity(model, tokenizer, TEXT, **options, batch_size=5)
    assert asked == [5, 2] + [1] * len(one_by_one.window_nll)
    assert found == one_by_one


def test_a_window_that_memory_does_not_hold_is_an_error_of_one_line(model: PreTrainedModel, tokenizer: Any) -> None:
    asked = limited(model, 0, HOST)
    with pytest.raises(ResourceError, match=r"evaluate\.batch_size=1: lower evaluate\.context"):
        sparsekd.perplexity(model, tokenizer, TEXT, context=16, stride=8, batch_size=4)
    assert asked == [4, 2, 1]


def test_other_errors_of_a_model_stay_what_they_are(model: PreTrainedModel, tokenizer: Any) -> None:
    limited(model, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sparsekd.perplexity(model, tokenizer, TEXT)


def test_chosen_windows_are_spread_evenly() -> None:
    windows = split(84, 8, 4)  # twenty: the first scores 7 tokens, the others 4 each
    assert choose(windows, None) == choose(windows, 84) == choose(windows, 83) == windows
    assert choose(windows, 16) == [windows[i] for i in (2, 7, 12, 17)]
    assert choose(windows, 2) == [windows[10]]


def test_windows_cover_every_token_and_the_last_is_short_not_padded() -> None:
    assert [window[:2] for window in split(20, 8, 4)] == [(0, 8), (4, 12), (8, 16), (12, 20)]
    assert [window[:2] for window in split(18, 8, 4)] == [(0, 8), (4, 12), (8, 16), (12, 18)]
    assert [window[:2] for window in split(5, 8, 4)] == [(0, 5)]
    assert [window[:2] for window in split(9, 8, 8)] == [(0, 8)]  # one token alone predicts nothing
