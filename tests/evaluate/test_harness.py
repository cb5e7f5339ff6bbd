"""lm-evaluation-harness on local files: right scores, nothing asked of the network, and the same bits as our own."""

import itertools
import json
import math
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from transformers import PreTrainedModel

import sparsekd
from sparsekd import compression
from sparsekd.corpus.tokens import encode
from sparsekd.errors import DataError, UsageError
from sparsekd.evaluate import harness
from sparsekd.evaluate.harness import run_tasks

WORDS = ["silver", "river", "bright", "garden", "copper", "engine", "quiet", "harbour", "winter", "signal"]
PAIRS = list(itertools.pairwise(WORDS))
CHOICES = [
    {"query": f"The {a} {b}", "choices": [f"{b} {a}", f"{a} window", "letter"], "gold": number % 3}
    for number, (a, b) in enumerate(PAIRS)
]
ROWS = {
    "hellaswag_val1000": CHOICES,
    "arc_easy_test": [row | {"query": f"Question: {row['query']}?"} for row in CHOICES],
    "piqa_val": [{"goal": row["query"], "sol1": "river", "sol2": "a garden", "label": 1} for row in CHOICES],
    "winogrande_val": [
        {"context_options": [f"The {a} and", f"A {b}"], "continuation": f"has a {a}.", "gold": 0} for a, b in PAIRS
    ],
    "lambada_openai_test": [{"context": row["query"], "continuation": "river"} for row in CHOICES],
}
ARTICLES = [f" = {a} {b} = \n \n The {a} is {b} . \n = = {b} = = \n \n It is a {a} @-@ {b} . \n" for a, b in PAIRS]
LOCAL = ["local_hellaswag", "local_arc_easy", "local_piqa", "local_winogrande", "local_lambada", "local_wikitext"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with every local task's file."""
    (tmp_path / "tasks").mkdir()
    for name, rows in ROWS.items():
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "wikitext2-raw").mkdir()
    (tmp_path / "wikitext2-raw" / "test.txt").write_text(" \n" + "".join(ARTICLES))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: Any) -> list[Any]:
    """The libraries believe that they are online; who connects is written down and refused."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def log_likelihood(model: PreTrainedModel, tokenizer: Any, context: str, continuation: str) -> float:
    """Sum of the continuation's log-probabilities after the context, in float64."""
    before, ids = encode(tokenizer, context), encode(tokenizer, context + continuation)
    with torch.no_grad():
        log_q = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(log_q[range(len(ids) - 1), ids[1:]][len(before) - 1 :].sum())


def test_scores_equal_brute_force(make_model: Any, tokenizer: Any, root: Path) -> None:
    model = make_model("llama")
    found = run_tasks(model, tokenizer, ["local_hellaswag", "local_winogrande"], root=str(root))
    right = [
        max(range(3), key=lambda i: log_likelihood(model, tokenizer, row["query"], " " + row["choices"][i]))
        == row["gold"]
        for row in CHOICES
    ]
    mean = sum(right) / len(right)
    error = math.sqrt(mean * (1 - mean) / (len(right) - 1))
    assert 0 < mean < 1
    assert found["local_hellaswag"].scores["acc"].value == pytest.approx(mean)
    assert found["local_hellaswag"].scores["acc"].standard_error == pytest.approx(error)
    assert found["local_hellaswag"].num_rows == len(CHOICES)
    better = [
        log_likelihood(model, tokenizer, row["context_options"][0], " " + row["continuation"])
        > log_likelihood(model, tokenizer, row["context_options"][1], " " + row["continuation"])
        for row in ROWS["winogrande_val"]
    ]
    assert found["local_winogrande"].scores["acc"].value == pytest.approx(sum(better) / len(better))


def test_local_tasks_ask_nobody_and_keep_nothing(
    make_model: Any, tokenizer: Any, root: Path, no_network: list[Any], monkeypatch: Any, capsys: Any
) -> None:
    cache = root / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    model = compression.compress(make_model("llama"), reduction=0.3, method="svd")
    found = run_tasks(model, tokenizer, LOCAL, root=str(root), limit=3)
    assert no_network == []
    assert not cache.exists()
    assert capsys.readouterr().out == ""  # stdout is for our results
    assert list(found) == LOCAL
    assert {result.num_rows for result in found.values()} == {3}
    assert all(0 <= found[name].scores["acc"].value <= 1 for name in LOCAL[:-1])
    assert all(isinstance(found[name].scores["acc"].standard_error, float) for name in LOCAL[:-1])
    assert found["local_wikitext"].scores["word_perplexity"].value > 1


