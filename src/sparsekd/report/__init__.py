"""A run directory as something to show: `report.json`, one self-contained `report.html`, tables for the console."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sparsekd import files
from sparsekd.errors import DataError
from sparsekd.evaluate import Perplexity, ratio
from sparsekd.recipe import as_dict, load_recipe
from sparsekd.report import html

STAGE_FOLDERS = {
    "corpus": "corpus",
    "cache": "round-01/cache",
    "compress": "round-01/compressed",
    "distill": "round-01/distilled",
    "evaluate": "round-01/eval",
}


def gather(folder: Path) -> dict[str, Any]:
    """Everything the report shows, from the finished stages of a run; raises `DataError` if one is missing."""
    stages = {}
    for name, place in STAGE_FOLDERS.items():
        path = folder / place / "stage.json"
        if not path.exists():
            raise DataError(f"{folder}: stage {name} is not finished: continue it with sparsekd run")
        stages[name] = files.read_json(path)
    return {
        "recipe": as_dict(load_recipe(str(folder / "recipe.yaml"))),
        **{key: files.read_json(folder / "manifest.json")[key] for key in ("versions", "machine")},
        "corpus": stages["corpus"],
        "cache": stages["cache"],
        "compression": stages["compress"],
        "distillation": stages["distill"],
        "evaluation": stages["evaluate"] | {"ratios": _ratios(stages["evaluate"]["models"])},
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages.values()),
        "model_folder": "round-01/distilled/model",
    }


def write(folder: Path) -> dict[str, Any]:
    """Writes report.json and report.html into the run directory and returns what they hold."""
    gathered = gather(folder)
    files.write_json(folder / "report.json", gathered)
    files.write_text(folder / "report.html", html.render(gathered))
    return gathered


def _ratios(models: dict[str, Any]) -> dict[str, Any]:
    """Perplexity over the dense model's, with the standard error of the paired comparison, by model and text."""
    return {
        name: {
            text: dict(zip(("ratio", "standard_error"), _ratio(result, models["dense"][text]), strict=True))
            for text, result in texts.items()
        }
        for name, texts in models.items()
        if name != "dense"
    }


def _ratio(result: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float]:
    names = [field.name for field in dataclasses.fields(Perplexity)]
    model, reference = (Perplexity(**{name: values[name] for name in names}) for values in (result, dense))
    return ratio(model, reference)
