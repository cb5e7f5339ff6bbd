"""The recorded experiments of `sparsekd reproduce` as Markdown, and their pictures.

    python benchmarks/reproduce_summary.py [FOLDER] [--pictures DIR]

FOLDER holds `reproduce-<experiment>.json` files, by default those of benchmarks/results/reproduce. Prints every table,
and of III a recovery curve for each round, from its few validations; with --pictures every figure goes there as SVG.
Claims and causes are compared again from the recorded windows, by the intervals of today, and a verdict that is another
one than was recorded is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsekd import files
from sparsekd.recipe import load_recipe
from sparsekd.report import experiments, figures
from sparsekd.report.tables import Titled
from sparsekd.reproduce import RECOVERED, ratios, recovery_curve
from sparsekd.reproduce.arms import DENSE_KD, EQUAL_TOKENS, Seed
from sparsekd.reproduce.patterns import Found, Model, Pattern, attribution, verdict

RECORDED = Path(__file__).parent / "results" / "reproduce"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RECORDED)
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    for path in sorted(given.folder.glob("**/reproduce-*.json")):
        found = _compared_again(files.read_json(path))
        where = path.relative_to(given.folder)
        print(f"# {where}: seeds {found['seeds']}, {found['tokens']:,} tokens\n")
        for table in experiments.all_tables(found):
            print("\n".join(markdown(table)))
        if found["experiment"] == "III":
            print("\n".join(markdown(_curves(found["arms"]))))
        if given.pictures:
            for title, svg in figures.all_figures(found).items():
                name = "-".join([*where.parent.parts, found["experiment"], *title.lower().split()])
                files.write_text(given.pictures / f"{name}.svg", svg)


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
    by_arm = {name: ratios(models, found["experiment"], name) for name in found["arms"]}
    return found | {"patterns": patterns, "ratios": by_arm} | ({"attribution": again} if again else {})


def _model(name: str) -> Model:
    """Of its name in a record: the dense one, or an arm and its stage."""
    arm, _, stage = name.rpartition(", ")
    return Model(stage, arm or None)  # type: ignore[arg-type]


def _curves(arms: dict[str, Any]) -> Titled:
    """Of each round, over its seeds: the curve of the gap to Dense+KD on validation blocks, and what it asks for."""
    header, rows = ["round", "gap left, nats", "curve"], []
    for name in (name for name in arms if name not in (DENSE_KD, EQUAL_TOKENS)):
        curve = recovery_curve(arms[name], arms[DENSE_KD])
        fit, run_on = curve["fit"], curve["tokens"][-1]
        formula = f"{fit['floor']:.3f} + {fit['scale']:.3g} tokens^-{fit['power']:.2f}"
        budgets = [experiments.budget(tokens, run_on) for tokens in curve["tokens_for"].values()]
        rows.append([name, f"{curve['gaps'][-1]:.3f}", formula, *budgets])
    return Titled("Recovery of each round", [*header, *(f"tokens for {ratio:g} x" for ratio in RECOVERED)], rows)


def markdown(table: Titled) -> Iterator[str]:
    yield f"{table.title}:\n"
    for row in (table.header, ["---"] * len(table.header), *table.rows):
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    main()
