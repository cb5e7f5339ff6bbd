"""SmolLM2-135M at 15 %: one step of the truncation after the other; with --distill also after the demo's training.

    python benchmarks/truncation_ablation.py [--distill]

Every arm has the same corpus, statistics (8,192 tokens), budget and training (25,600 tokens, one seed), so what
differs is the truncation alone. Ratios of strict perplexity to the dense model on the demo's two held-out texts.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record

import sparsekd
from sparsekd import compression, corpus, distillation, teacher
from sparsekd.evaluate import ratio
from sparsekd.recipe import Compress, load_recipe

ARMS = {
    "svd, lowrank": {"method": "svd", "format": "lowrank"},
    "whitened, lowrank": {"method": "whitened", "format": "lowrank"},
    "whitened, pivot": {"method": "whitened", "format": "pivot"},
    "two-sided, pivot": {"method": "two-sided", "format": "pivot"},
    "two-sided, pivot, global": {"method": "two-sided", "format": "pivot", "allocation": "global"},
}


def main() -> None:
    with_training = "--distill" in sys.argv
    recipe = load_recipe("demo")
    model, tokenizer = sparsekd.load()
    built = corpus.build(recipe.corpus, recipe.evaluate.texts, tokenizer, recipe.seed)
    statistics = torch.from_numpy(np.stack(built.tokens(built.order(recipe.seed, 0)[:32].tolist())).astype(np.int64))

    def measure(measured: Any) -> dict[str, Any]:
        limit = recipe.evaluate.max_tokens
        texts = built.texts.items()
        return {name: sparsekd.perplexity(measured, tokenizer, text, max_tokens=limit) for name, text in texts}

    dense = measure(model)
    arms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = _training_data(model, built, recipe.seed, Path(folder)) if with_training else None
        for name, options in ARMS.items():
            student = copy.deepcopy(model)
            plan = compression.truncate(student, statistics, Compress(reduction=0.15, **options))
            found = {"before": measure(student)}
            if data is not None:
                distillation.train(student, data, recipe.distill)
                found["after"] = measure(student)
            ratios = {when: {text: ratio(r[text], dense[text]) for text in r} for when, r in found.items()}
            arms[name] = {"mlp_reduction": plan.mlp_reduction, **ratios}
            print(name, arms[name], flush=True)
    perplexities = {text: [found.perplexity, found.standard_error] for text, found in dense.items()}
    record("truncation_ablation", {"dense_perplexity": perplexities, "ratio_and_standard_error": arms})


def _training_data(model: Any, built: corpus.Corpus, seed: int, folder: Path) -> distillation.Data:
    blocks = [block.tokens for block in built.blocks]
    made_from = {"tokenizer": "benchmark", "corpus_fingerprint": built.fingerprint}
    cache = teacher.fill(model, folder, dict(enumerate(blocks)), **made_from)
    return distillation.Data(blocks, functools.partial(built.order, seed), built.validation_ids.tolist(), cache)


if __name__ == "__main__":
    main()
