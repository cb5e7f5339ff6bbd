"""SmolLM2-135M at 15 %: one step of the truncation after the other, before and after the demo's distillation.

    python benchmarks/truncation_ablation.py

Every arm has the same corpus, statistics (8,192 tokens), budget and training (25,600 tokens, one seed), so what
differs is the truncation alone. Ratios of strict perplexity to the dense model on the demo's two held-out texts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record

import sparsekd
from sparsekd import compression, corpus, distillation, teacher
from sparsekd.evaluate import ratio
from sparsekd.recipe import load_recipe

ARMS = {
    "svd, lowrank": {"method": "svd", "layer_format": "lowrank"},
    "whitened, lowrank": {"method": "whitened", "layer_format": "lowrank"},
    "whitened, pivot": {"method": "whitened", "layer_format": "pivot"},
    "two-sided, pivot": {"method": "two-sided", "layer_format": "pivot"},
    "two-sided, pivot, global": {"method": "two-sided", "layer_format": "pivot", "allocation": "global"},
}


def main() -> None:
    recipe = load_recipe("demo")
    model, tokenizer = sparsekd.load()
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed)
    blocks = [block.tokens for block in built.blocks]
    statistics = torch.from_numpy(np.stack(built.tokens(built.order(recipe.seed, 0)[:32].tolist())).astype(np.int64))

    def measure(student: Any) -> dict[str, Any]:
        limit = recipe.evaluate.max_tokens
        return {
            name: sparsekd.perplexity(student, tokenizer, text, max_tokens=limit) for name, text in built.texts.items()
        }

    with tempfile.TemporaryDirectory() as folder:
        made_from = {"tokenizer": "benchmark", "corpus_fingerprint": built.fingerprint}
        cache = teacher.fill(model, Path(folder), dict(enumerate(blocks)), **made_from)
        dense = measure(model)
        data = distillation.Data(
            blocks, lambda epoch: built.order(recipe.seed, epoch), built.validation_ids.tolist(), cache
        )
        arms = {}
        for name, options in ARMS.items():
            student, _ = sparsekd.load()
            plan = compression.truncate(student, statistics, reduction=0.15, **options)
            before = measure(student)
            distillation.train(student, data, recipe.distill)
            after = measure(student)
            arms[name] = {"mlp_reduction": plan.mlp_reduction}
            for when, found in (("before", before), ("after", after)):
                arms[name][when] = {text: ratio(found[text], dense[text]) for text in found}
            print(name, arms[name], flush=True)
    perplexities = {text: [found.perplexity, found.standard_error] for text, found in dense.items()}
    record("truncation_ablation", {"dense_perplexity": perplexities, "ratio_and_standard_error": arms})


if __name__ == "__main__":
    main()
