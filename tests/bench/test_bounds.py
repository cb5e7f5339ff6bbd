"""The arithmetic of bounds and intervals, against numbers worked out by hand."""

from typing import Any

import pytest
import torch
from architectures import made
from torch.utils.flop_counter import FlopCounterMode

import sparsekd
from sparsekd.bench import bytes_per_step, estimate, mlp_multiplications, speedup_bound
from sparsekd.evaluate import Serving, prompt


def test_amdahl_by_hand() -> None:
    assert speedup_bound(0.5, 2.0) == pytest.approx(4 / 3)  # half a second stays, the other becomes a quarter
    assert speedup_bound(0.8, 4.0) == pytest.approx(2.5)
    assert speedup_bound(1.0, 3.0) == pytest.approx(3)
    assert speedup_bound(0.0, 100.0) == 1
    assert speedup_bound(0.9, 1.0) == pytest.approx(1)


def test_the_paper_s_bound() -> None:
    """Its 1 / (0.16 + 0.84 x 0.35) is 2.20, not 1.29 as it says; by its Table VIII, where the products are 53 % of the
    time, it is 1.53."""
    assert speedup_bound(0.84, 1 / 0.35) == pytest.approx(2.2026, abs=1e-4)
    assert speedup_bound(0.53, 1 / 0.35) == pytest.approx(1.5256, abs=1e-4)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_multiplications_are_those_that_torch_counts(is_compressed: bool, make_model: Any) -> None:
    model = make_model("llama")
    if is_compressed:
        model = sparsekd.compress(model, reduction=0.5, method="svd")
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(input_ids=prompt(2, 8))
    counted = sum(
        sum(operators.values()) for name, operators in counter.get_flop_counts().items() if name.endswith(".mlp")
    )
    assert counted == 2 * 2 * 8 * mlp_multiplications(model)
    if not is_compressed:
        assert mlp_multiplications(model) == 2 * 3 * 32 * 64


def test_bytes_of_a_step_leave_out_an_embedding_of_its_own() -> None:
    tied, untied = (made("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert bytes_per_step(tied, 4) == bytes_per_step(untied, 4) == 4 * sum(p.numel() for p in tied.parameters())


def test_intervals_by_hand() -> None:
    three = estimate([3.0, 1.0, 2.0])
    assert (three.median, three.low, three.high, three.confidence) == (2, 1, 3, 0.75)
    six = estimate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (six.low, six.high, six.confidence) == (1, 6, 1 - 2 / 64)
    nine = estimate([float(n) for n in range(1, 10)])
    assert (nine.low, nine.high) == (2, 8) and nine.confidence == pytest.approx(0.9609, abs=1e-4)
    assert estimate([4.0]).confidence == 0
    assert six.half_width == pytest.approx(2.5 / 3.5)


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    found = [estimate(row.exp().tolist()) for row in torch.randn(2000, 11)]
    share = sum(one.low <= 1 <= one.high for one in found) / len(found)
    assert found[0].confidence == pytest.approx(0.9883, abs=1e-4) and share == pytest.approx(0.9883, abs=0.01)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_serving_says_what_a_whole_pass_says(architecture: str) -> None:
    torch.manual_seed(0)
    model = made(architecture).eval()
    session, tokens = Serving(model), prompt(2, 9)
    token = session.prefill(tokens)
    for _ in range(3):
        with torch.inference_mode():
            assert torch.equal(token, model(input_ids=tokens).logits[:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        token = session.decode(token)
