"""Does a token teach more? One cut, trained in several ways that take the same time, each with its own learning rate.

    python benchmarks/teaching.py DATA RUNS [--ways linear ...] [--seeds 42 123 456] [--dense] [--set KEY=VALUE ...]
    python benchmarks/teaching.py --summary NAME [--ways linear ...]

DATA is the folder that recipes/methods-smollm2.yaml describes, RUNS a folder outside of the checkout for the run
directory, which goes on where it was stopped. Each way changes one setting of `distill`; `plain` changes none. --dense
trains the dense model in these ways too, as the control. Whatever the way's own loss is, perplexity on five texts and
KL to the dense model decide. `python benchmarks/rows.py RUNS NAME` records what came out, of which --summary prints the
tables of docs/experiments/teaching.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
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
    "embeddings frozen": {"lr_scale": {"embeddings": 0.0}},  # of the recipe's scales, the others stay
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--summary", metavar="NAME")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--method", default="neurons")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.35])
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 123, 456])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.summary is not None:
        for table in summaries(given.summary, ["plain", *given.ways]):
            print("\n".join(markdown(table)))
        return
    if given.runs is None:
        parser.error("expected DATA and RUNS, or --summary")

    def arms(seed: Seed) -> dict[str, Round]:
        plain = {percent(r): seed.pruned(f"plain {percent(r)}", r) for r in seed.one_shot}
        if given.dense:
            plain["dense"] = seed.dense("plain dense")
        found: dict[str, Round] = {}
        for target, start in plain.items():
            for way in dict.fromkeys(["plain", *given.ways]):
                found[f"{way} {target}"] = trained(seed, f"{way} {target}", start, way)
        return found

    EXPERIMENTS[NAME], patterns.PATTERNS[NAME] = arms, lambda _: []
    settings = [f"corpus.root={given.data}", f"rounds={given.reductions}", f"compress.method={given.method}"]
    scales = [f"distill.lr_scale.{part}=1" for part in ("attention", "norms", "embeddings")]  # 5 is for low rank
    recipe = load_recipe(str(RECIPE), (*settings, *(scales if given.method != "two-sided" else []), *given.overrides))
    reproduce(NAME, recipe, given.runs, seeds=given.seeds, rates=given.rates, resume=is_run(given.runs))


def trained(seed: Seed, name: str, like: Round, way: str) -> Round:
    """The same model, trained in one of `WAYS`."""
    changes = dict(WAYS[way])
    if "lr_scale" in changes:
        changes["lr_scale"] = replace(like.distill.lr_scale, **changes["lr_scale"])
    return seed.trained(name, like, **changes)


def summaries(run: str, ways: Sequence[str]) -> Iterator[Titled]:
    """What came out of each model that was trained: means over the seeds and, where there are several, their spread."""
    prefix = _tables.folder_of("plain ")
    arms = [row["arm"] for row in _tables.read("trained", run=run)]
    for target in dict.fromkeys(arm.removeprefix(prefix) for arm in arms if arm.startswith(prefix)):
        yield summary(run, target, {_tables.folder_of(f"{way} {target}"): way for way in ways})


def summary(run: str, target: str, ways: dict[str, str]) -> Titled:
    """`ways` by the folders of their arms; the first is what the others are compared with."""
    measured, made = ([r for r in _tables.read(t, run=run) if r["arm"] in ways] for t in ("measured", "trained"))
    texts = list(dict.fromkeys(row["text"] for row in measured))
    before = [row for row in measured if row["stage"] == "compressed"]
    lines = [["before training", *_ratios(before, texts), "", _kl(before), "", ""]] if before else []
    plain: dict[int, float] = {}
    for arm, way in ways.items():
        rows = [row for row in measured if row["stage"] == "distilled" and row["arm"] == arm]
        if not rows:
            continue
        own = [row for row in made if row["arm"] == arm]
        by_seed = {
            seed: geometric_mean(row["to_dense"] for row in rows if row["seed"] == seed)
            for seed in dict.fromkeys(row["seed"] for row in rows)
        }
        plain = plain or by_seed
        differences = [ratio / plain[seed] - 1 for seed, ratio in by_seed.items()]
        spread = f" ± {stdev(differences):.1%}" if len(differences) > 1 else ""
        rates = ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in own}))
        seconds = fmean(row["seconds"]["distilled"] for row in own)
        to_plain = f"{fmean(differences):+.1%}{spread}"
        lines.append([way, *_ratios(rows, texts), to_plain, _kl(rows), rates, f"{seconds:.0f}"])
    header = ["way", *texts, "all texts", "to plain", "KL", "rate", "seconds"]
    return Titled(f"{target}: perplexity to the dense model after training", header, lines)


def _ratios(rows: Sequence[_tables.Row], texts: Sequence[str]) -> list[str]:
    """Of each text, and of all together."""
    groups = [[row for row in rows if row["text"] == text] for text in texts]
    return [f"{geometric_mean(row['to_dense'] for row in group):.3f}" for group in (*groups, rows)]


def _kl(rows: Sequence[_tables.Row]) -> str:
    return f"{fmean(row['kl'] for row in rows):.3f}"


if __name__ == "__main__":
    main()
