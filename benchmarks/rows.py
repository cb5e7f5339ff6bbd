"""Adds a run directory to the tables of benchmarks/results/models; the directory itself is not committed.

    python benchmarks/rows.py RUN NAME [--command TEXT] [--commit HASH]
    python benchmarks/rows.py EVAL.json NAME

RUN is a directory of `sparsekd reproduce` or `sparsekd run`, finished or not: rows of the same run NAME, arm and seed
are replaced, all others stay. An arm that is still being trained has a row of the validations so far. EVAL.json is what
`sparsekd eval RUN/arms/.../model --tasks ... --json` printed. Without --command that of an experiment is worked out
from what `reproduce` wrote; RECIPE in it is the row's in experiments.jsonl. Without --commit it is the one that is
checked out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tables
from _record import head, joined
from _tables import DENSE, Row, Windows

from sparsekd.distillation.history import METRICS

STAGES = (DENSE, "compressed", "distilled")
PARTS = ("compressed", "search", "distilled", "eval", "facts")  # an arm's folders
FACTS = ("parameters", "bytes", "opens_in")
TRAINED = ("stop_reason", "best_step", "dense_ce")
CUT = ("mlp_reduction", "mlp_parameters_after", "model_reduction", "model_parameters_after", "predicted_kl")
VALIDATED = ("loss", "kd", "ce")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("name")
    parser.add_argument("--command")
    parser.add_argument("--commit", default=head())
    given = parser.parse_args()
    for table, count in add(given.source, given.name, given.command, given.commit).items():
        print(f"{table}: {count} rows")


def add(source: Path, name: str, command: str | None, commit: str) -> dict[str, int]:
    """Writes what there is; returns the number of rows by table."""
    if source.is_file():
        tables = {"tasks": list(_evaluated(_json(source), name))}
    elif (source / "arms").is_dir():
        tables = _reproduced(source, name)
    else:
        tables = _run(_json(source / "report.json"), name)
    for table, rows in tables.items():
        for row in rows if table != "comparisons" else ():
            row["command"] = command or row.get("command") or _command(row, tables.get("experiments", []))
            row["commit"] = commit
        _tables.add(table, rows)
    return {table: len(rows) for table, rows in tables.items()}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _command(row: Row, experiments: list[Row]) -> str | None:
    """That of the experiment with the most seeds of those which have the row's arm."""
    having = [one for one in experiments if row["arm"] in (DENSE, *map(_tables.folder_of, one["arms"]))]
    having = [one for one in having if row["seed"] in (None, *one["seeds"])]
    return max(having, key=lambda one: len(one["seeds"]))["command"] if having else None


def _reproduced(folder: Path, run: str) -> dict[str, list[Row]]:
    """The finished arms of a directory of `sparsekd reproduce`, and its finished experiments."""
    tables: dict[str, list[Row]] = {table: [] for table in _tables.KEYS}
    windows = Windows()
    for found in map(_json, sorted(folder.glob("reproduce-*.json"))):
        if "measured" not in found:  # a table of speed has no trained arms
            _experiment(found, run, tables)
    for arm in sorted(folder.glob("arms/*/seed-*")):
        is_finished = (arm / "eval" / "stage.json").exists()
        if not is_finished and not (arm / "distilled" / METRICS).exists():
            continue
        name, seed = arm.parent.name, int(arm.name.removeprefix("seed-"))
        parts = {part: _json(arm / part / "stage.json") for part in PARTS if (arm / part / "stage.json").exists()}
        inputs = _json(arm / "distilled" / "inputs.json")
        made_by = {"versions": joined(inputs.get("versions"))}
        key = {"run": run, "arm": name, "seed": seed}
        rate = inputs["distill"]["learning_rate"]
        losses = parts.get("search", {}).get("losses", {})
        costs = {"seconds": {part: summary["seconds"] for part, summary in parts.items()}}
        costs |= {"peak_memory_bytes": max((one["peak_memory_bytes"] for one in parts.values()), default=None)}
        start = folder / inputs["start"].get("folder", "") / "stage.json"  # it may be another arm's pruned model
        curves = parts["distilled"] if "distilled" in parts else _so_far(arm / "distilled" / METRICS)
        row = key | _trained(curves, _json(start) if start.parent.name == "compressed" else None)
        row |= {"learning_rate": rate, "losses": losses} | costs | made_by
        if is_finished:
            row |= {name: parts["facts"][name] for name in FACTS if "facts" in parts}
            row |= {"prefill": parts["eval"]["prefill"]}
            tables["measured"] += _measured(key, parts["eval"]["models"], windows, made_by)
        tables["trained"].append(row)
    windows.save()
    return tables


