"""The tables of what models came to, benchmarks/results/models: read, added to, and put together again.

    measured.jsonl     one row for each run, arm, seed, stage and text: perplexity, ratio to dense, calibration
    trained.jsonl      one row for each run, arm and seed: what was cut, the rate, the validations
    tasks.jsonl        one row for each score of the harness
    comparisons.jsonl  one row for each claim, or cause, and text: ratio, interval, verdict
    experiments.jsonl  one row for each experiment of a run: its arms, seeds, texts and resolved recipe
    origins.jsonl      one row for each command, commit and set of packages' versions that rows of the others are from
    windows.npz        per run and text, models x windows: the losses that paired intervals need

An arm is named as its folder in the run directory. The dense model is arm `dense`, of no seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd.evaluate import perplexity_of
from sparsekd.reproduce import ratios
from sparsekd.reproduce.results import Found
from sparsekd.reproduce.spread import compare

TABLES = Path(__file__).parent / "results" / "models"
DENSE = "dense"
KEYS = {  # what makes a row another one
    "measured": ("run", "arm", "seed", "stage", "text"),
    "trained": ("run", "arm", "seed"),
    "tasks": ("run", "arm", "seed", "stage", "task", "score"),
    "comparisons": ("run", "experiment", "claim", "cause", "model", "reference", "text"),
    "experiments": ("run", "experiment"),
}
_ORIGIN = ("versions", "command", "commit")  # columns that many rows share; a row's are found by its `origin`
_CALIBRATION = ("overconfidence", "accuracy", "brier", "entropy")
_AGREEMENT = ("kl", "top1")
_SAME = ("perplexity", "standard_error", "bits_per_byte", "paper_perplexity", "paper_standard_error")
_SAME += ("context", "stride")
Row = dict[str, Any]
Result = dict[str, Any]  # a model's measurements on a text, as an evaluation's stage.json has them


def read(table: str, **where: Any) -> list[Row]:
    """The rows whose columns have these values."""
    origins = {row.pop("origin"): row for row in _lines("origins")}
    rows = [row | origins.get(row.pop("origin", None), {}) for row in _lines(table)]
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def add(table: str, rows: Iterable[Row]) -> None:
    """Writes the rows, each in place of the one that it has the key of; floats to nine digits."""
    apart = [_apart(_rounded(row)) for row in rows]
    _put("origins", ("origin",), (origin for _, origin in apart if origin))
    _put(table, KEYS[table], (row for row, _ in apart))


def _apart(row: Row) -> tuple[Row, Row]:
    """A row without the columns of its origin, and these; both have the number that joins them."""
    origin = {name: row[name] for name in _ORIGIN if name in row}
    if not origin:
        return row, {}
    number = {"origin": hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:8]}
    return {name: value for name, value in row.items() if name not in origin} | number, number | origin


def _lines(table: str) -> list[Row]:
    path = TABLES / f"{table}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _put(table: str, names: tuple[str, ...], rows: Iterable[Row]) -> None:
    held = {tuple(row[name] for name in names): row for row in [*_lines(table), *rows]}
    TABLES.mkdir(parents=True, exist_ok=True)
    (TABLES / f"{table}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in held.values()), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def as_row(result: Result, dense: Result) -> Row:
    """The columns of a measurement; the ratio to the dense model's perplexity is paired over the windows."""
    compared = compare([perplexity_of(result)], [perplexity_of(dense)])
    row = {"to_dense": compared.ratio, "to_dense_interval": compared.interval}
    row |= {name: result[name] for name in _SAME}
    row |= {"tokens": result["num_tokens"], "paper_tokens": result["paper_num_tokens"]}
    calibration, agreement = result.get("calibration"), result.get("agreement")
    if calibration:
        row["calibration_error"] = calibration["expected_calibration_error"]
    for group, names in ((calibration, _CALIBRATION), (agreement, _AGREEMENT)):
        for name in names if group else ():
            row |= {name: group[name]["value"], f"{name}_error": group[name]["standard_error"]}
    return row


