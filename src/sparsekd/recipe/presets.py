"""Recipes to start from, as plain values."""

from __future__ import annotations

from typing import Any

# The text that comes with installed packages, a small budget: what `sparsekd run MODEL` does without a recipe.
DEMO: dict[str, Any] = {
    "corpus": {
        "sources": {
            "wikipedia": {"embedded": "wikipedia", "weight": 0.8, "holdout": 0.2},
            "python": {"embedded": "python", "weight": 0.2, "holdout": 0.05},
        },
        "num_blocks": 100,
        "num_validation_blocks": 10,
        # an article quotes what a held-out one quotes, and functions share comments with held-out ones
        "overlap": "drop",
    },
    "compress": {"method": "neurons", "reduction": 0.35, "num_tokens": 15_360, "batch_size": 16},
    "distill": {
        "batch_size": 2,
        "micro_batch_size": 2,
        "learning_rate": 2e-4,
        "lr_scale": {"embeddings": 0},  # better after so short a training, and quicker: docs/experiments/teaching.md
    },
    "evaluate": {
        "texts": {"wikipedia": {"holdout_of": "wikipedia"}, "python": {"holdout_of": "python"}},
        "max_tokens": 4096,
    },
}

# The paper's calibration corpus (section IV-C) from the Hub: 50,000 samples of four domains.
PAPER: dict[str, Any] = {
    "corpus": {
        "sources": {
            "c4": {"hub": "allenai/c4", "config": "en", "split": "train", "weight": 0.30},
            "wikitext": {
                "hub": "Salesforce/wikitext",
                "config": "wikitext-2-raw-v1",
                "split": "train",
                "weight": 0.25,
            },
            "gsm8k": {
                "hub": "openai/gsm8k",
                "config": "main",
                "split": "train",
                "text": "{question}\n{answer}",
                "weight": 0.25,
            },
            "code": {
                "hub": "codeparrot/codeparrot-clean",
                "split": "train",
                "text": "content",
                "weight": 0.20,
            },
        },
        "seq_len": 512,
        "num_blocks": 50_000,
        "num_validation_blocks": 128,
        "pack": False,
    },
    "distill": {"epochs": 2, "batch_size": 16, "validations": 20},
}

PRESETS = {"demo": DEMO, "paper": PAPER}