def _experiment(found: dict[str, Any], run: str, tables: dict[str, list[Row]]) -> None:
    key = {"run": run, "experiment": found["experiment"]}
    names = ("seeds", "rates", "texts", "tokens", "recipe")
    facts = {name: found[name] for name in names} | {"arms": list(found["arms"]), "recovery": found.get("recovery")}
    rates, seeds = ",".join(f"{rate:g}" for rate in found["rates"]), ",".join(map(str, found["seeds"]))
    command = f"sparsekd reproduce {found['experiment']} RECIPE --rates {rates} --seeds {seeds}"
    tables["experiments"].append(key | facts | {"command": command})
    pairs = [{"cause": None} | pattern for pattern in found["patterns"]]
    pairs += [{"claim": None, "model": None, "reference": None} | cause for cause in found.get("attribution", ())]
    tables["comparisons"] += [key | pair for pair in pairs]
    for arm, by_seed in found["arms"].items():
        for seed, one in by_seed.items():
            for stage, tasks in one["tasks"].items():
                tables["tasks"] += _scores(run, _tables.folder_of(arm), int(seed), stage, tasks)


def _measured(key: Row, models: dict[str, Any], windows: Windows, made_by: Row) -> Iterator[Row]:
    for stage in (stage for stage in STAGES if stage in models):
        place = key | ({"arm": DENSE, "seed": None} if stage == DENSE else {}) | {"stage": stage}
        for text, result in models[stage].items():
            windows.put(key["run"], text, _tables.name_of(place["arm"], place["seed"], stage), result)
            yield place | {"text": text} | _tables.as_row(result, models[DENSE][text]) | made_by


def _so_far(metrics: Path) -> dict[str, Any]:
    """The curves of a training that is not at its end, in the shape that a finished one's stage.json has."""
    whole = metrics.read_text(encoding="utf-8").rpartition("\n")[0]  # the last line may be half written
    lines = [json.loads(line) for line in whole.splitlines()]
    steps, validations = ([line for line in lines if line["kind"] == kind] for kind in ("step", "validation"))
    best = min(validations, key=lambda one: one["loss"])
    known = {"best_step": best["step"], "stop_reason": "still training", "dense_ce": None}
    return known | {"steps": steps, "validations": validations}


def _trained(distilled: dict[str, Any], compressed: dict[str, Any] | None) -> Row:
    """`steps` gives the tokens that each validation came after."""
    cut = {name: compressed[name] for name in CUT} if compressed else {"mlp_reduction": 0.0}
    tokens = {0: 0} | {step["step"]: step["num_tokens"] for step in distilled["steps"]}
    validations = [
        {"step": one["step"], "tokens": tokens[one["step"]]} | {name: one[name] for name in VALIDATED}
        for one in distilled["validations"]
    ]
    first, last = (distilled["steps"][0], distilled["steps"][-1]) if distilled["steps"] else ({}, {})
    return (
        cut
        | {"tokens": last.get("num_tokens", 0), "first_grad_norm": first.get("grad_norm")}
        | {name: distilled[name] for name in TRAINED}
        | {"validations": validations}
    )


def _run(report: dict[str, Any], run: str) -> dict[str, list[Row]]:
    """A directory of `sparsekd run`, of which report.json has every round's figures and the last one's training."""
    tables: dict[str, list[Row]] = {"measured": [], "trained": []}
    windows, seed = Windows(), report["recipe"]["seed"]
    made_by = {"versions": joined(report["versions"])}
    for one in report["rounds"]:
        key = {"run": run, "arm": one["name"], "seed": seed}
        tables["measured"] += _measured(key, one["models"], windows, made_by)
        row = key | {"mlp_reduction": one["mlp_reduction"], "stop_reason": one["stop_reason"]}
        if one is report["rounds"][-1]:
            costs = {name: report[name] for name in ("seconds", "peak_memory_bytes", "recipe")}
            rate = {"learning_rate": report["recipe"]["distill"]["learning_rate"], "losses": {}}
            row |= _trained(report["distillation"], report["compression"]) | rate | costs
        tables["trained"].append(row | made_by)
    windows.save()
    return tables


def _evaluated(printed: dict[str, Any], run: str) -> Iterator[Row]:
    for place, tasks in printed["tasks"].items():
        parts = Path(place).parts
        if "arms" in parts:
            arm, seed, stage = parts[parts.index("arms") + 1 :][:3]
            yield from _scores(run, arm, int(seed.removeprefix("seed-")), stage, tasks)
        else:
            yield from _scores(run, DENSE, None, DENSE, tasks)


def _scores(run: str, arm: str, seed: int | None, stage: str, tasks: dict[str, Any]) -> Iterator[Row]:
    key = {"run": run} | ({"arm": DENSE, "seed": None} if stage == DENSE else {"arm": arm, "seed": seed})
    for task, result in tasks.items():
        for score, measured in result["scores"].items():
            value = {"value": measured["value"], "error": measured["standard_error"]}
            yield key | {"stage": stage, "task": task, "score": score} | value | {"num_rows": result["num_rows"]}


if __name__ == "__main__":
    main()