def test_local_wikitext_counts_words_of_the_articles(make_model: Any, tokenizer: Any, root: Path) -> None:
    """A uniform model pays log V for each token of the detokenized articles, over the words of the original ones."""
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = run_tasks(model, tokenizer, ["local_wikitext"], root=str(root))["local_wikitext"]
    assert found.num_rows == len(ARTICLES)
    detokenized = [f" = {a} {b} =\n\nThe {a} is {b}.\n== {b} ==\n\nIt is a {a}-{b}.\n" for a, b in PAIRS]
    tokens = sum(len(encode(tokenizer, text)) for text in detokenized)
    words = sum(len(article.split()) + 2 for article in ARTICLES)  # the harness also counts the empty ends
    expected = math.exp(tokens * math.log(model.config.vocab_size) / words)
    assert found.scores["word_perplexity"].value == pytest.approx(expected, rel=1e-5)
    assert found.scores["word_perplexity"].standard_error is None


@pytest.mark.parametrize(("num_windows", "stride"), [(1, 60), (4, 15), (6, 10)])
def test_own_perplexity_and_the_rolling_one_agree_in_bits_per_byte(
    num_windows: int, stride: int, make_model: Any, tokenizer: Any
) -> None:
    """Windows of L + 1 tokens every L tokens are the harness's of length L, once it starts from our first token."""
    from lm_eval.api.instance import Instance

    model = make_model("llama")
    words = " ".join(WORDS * 12)
    ids = encode(tokenizer, words)[: num_windows * stride + 1]
    text, first = tokenizer.decode(ids), tokenizer.decode(ids[:1])
    rest = text.removeprefix(first)
    assert encode(tokenizer, text) == ids and encode(tokenizer, rest) == ids[1:]
    own = sparsekd.perplexity(model, tokenizer, text, context=stride + 1, stride=stride)
    lm = harness.language_model(model, tokenizer, 2, max_length=stride, prefix_token_id=ids[0])
    (rolling,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (rest,), 0)])
    assert own.num_tokens == num_windows * stride
    assert own.bits_per_byte == pytest.approx(-rolling / math.log(2) / len(rest.encode()), rel=1e-5)


def test_a_missing_task_is_named_and_skipped_only_when_allowed(make_model: Any, tokenizer: Any, root: Path) -> None:
    (root / "tasks" / "piqa_val.jsonl").unlink()
    model, tasks = make_model("llama"), ["local_piqa", "local_lambada"]
    with pytest.raises(DataError, match=r"piqa_val\.jsonl: no such file"):
        run_tasks(model, tokenizer, tasks, root=str(root))
    with pytest.raises(DataError, match=r"piqa_val\.jsonl: no such file"):
        harness.check(tasks, str(root))
    found = run_tasks(model, tokenizer, tasks, root=str(root), skip_missing=True)
    assert "piqa_val.jsonl: no such file" in (found["local_piqa"].skipped or "")
    assert found["local_lambada"].skipped is None


def test_texts_are_all_that_a_task_shows(root: Path, no_network: list[Any]) -> None:
    """Questions and answers, right and wrong, in lists as well."""
    found = harness.texts(LOCAL, str(root))
    assert list(found) == LOCAL
    lines = {name: set(text.splitlines()) for name, text in found.items()}
    for row in CHOICES:
        assert lines["local_hellaswag"] >= {row["query"], *row["choices"]}
    for row in ROWS["piqa_val"]:
        assert lines["local_piqa"] >= {row["goal"], row["sol1"], row["sol2"]}
    for row in ROWS["winogrande_val"]:
        assert lines["local_winogrande"] >= {*row["context_options"], row["continuation"]}
    assert all(article in found["local_wikitext"] for article in ARTICLES)
    assert no_network == []


def test_texts_of_missing_tasks(root: Path) -> None:
    (root / "tasks" / "piqa_val.jsonl").unlink()
    tasks = ["local_piqa", "local_lambada", "piqa"]
    with pytest.raises(DataError, match=r"piqa_val\.jsonl: no such file"):
        harness.texts(tasks, str(root))
    assert list(harness.texts(tasks, str(root), skip_missing=True)) == ["local_lambada"]
    assert harness.texts([], None) == {}


def test_a_task_that_only_the_hub_has_is_named(make_model: Any, tokenizer: Any) -> None:
    found = run_tasks(make_model("llama"), tokenizer, ["piqa"], skip_missing=True)
    assert "task piqa is not available here" in (found["piqa"].skipped or "")


def test_an_unknown_local_task_is_a_mistake_even_where_missing_ones_are_skipped() -> None:
    with pytest.raises(UsageError, match="local_pica: there is no such local task; known are local_arc_easy, "):
        harness.check(["local_pica"], None, skip_missing=True)


@pytest.mark.parametrize("line", ["{", '{"goal": 1}', '{"context": "a"}'])
def test_a_file_of_other_rows_is_refused(line: str, make_model: Any, tokenizer: Any, root: Path) -> None:
    (root / "tasks" / "piqa_val.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"piqa"):
        run_tasks(make_model("llama"), tokenizer, ["local_piqa"], root=str(root))


def test_a_score_that_is_not_finite_is_refused(make_model: Any, tokenizer: Any, root: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        run_tasks(model, tokenizer, ["local_wikitext"], root=str(root))
