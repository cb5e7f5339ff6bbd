"""Does a token teach more? One cut, trained in several ways that take the same time, each with its own learning rate.

    python benchmarks/teaching.py DATA RUNS [--ways linear ...] [--seeds 42 123 456] [--set KEY=VALUE ...]
    python benchmarks/teaching.py --summary NAME [--ways linear ...]

DATA is the folder that recipes/methods-smollm2.yaml describes, RUNS a folder outside of the checkout for the run
directory, which goes on where it was stopped. Each way changes one setting of `distill`; `plain` changes none. Whatever
the way's own loss is, perplexity on five texts and KL to the dense model decide. `python benchmarks/rows.py RUNS NAME`
records what came out, of which --summary prints the table of docs/experiments/losses.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import _tables
from reproduce_summary import markdown

from sparsekd.recipe import load_recipe
from sparsekd.report.tables import Titled
from sparsekd.reproduce import patterns, reproduce
from sparsekd.reproduce.arms import EXPERIMENTS, Seed, percent
from sparsekd.run import Round, is_run

NAME = "teaching"
RECIPE = Path(__file__).parents[1] / "recipes" / "methods-smollm2.yaml"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"schedule": "linear"},
    "T 1": {"temperature": 1.0},
    "2 blocks": {"batch_size": 2, "micro_batch_size": 2},
    "8 blocks": {"batch_size": 8},
    "KL 0.75": {"alpha": 0.75},
    "KL 1": {"alpha": 1.0},
    "entropy": {"weighting": "entropy"},
    "gap": {"weighting": "gap"},
    "domain": {"weighting": "domain"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--summary", metavar="NAME")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--method", default="neurons")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 123, 456])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.summary is not None:
        print("\n".join(markdown(summary(given.summary, ["plain", *given.ways]))))
        return
    if given.runs is None:
        parser.error("expected DATA and RUNS, or --summary")

    def arms(seed: Seed) -> dict[str, Round]:
        found: dict[str, Round] = {}
        for reduction in seed.one_shot:
            plain = seed.pruned(f"plain {percent(reduction)}", reduction)
            for way in dict.fromkeys(["plain", *given.ways]):
                name = f"{way} {percent(reduction)}"
                found[name] = seed.trained(name, plain, **WAYS[way])
        return found

    EXPERIMENTS[NAME], patterns.PATTERNS[NAME] = arms, lambda _: []
    settings = [f"corpus.root={given.data}", f"rounds={given.reductions}", f"compress.method={given.method}"]
    scales = [f"distill.lr_scale.{part}=1" for part in ("attention", "norms", "embeddings")]  # 5 is for low rank
    recipe = load_recipe(str(RECIPE), (*settings, *(scales if given.method != "two-sided" else []), *given.overrides))
    reproduce(NAME, recipe, given.runs, seeds=given.seeds, rates=given.rates, resume=is_run(given.runs))


def summary(run: str, ways: Iterable[str]) -> Titled:
    """What came out, over texts, seeds and reductions."""
    measured = _tables.read("measured", run=run, stage="distilled")
    texts = list(dict.fromkeys(row["text"] for row in measured))
    rates = {row["arm"]: row["learning_rate"] for row in _tables.read("trained", run=run)}
    lines, plain = [], math.nan
    for way in dict.fromkeys(ways):
        name = _tables.folder_of(way)
        rows = [row for row in measured if row["arm"].rpartition("-")[0] == name]
        if not rows:
            continue
        by_text = [[row["to_dense"] for row in rows if row["text"] == text] for text in texts]
        together = statistics.geometric_mean(row["to_dense"] for row in rows)
        plain = together if way == "plain" else plain
        ratios = [f"{statistics.geometric_mean(ratios):.3f}" for ratios in by_text]
        tried = sorted({rates[row["arm"]] for row in rows})
        row = [way, *ratios, f"{together:.3f}", f"{together / plain - 1:+.1%}"]
        lines.append([*row, f"{statistics.fmean(row['kl'] for row in rows):.3f}", ", ".join(f"{r:g}" for r in tried)])
    header = ["way", *texts, "all texts", "to plain", "KL", "rate"]
    return Titled("perplexity to the dense model after training", header, lines)


if __name__ == "__main__":
    main()
