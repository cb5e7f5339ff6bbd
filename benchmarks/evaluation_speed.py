"""Tokens a second of the evaluation against the bare forward pass over the same windows, in turns.

    python benchmarks/evaluation_speed.py

The bare pass is `model(input_ids).logits` on windows of 512 tokens every 256, two at once, and nothing else. The
evaluation is `sparsekd.perplexity`, both protocols; and `evaluate.measure`, which adds calibration. Bar: at least 0.9.
The speed does not depend on the length of the text.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _record import record, summary

import sparsekd
from sparsekd import corpus
from sparsekd.evaluate import measure
from sparsekd.evaluate.windows import choose, split, token_ids
from sparsekd.recipe import load_recipe

ROUNDS, TOKENS, CONTEXT, STRIDE, BATCH = 3, 6144, 512, 256, 2


def main() -> None:
    model, tokenizer = sparsekd.load()
    recipe = load_recipe("demo")
    text = corpus.read_text(recipe.evaluate.texts["wikipedia"], recipe.corpus)
    ids = token_ids(tokenizer, text)
    windows = [ids[window.start : window.end] for window in choose(split(len(ids), CONTEXT, STRIDE), TOKENS)]

    def bare() -> None:
        with torch.inference_mode():
            for first in range(0, len(windows), BATCH):
                batch = windows[first : first + BATCH]
                if len({len(window) for window in batch}) == 1:
                    _ = model(input_ids=torch.stack(batch), use_cache=False).logits
                else:
                    for window in batch:
                        _ = model(input_ids=window[None], use_cache=False).logits

    def perplexity() -> None:
        sparsekd.perplexity(model, tokenizer, text, max_tokens=TOKENS, context=CONTEXT, stride=STRIDE, batch_size=BATCH)

    def all_measures() -> None:
        options: dict[str, Any] = {"max_tokens": TOKENS, "context": CONTEXT, "stride": STRIDE, "batch_size": BATCH}
        measure({"model": model}, tokenizer, text, **options)

    bare()
    passes = {"bare": bare, "perplexity": perplexity, "measure": all_measures}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS):
        for name, function in passes.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    figures = {f"{name}_tokens_per_second": summary([TOKENS / s for s in seconds[name]]) for name in passes}
    for name in ("perplexity", "measure"):
        ratios = [bare / ours for bare, ours in zip(seconds["bare"], seconds[name], strict=True)]
        figures[f"{name} to bare"] = summary(ratios)
    record("evaluation_speed", figures | {"tokens": TOKENS, "rounds": ROUNDS})


if __name__ == "__main__":
    main()