class Windows:
    """The windows' losses, and the bins of the calibration plots, of every measured model."""

    def __init__(self) -> None:
        self._path = TABLES / "windows.npz"
        self._arrays: dict[str, np.ndarray] = {}
        self._is_new = False
        if self._path.exists():
            with np.load(self._path, allow_pickle=False) as archive:
                self._arrays = dict(archive)

    def put(self, run: str, text: str, model: str, result: Result) -> None:
        """A model's, in place of what it had; its windows are those of all models of this run and text."""
        place, tokens = f"{run}/{text}", np.array(result["window_tokens"], np.int32)
        assert np.array_equal(self._arrays.setdefault(f"{place}/tokens", tokens), tokens), f"{place}: other windows"
        self._set(place, "losses", model, result["window_nll"])
        if result.get("calibration"):
            bins = result["calibration"]["bins"]
            self._set(place, "bins", model, [[b["confidence"], b["accuracy"], b["num_tokens"]] for b in bins])

    def _set(self, place: str, what: str, model: str, values: Any) -> None:
        names = self._arrays.get(f"{place}/{what}/models", np.array([], "U1")).tolist()
        rows = dict(zip(names, self._arrays.get(f"{place}/{what}", ()), strict=True))
        row = np.array(values, np.float32 if what == "bins" else np.float64)
        if np.array_equal(rows.get(model, ()), row):
            return
        self._is_new, rows[model] = True, row
        self._arrays[f"{place}/{what}/models"] = np.array(list(rows))
        self._arrays[f"{place}/{what}"] = np.stack(list(rows.values()))

    def get(self, run: str, text: str, model: str) -> Result:
        """`window_nll` and `window_tokens` as they were measured, and where they were kept the calibration's bins."""
        place = f"{run}/{text}"
        result = {"window_nll": self._row(place, "losses", model), "window_tokens": self._list(f"{place}/tokens")}
        bins = self._row(place, "bins", model)
        if bins is not None:
            result["bins"] = [
                {"confidence": confidence, "accuracy": accuracy, "num_tokens": round(tokens)}
                for confidence, accuracy, tokens in bins
            ]
        return result

    def _row(self, place: str, what: str, model: str) -> Any:
        names = self._arrays.get(f"{place}/{what}/models", np.array([], "U1")).tolist()
        return self._arrays[f"{place}/{what}"][names.index(model)].tolist() if model in names else None

    def _list(self, name: str) -> list[int]:
        return self._arrays[name].tolist()

    def save(self) -> None:
        """Unless nothing was put that was not there."""
        if not self._is_new:
            return
        TABLES.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self._path, allow_pickle=False, **self._arrays)  # type: ignore[arg-type]


def name_of(arm: str, seed: int | None, stage: str) -> str:
    """Of a model among the windows."""
    return DENSE if stage == DENSE else f"{arm}/{seed}/{stage}"


def folder_of(arm: str) -> str:
    """As `sparsekd reproduce` names an arm's folder."""
    return arm.replace(" ", "-").replace("%", "")


def results(run: str) -> dict[str, dict[str, Result]]:
    """What was measured in a run, by model and text, in the shape that an evaluation's stage.json has."""
    windows, found = Windows(), {}
    for row in read("measured", run=run):
        model = name_of(row["arm"], row["seed"], row["stage"])
        kept = windows.get(run, row["text"], model)
        bins = kept.pop("bins", None)
        result: Result = {name: row[name] for name in _SAME} | kept
        result |= {"num_tokens": row["tokens"], "paper_num_tokens": row["paper_tokens"]}
        result["agreement"] = _group(row, _AGREEMENT) if "kl" in row else None
        if bins:
            result["calibration"] = {"expected_calibration_error": row["calibration_error"], "bins": bins}
            result["calibration"] |= _group(row, _CALIBRATION)
        found.setdefault(model, {})[row["text"]] = result
    return found


def _group(row: Row, names: Iterable[str]) -> Row:
    return {name: {"value": row[name], "standard_error": row[f"{name}_error"]} for name in names}


def found(experiment: Row) -> dict[str, Any]:
    """What `sparsekd reproduce` wrote to `reproduce-<experiment>.json`, as far as its tables and pictures need it."""
    run, measured = experiment["run"], results(experiment["run"])
    trained = {(row["arm"], row["seed"]): row for row in read("trained", run=run)}
    scores = read("tasks", run=run)

    def models(arm: str, seed: int) -> dict[str, Any]:
        names = {stage: name_of(arm, seed, stage) for stage in (DENSE, "compressed", "distilled")}
        return {stage: measured[name] for stage, name in names.items() if name in measured}

    def tasks(arm: str, seed: int) -> dict[str, Any]:
        by_stage: dict[str, Any] = {}
        for row in scores if experiment["experiment"] == "II" else ():
            if row["stage"] == DENSE or (row["arm"], row["seed"]) == (arm, seed):
                task = by_stage.setdefault(row["stage"], {}).setdefault(row["task"], {"scores": {}})
                task["scores"][row["score"]] = {"value": row["value"], "standard_error": row["error"]}
        return by_stage

    arms = {
        arm: {
            str(seed): trained[folder_of(arm), seed]
            | {
                "steps": [[v["step"], v["tokens"]] for v in trained[folder_of(arm), seed]["validations"]],
                "models": models(folder_of(arm), seed),
                "tasks": tasks(folder_of(arm), seed),
            }
            for seed in experiment["seeds"]
        }
        for arm in experiment["arms"]
    }
    compared = read("comparisons", run=run, experiment=experiment["experiment"])
    evaluated = Found({arm: {int(seed): one["models"] for seed, one in a.items()} for arm, a in arms.items()})
    whole = experiment | {
        "arms": arms,
        "ratios": {arm: ratios(evaluated, experiment["experiment"], arm) for arm in arms},
        "patterns": [row for row in compared if row["claim"]],
        "attribution": [row for row in compared if row["cause"]],
    }
    return {name: value for name, value in whole.items() if value or name not in ("attribution", "recovery")}
