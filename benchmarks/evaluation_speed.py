"""Tokens a second of the evaluation against the bare forward pass over the same windows, in turns.

    python benchmarks/evaluation_speed.py [--bfloat16]

The bare pass is `model(input_ids).logits` on windows of 512 tokens every 256, two at once, and nothing else. The
evaluation is `sparsekd.perplexity`, both protocols; `evaluate.measure`, which adds calibration; and `measure` of three
models, two of which have lost 35 % of their MLP neurons, with their agreement with the first, against three bare
passes. Bar: at least 0.9. With `--bfloat16` all multiply in bfloat16, with weights in float32, and the bare pass leaves
its logits in bfloat16. The speed does not depend on the length of the text.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--bfloat16", action="store_true")
    bfloat16 = parser.parse_args().bfloat16
    model, tokenizer = sparsekd.load()
    recipe = load_recipe("demo")
    text = corpus.read_text(recipe.evaluate.texts["wikipedia"], recipe.corpus)
    ids = token_ids(tokenizer, text)
    windows = [ids[window.start : window.end] for window in choose(split(len(ids), CONTEXT, STRIDE), TOKENS)]

    narrow = sparsekd.compress(sparsekd.load()[0], ids[:8192].view(-1, 256), method="neurons", reduction=0.35)
    three = {"dense": model, "compressed": narrow, "distilled": copy.deepcopy(narrow)}

    def bare(models: Sequence[Any] = (model,)) -> None:
        with torch.inference_mode():
            for one in models:
                for first in range(0, len(windows), BATCH):
                    batch = windows[first : first + BATCH]
                    if len({len(window) for window in batch}) == 1:
                        _ = one(input_ids=torch.stack(batch), use_cache=False).logits
                    else:
                        for window in batch:
                            _ = one(input_ids=window[None], use_cache=False).logits

    options: dict[str, Any] = {"max_tokens": TOKENS, "context": CONTEXT, "stride": STRIDE, "batch_size": BATCH}

    def perplexity() -> None:
        sparsekd.perplexity(model, tokenizer, text, **options)

    def all_measures() -> None:
        measure({"model": model}, tokenizer, text, **options)

    def three_models() -> None:
        measure(three, tokenizer, text, teacher="dense", **options)

    bare()
    passes = {"bare": bare, "perplexity": perplexity, "measure": all_measures}
    passes |= {"three bare": lambda: bare(list(three.values())), "three models": three_models}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS):
        for name, function in passes.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                function()
            seconds[name].append(time.perf_counter() - start)
    figures = {f"{name}_tokens_per_second": summary([TOKENS / s for s in seconds[name]]) for name in passes}
    for name, reference in (("perplexity", "bare"), ("measure", "bare"), ("three models", "three bare")):
        ratios = [bare / ours for bare, ours in zip(seconds[reference], seconds[name], strict=True)]
        figures[f"{name} to {reference}"] = summary(ratios)
    name = "evaluation_speed_bfloat16" if bfloat16 else "evaluation_speed"
    record(name, figures | {"tokens": TOKENS, "rounds": ROUNDS})


if __name__ == "__main__":
    main()
