"""The recorded experiments of `sparsekd reproduce` as Markdown, and their pictures.

    python benchmarks/reproduce_summary.py [RUN ...] [--pictures DIR]

Reads the tables of benchmarks/results/models, by default all of their runs. Prints every table of each experiment, and
of III a recovery curve for each round, from its few validations; of other runs the ratios to the dense model. With
--pictures every figure goes there as SVG. Claims and causes are compared again from the recorded windows, by the
intervals of today, and a verdict that is another one than was recorded is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tables

from sparsekd import files
from sparsekd.evaluate import perplexity_of
from sparsekd.recipe import load_recipe
from sparsekd.report import experiments, figures
from sparsekd.report.tables import Titled
from sparsekd.reproduce import RECOVERED, recovery_curve
from sparsekd.reproduce.arms import DENSE_KD, EQUAL_TOKENS, Seed
from sparsekd.reproduce.patterns import Model, Pattern, attribution, verdict
from sparsekd.reproduce.results import Found
from sparsekd.reproduce.spread import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    rows = [row for row in _tables.read("experiments") if not given.runs or row["run"] in given.runs]
    for row in rows:
        found = _compared_again(_tables.found(row))
        run, experiment = found["run"], found["experiment"]
        print(f"# {run}, {experiment}: seeds {found['seeds']}, {found['tokens']:,} tokens\n")
        for table in experiments.all_tables(found):
            print("\n".join(markdown(table)))
        if experiment == "III":
            print("\n".join(markdown(_curves(found["arms"]))))
        if given.pictures:
            for title, svg in figures.all_figures(found).items():
                files.write_text(given.pictures / f"{'-'.join([run, experiment, *title.lower().split()])}.svg", svg)
    for run in _unfinished():
        if not given.runs or run in given.runs:
            print(f"# {run}\n")
            print("\n".join(markdown(_to_dense(run))))


def _unfinished() -> list[str]:
    """The runs of trained arms that are of no finished experiment."""
    finished = {row["run"] for row in _tables.read("experiments")}
    measured = {row["run"] for row in _tables.read("measured")}
    runs = dict.fromkeys(row["run"] for row in _tables.read("trained"))
    return [run for run in runs if run in measured and run not in finished]


def _to_dense(run: str) -> Titled:
    """Each model of a run, with one seed, on each text: its perplexity over the dense model's and over Dense+KD's."""
    results = _tables.results(run)
    control = f"{DENSE_KD}/42/distilled"
    rows = []
    for name, by_text in results.items():
        for text, result in by_text.items() if name != _tables.DENSE else ():
            references = [results[reference][text] for reference in (_tables.DENSE, control) if reference in results]
            compared = [
                compare([perplexity_of(result)], [perplexity_of(reference)]).as_dict() for reference in references
            ]
            cells = [f"{one['ratio']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})" for one in compared]
            rows.append([name, text, *cells, *[""] * (2 - len(cells))])
    header = ["arm, seed, stage", "text", "to dense (95 % interval)", "to Dense+KD"]
    return Titled("Perplexity to the dense model's", header, rows)


def _compared_again(found: dict[str, Any]) -> dict[str, Any]:
    models = Found({name: {seed: arm["models"] for seed, arm in arms.items()} for name, arms in found["arms"].items()})

    def compared(entry: dict[str, Any], model: Model, reference: Model) -> dict[str, Any]:
        return entry | models.compare(model, reference, entry["text"]).as_dict()

    patterns = []
    for entry in found["patterns"]:
        pattern = Pattern(
            entry["claim"], *map(_model, (entry["model"], entry["reference"])), entry["side"], entry["bound"]
        )
        judged = verdict(models.compare(pattern.model, pattern.reference, entry["text"]), pattern)
        if judged != entry["verdict"]:
            print(f"{entry['claim']}, {entry['text']}: {entry['verdict']} when it was recorded, {judged} now")
        patterns.append(compared(entry, pattern.model, pattern.reference) | {"verdict": judged})
    causes = attribution(Seed(load_recipe("demo"), 0)) if "attribution" in found else {}
    again = [compared(entry, *causes[entry["cause"]]) for entry in found.get("attribution", [])]
    return found | {"patterns": patterns} | ({"attribution": again} if again else {})


def _model(name: str) -> Model:
    """Of its name in a record: the dense one, or an arm and its stage."""
    arm, _, stage = name.rpartition(", ")
    return Model(stage, arm or None)  # type: ignore[arg-type]


def _curves(arms: dict[str, Any]) -> Titled:
    """Of each round, over its seeds: the curve of the gap to Dense+KD on validation blocks, and what it asks for."""
    header, rows = ["round", "gap left, nats", "curve"], []
    for name in (name for name in arms if name not in (DENSE_KD, EQUAL_TOKENS)):
        curve = recovery_curve(_validated(arms[name]), _validated(arms[DENSE_KD]))
        fit, run_on = curve["fit"], curve["tokens"][-1]
        formula = f"{fit['floor']:.3f} + {fit['scale']:.3g} tokens^-{fit['power']:.2f}"
        budgets = [experiments.budget(tokens, run_on) for tokens in curve["tokens_for"].values()]
        rows.append([name, f"{curve['gaps'][-1]:.3f}", formula, *budgets])
    return Titled("Recovery of each round", [*header, *(f"tokens for {ratio:g} x" for ratio in RECOVERED)], rows)


def _validated(arm: dict[str, Any]) -> list[list[tuple[int, float]]]:
    """Of each seed, tokens trained on and the cross-entropy on the validation blocks."""
    after = [dict(one["steps"]) for one in arm.values()]
    return [
        [(tokens.get(v["step"], 0), v["ce"]) for v in one["validations"]]
        for tokens, one in zip(after, arm.values(), strict=True)
    ]


def markdown(table: Titled) -> Iterator[str]:
    yield f"{table.title}:\n"
    for row in (table.header, ["---"] * len(table.header), *table.rows):
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    main()
