"""Trained arms of `sparsekd reproduce` on texts that their run did not measure: is the gain a fit to the corpus?

    python benchmarks/other_texts.py measure DATA RUN [RUN ...]     # goes on where it was stopped
    python benchmarks/other_texts.py                                # prints the tables

DATA is the folder of recipes/reproduce-smollm2.yaml, whose texts are measured, 4,096 tokens of each (what is recorded
was measured on the first ones; windows are spread over the text now); RUN a directory of `reproduce` with the models in
it. GSM8K's test answers and HumanEval are of the kinds of text that the corpus has, stories of none. Strict perplexity,
ratios with 95 % intervals over seeds and windows. The rows are those of run `other-texts` in benchmarks/results/models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _tables
from _record import origin
from _tables import DENSE, Result, Windows
from reproduce_summary import markdown

import sparsekd
from sparsekd import corpus
from sparsekd.evaluate import Perplexity, perplexity_of
from sparsekd.recipe import load_recipe
from sparsekd.report.tables import Titled
from sparsekd.reproduce.spread import Comparison, compare

RUN = "other-texts"
RECIPE = str(Path(__file__).parents[1] / "recipes" / "reproduce-smollm2.yaml")
TEXTS = ("gsm8k", "code", "stories")
PAIRED = (  # an arm, what it is compared with
    ("Dense+KD", "dense-CE"),
    ("one-shot-35", "pruned-CE"),
    ("one-shot-35", "pruned-KL"),
    ("pruned-KL", "pruned-CE"),
    ("round-65-better-teacher", "round-65"),
)
Measured = dict[str, dict[int | None, dict[str, Result]]]  # by arm, seed and text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["measure"])
    parser.add_argument("data", nargs="?")
    parser.add_argument("runs", nargs="*", type=Path)
    given = parser.parse_args()
    if given.action:
        _measure(given.data, given.runs)
    _show(_recorded())


def _recorded() -> Measured:
    results, found = _tables.results(RUN), {}
    for row in _tables.read("measured", run=RUN):
        model = _tables.name_of(row["arm"], row["seed"], row["stage"])
        found.setdefault(row["arm"], {})[row["seed"]] = results[model]
    return found


def _measure(data: str, runs: list[Path]) -> None:
    recipe = load_recipe(RECIPE, (f"corpus.root={data}",))
    texts = {name: corpus.read_text(recipe.evaluate.texts[name], recipe.corpus) for name in TEXTS}
    models: dict[tuple[str, int | None], str] = {(DENSE, None): recipe.model.name}
    for run in runs:
        for weights in sorted(run.glob("arms/*/seed-*/distilled/model/model.safetensors")):
            arm, seed = weights.parts[-5:-3]
            models.setdefault((arm, int(seed.removeprefix("seed-"))), str(weights.parent))
    measured = _recorded()
    for (arm, seed), place in models.items():
        if seed in measured.get(arm, {}):
            continue
        model, tokenizer = sparsekd.load(place)
        results = {
            name: sparsekd.perplexity(model, tokenizer, text, max_tokens=recipe.evaluate.max_tokens).as_dict()
            for name, text in texts.items()
        }
        measured.setdefault(arm, {})[seed] = results
        _record(arm, seed, results, measured[DENSE][None])
        print(arm, seed, {name: round(one["perplexity"], 3) for name, one in results.items()}, flush=True)


def _record(arm: str, seed: int | None, results: dict[str, Result], dense: dict[str, Result]) -> None:
    stage = DENSE if arm == DENSE else "distilled"
    key = {"run": RUN, "arm": arm, "seed": seed, "stage": stage}
    windows, rows = Windows(), []
    for text, result in results.items():
        windows.put(RUN, text, _tables.name_of(arm, seed, stage), result)
        rows.append(key | {"text": text} | _tables.as_row(result, dense[text]) | origin())
    windows.save()
    _tables.add("measured", rows)


def _show(measured: Measured) -> None:
    print("dense: " + ", ".join(f"{text} {measured[DENSE][None][text]['perplexity']:.2f}" for text in TEXTS) + "\n")
    to_dense = [(arm, DENSE) for arm in measured if arm != DENSE]
    paired = [pair for pair in PAIRED if measured.keys() >= {*pair}]
    for title, pairs in {"Arms to the dense model": to_dense, "Arms to each other": paired}.items():
        rows = [
            [f"{arm} to {other}", str(len(measured[arm])), *(_cell(_compare(measured, arm, other, t)) for t in TEXTS)]
            for arm, other in pairs
        ]
        print("\n".join(markdown(Titled(title, ["", "seeds", *TEXTS], rows))))


def _compare(measured: Measured, arm: str, other: str, text: str) -> Comparison:
    def of(name: str, seed: int | None) -> Perplexity:
        return perplexity_of(measured[name][seed][text])

    references = [of(DENSE, None) if other == DENSE else of(other, seed) for seed in measured[arm]]
    return compare([of(arm, seed) for seed in measured[arm]], references)


def _cell(found: Comparison) -> str:
    interval = " to ".join(f"{bound:.3f}" for bound in found.interval or ())
    return f"{found.ratio:.3f} ({interval or 'unknown'})"


if __name__ == "__main__":
    main()
