"""Trained arms of `sparsekd reproduce` on texts that their run did not measure: is the gain a fit to the corpus?

    python benchmarks/other_texts.py measure DATA RUN [RUN ...]     # goes on where it was stopped
    python benchmarks/other_texts.py                                # prints the tables

DATA is the folder of recipes/reproduce-smollm2.yaml, whose texts are measured, 4,096 tokens of each (what is recorded
was measured on the first ones; windows are spread over the text now); RUN a directory of `reproduce` with the models in
it. GSM8K's test answers and HumanEval are of the kinds of text that the corpus has, stories of none. Strict perplexity,
ratios with 95 % intervals over seeds and windows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _record import RESULTS, record
from reproduce_summary import markdown

import sparsekd
from sparsekd import corpus, files
from sparsekd.recipe import load_recipe
from sparsekd.report.tables import Titled
from sparsekd.reproduce.spread import Comparison, compare

RECORDED = RESULTS / "other_texts.json"
RECIPE = str(Path(__file__).parents[1] / "recipes" / "reproduce-smollm2.yaml")
DENSE = "dense"
TEXTS = ("gsm8k", "code", "stories")
PAIRED = (  # an arm, what it is compared with
    ("Dense+KD", "dense-CE"),
    ("one-shot-35", "pruned-CE"),
    ("one-shot-35", "pruned-KL"),
    ("pruned-KL", "pruned-CE"),
    ("round-65-better-teacher", "round-65"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["measure"])
    parser.add_argument("data", nargs="?")
    parser.add_argument("runs", nargs="*", type=Path)
    given = parser.parse_args()
    measured: dict[str, Any] = files.read_json(RECORDED)["perplexities"] if RECORDED.exists() else {}
    if given.action:
        _measure(measured, given.data, given.runs)
    _show(measured)


def _measure(measured: dict[str, Any], data: str, runs: list[Path]) -> None:
    recipe = load_recipe(RECIPE, (f"corpus.root={data}",))
    texts = {name: corpus.read_text(recipe.evaluate.texts[name], recipe.corpus) for name in TEXTS}
    models = {(DENSE, "0"): recipe.model.name}
    for run in runs:
        for weights in sorted(run.glob("arms/*/seed-*/distilled/model/model.safetensors")):
            arm, seed = weights.parts[-5:-3]
            models.setdefault((arm, seed.removeprefix("seed-")), str(weights.parent))
    for (arm, seed), place in models.items():
        if seed in measured.get(arm, {}):
            continue
        model, tokenizer = sparsekd.load(place)
        measured.setdefault(arm, {})[seed] = {
            name: sparsekd.perplexity(model, tokenizer, text, max_tokens=recipe.evaluate.max_tokens).as_dict()
            for name, text in texts.items()
        }
        record("other_texts", {"perplexities": measured}, show=False)
        print(arm, seed, {name: round(one["perplexity"], 3) for name, one in measured[arm][seed].items()}, flush=True)


def _show(measured: dict[str, Any]) -> None:
    print("dense: " + ", ".join(f"{text} {measured[DENSE]['0'][text]['perplexity']:.2f}" for text in TEXTS) + "\n")
    to_dense = [(arm, DENSE) for arm in measured if arm != DENSE]
    paired = [pair for pair in PAIRED if measured.keys() >= {*pair}]
    for title, pairs in {"Arms to the dense model": to_dense, "Arms to each other": paired}.items():
        rows = [
            [f"{arm} to {other}", str(len(measured[arm])), *(_cell(_compare(measured, arm, other, t)) for t in TEXTS)]
            for arm, other in pairs
        ]
        print("\n".join(markdown(Titled(title, ["", "seeds", *TEXTS], rows))))


def _compare(measured: dict[str, Any], arm: str, other: str, text: str) -> Comparison:
    results = [by_text[text] for by_text in measured[arm].values()]
    if other == DENSE:
        return compare(results, [measured[DENSE]["0"][text]] * len(results))
    return compare(results, [measured[other][seed][text] for seed in measured[arm]])


def _cell(found: Comparison) -> str:
    interval = " to ".join(f"{bound:.3f}" for bound in found.interval or ())
    return f"{found.ratio:.3f} ({interval or 'unknown'})"


if __name__ == "__main__":
    main()
