"""The arms that decide: `neurons` and `two-sided` at 15, 35 and 65 %, trained for long on new text, with Dense+KD.

    python benchmarks/long.py DATA RUNS [--budgets 61440 1200128] [--seeds 3 1] [--only neurons,two-sided] [--frozen]
                              [--set KEY=VALUE ...]
    python benchmarks/long.py --summary NAME        e.g. long-1200128: prints a table for each model that was trained

DATA is the folder that the recipe, recipes/methods-smollm2.yaml, describes. RUNS is a folder outside of the checkout,
for a run directory of `sparsekd reproduce methods` for each budget, in tokens, with that many seeds. The control comes
last. Text that was not seen before comes first; a budget above NEW_TOKENS sees it several times. `--set rounds=[0.35]`
begins with one reduction; the others join it in the same directory. `--frozen` puts beside each arm one that does not
train the embeddings.

It can be stopped at any moment, by a signal or by cutting the power, and goes on when it is called again. An arm whose
inputs have changed since is named, and nothing is mixed. While it runs, the rows of run `long-<budget>` in the tables
of benchmarks/results/models are written again after every validation; `benchmarks/law.py` reads them.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _tables
import rows
import teaching
from _record import origin
from reproduce_summary import markdown

from sparsekd.errors import SparseKDError
from sparsekd.recipe import Recipe, load_recipe
from sparsekd.report.tables import Titled
from sparsekd.reproduce import SEEDS, reproduce
from sparsekd.reproduce.arms import DENSE_KD, EXPERIMENTS, Seed, methods
from sparsekd.run import Round, is_run

ROOT = Path(__file__).parents[1]
RATES = (5e-5, 1e-4, 2e-4, 4e-4)
VALIDATIONS = 24
FROZEN = "embeddings frozen"  # of teaching.py's ways
NEW_TOKENS = 3_000_000  # about what the sources hold for training, where all have the same share
SECONDS = 20  # between two looks for a new validation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--summary", metavar="NAME")
    parser.add_argument("--budgets", type=int, nargs="+", default=[61_440, 1_200_128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 1], help="as many as budgets")
    parser.add_argument("--only", default="neurons,two-sided")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "methods-smollm2.yaml"))
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.summary is not None:
        for table in summaries(given.summary):
            print("\n".join(markdown(table)))
        return
    if given.runs is None:
        parser.error("expected DATA and RUNS, or --summary")
    if given.runs.resolve().is_relative_to(ROOT):
        parser.error(f"RUNS is {given.runs}: expected a folder outside of the checkout, for it takes gigabytes")
    if len(given.seeds) != len(given.budgets):
        parser.error(f"--seeds has {len(given.seeds)} numbers: expected one for each of {len(given.budgets)} budgets")
    EXPERIMENTS["methods"] = functools.partial(arms, with_frozen=given.frozen)
    for budget, count in zip(given.budgets, given.seeds, strict=True):
        recipe = recipe_of(given.recipe, given.data, budget, given.overrides)
        folder = given.runs / str(budget)
        try:
            with recorded(folder, f"long-{budget}"):
                only = given.only.split(",")
                reproduce("methods", recipe, folder, seeds=SEEDS[:count], rates=RATES, only=only, resume=is_run(folder))
        except SparseKDError as error:
            print(f"long.py: {folder}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


def arms(seed: Seed, with_frozen: bool) -> dict[str, Round]:
    """The arms of experiment `methods`, the control last; beside each, one whose embeddings stay as they are."""
    found, planned = methods(seed), {}
    found[DENSE_KD] = found.pop(DENSE_KD)
    for name, made in found.items():
        planned[name] = made
        if with_frozen:
            planned[f"{name} frozen"] = teaching.trained(seed, f"{name} frozen", made, FROZEN)
    return planned


def summaries(run: str) -> Iterator[Titled]:
    """What came out of each model, with its embeddings trained and as they were."""
    arms = [row["arm"] for row in _tables.read("trained", run=run)]
    for name in dict.fromkeys(arm.removesuffix("-frozen") for arm in arms):
        yield teaching.summary(run, name, {name: "all trained", f"{name}-frozen": FROZEN})


def recipe_of(path: str, data: Path, budget: int, overrides: list[str]) -> Recipe:
    """With a corpus of as much of the budget as is new, and passes over it."""
    epochs = math.ceil(budget / NEW_TOKENS)
    changes = {
        "corpus.root": data,
        "corpus.num_blocks": round(budget / epochs / load_recipe(path, tuple(overrides)).corpus.seq_len),
        "distill.epochs": epochs,
        "distill.validations": VALIDATIONS,
    }
    settings = [f"{name}={value}" for name, value in changes.items()]
    return load_recipe(path, (*settings, *overrides))


@contextmanager
def recorded(folder: Path, name: str) -> Iterator[None]:
    """The rows of the run are written again whenever one of its trainings was validated, and at the end."""
    ended = threading.Event()
    made_by = origin()

    def watch() -> None:
        written = None
        while not ended.wait(SECONDS):
            found = num_validations(folder)
            if found and found != written:
                rows.add(folder, name, made_by["command"], made_by["commit"])
                written = found

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if num_validations(folder):
            rows.add(folder, name, made_by["command"], made_by["commit"])


def num_validations(folder: Path) -> int:
    """Of all arms so far, and of the finished ones' evaluations."""
    curves = folder.glob("arms/*/seed-*/distilled/metrics.jsonl")
    lines = sum(path.read_text(encoding="utf-8").count('"kind": "validation"') for path in curves)
    return lines + len(list(folder.glob("arms/*/seed-*/eval/stage.json")))


if __name__ == "__main__":
    main()
