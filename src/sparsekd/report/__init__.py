"""A run as something to show. In: a run directory; out: `report.json`, one self-contained `report.html`, tables for the
console.
"""

from __future__ import annotations

from pathlib import Path

from sparsekd import files
from sparsekd.errors import DataError
from sparsekd.evaluate import continuations, perplexity_of, ratio
from sparsekd.recipe import Recipe, as_dict
from sparsekd.records import Record
from sparsekd.report import html
from sparsekd.run import (
    BENCH,
    CORPUS,
    STAGES,
    Round,
    folder_of,
    folders_of,
    planned,
    read_manifest,
    read_recipe,
    read_summary,
)

_MADE_BY = ("versions", "machine")  # in the run's manifest
_COSTS = ("seconds", "peak_memory_bytes")
_OF_A_MODEL = {"continuations": ("continuations",), "tasks": ("scores",)}  # stages, and what is shown of them


def gather(folder: Path) -> Record:
    """Everything the report shows, from the finished stages of a run, of the last round in full; raises `DataError` if
    a stage is missing."""
    if not (folder / "recipe.yaml").exists():
        raise DataError(
            f"{folder} holds no run, for there is no recipe.yaml in it, so no stage is finished: start one with "
            f"sparsekd run --out {folder}"
        )
    recipe = read_recipe(folder)
    rounds, manifest = planned(recipe), read_manifest(folder, _MADE_BY)
    corpus = _summary(folder, "corpus", CORPUS)
    found = [{stage: _summary(folder, stage, place) for stage, place in folders_of(one).items()} for one in rounds]
    last = found[-1]
    summaries = [corpus, *(summary for stages in found for summary in stages.values())]
    device_peaks = [summary.get("peak_device_memory_bytes") for summary in summaries]  # older runs have none
    seconds = {CORPUS: corpus["seconds"]}
    for one, stages in zip(rounds, found, strict=True):
        for stage, place in folders_of(one).items():
            seconds[stage if len(rounds) == 1 else place] = stages[stage]["seconds"]
    return {
        "recipe": as_dict(recipe),
        **{key: manifest[key] for key in _MADE_BY},
        "corpus": corpus,
        "cache": last["cache"],
        "compression": last["compress"],
        "distillation": last["distill"],
        "evaluation": last["evaluate"]
        | {
            "ratios": _ratios(last["evaluate"]["models"]),
            "continuations": _continuations(folder, recipe, rounds[-1]),
            "tasks": _tasks(folder, recipe, rounds[-1]),
        },
        "bench": _bench(folder, recipe),
        "rounds": [_round(one, stages) for one, stages in zip(rounds, found, strict=True)],
        "seconds": seconds,
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
        "peak_device_memory_bytes": max((peak for peak in device_peaks if peak is not None), default=None),
        "model_folder": str(rounds[-1].distilled / "model"),
    }


def _summary(folder: Path, stage: str, place: str) -> Record:
    shown = _OF_A_MODEL.get(stage) or (*STAGES[stage].shown, *_COSTS)
    summary = read_summary(folder / place, shown)  # an earlier version's has no checksum that vouches for the rest
    if summary is None:
        path = folder / place / "stage.json"
        raise DataError(f"{path} is missing, so stage {stage} is not finished: continue it with sparsekd run")
    return summary


def _bench(folder: Path, recipe: Recipe) -> Record | None:
    """Perplexity against speed and bytes; None where the recipe does not ask for it."""
    if not recipe.bench:
        return None
    summary = read_summary(folder / BENCH, ("points", "left_out", "device", "threads", "text"))
    if summary is None:
        raise DataError(f"{folder / BENCH} is not finished: continue it with sparsekd run")
    return summary


def _tasks(folder: Path, recipe: Recipe, one: Round) -> Record:
    """Scores of the dense model and of a round's own, by name."""
    places = one.models(recipe.model.name) if recipe.evaluate.tasks else {}
    return {name: _summary(folder, "tasks", str(folder_of(place, "tasks")))["scores"] for name, place in places.items()}


def _continuations(folder: Path, recipe: Recipe, one: Round) -> Record:
    """What the dense model and a round's own say, by name; none of a run of an earlier version, which asked nothing."""
    models = one.models(recipe.model.name) if recipe.evaluate.prompts else {}
    places = {name: str(folder_of(place, "continuations")) for name, place in models.items()}
    if not any((folder / place).exists() for place in places.values()):
        return {}
    said = {name: _summary(folder, "continuations", place)["continuations"] for name, place in places.items()}
    for name, records in said.items():
        if [record["prompt"] for record in records] != recipe.evaluate.prompts:
            raise DataError(f"{folder / places[name]} is of other prompts: continue it with sparsekd run")
    return continuations.compare(said)


def _round(one: Round, stages: Record) -> Record:
    """A round as the table and the picture of all rounds show it."""
    return {
        "name": one.name,
        "teachers": {str(place): weight for place, weight in one.teachers.items()},
        "mlp_reduction": stages["compress"]["mlp_reduction"] if one.compress else 0.0,
        "stop_reason": stages["distill"]["stop_reason"],
        "models": stages["evaluate"]["models"],
        "ratios": _ratios(stages["evaluate"]["models"]),
    }


def write(folder: Path) -> Record:
    """Writes report.json and report.html into the run directory and returns what they hold."""
    gathered = gather(folder)
    files.write_json(folder / "report.json", gathered)
    files.write_text(folder / "report.html", html.render(gathered))
    return gathered


def _ratios(models: Record) -> Record:
    """Perplexity over the dense model's, with the standard error of the paired comparison, by model and text."""
    return {
        name: {text: _ratio(result, models["dense"][text]) for text, result in texts.items()}
        for name, texts in models.items()
        if name != "dense"
    }


def _ratio(result: Record, dense: Record) -> dict[str, float | None]:
    value, error = ratio(perplexity_of(result), perplexity_of(dense))
    return {"ratio": value, "standard_error": error}
