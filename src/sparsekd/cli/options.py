"""The options that several verbs have, each declared once; the recipe that they ask for, and where its run goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsekd.recipe import PRESETS, Recipe, load_recipe

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL", help="A recipe (.yaml), preset, or model: folder, Hub id, .gguf, smollm2-135m."
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a recipe value; repeatable.")]
Reduction = Annotated[float | None, typer.Option(help="Fraction of the MLP parameters to remove: compress.reduction.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub model: model.revision.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps: the recipe's device.")]
Out = Annotated[Path | None, typer.Option(help="Run directory.  [default: runs/NAME-REDUCTION]")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out; an error if there is none.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove the run in --out and start again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print parameters, bytes, memory and time; do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def recipe_of(
    target: str, reduction: float | None, set_: list[str] | None, revision: str | None, device: str | None
) -> Recipe:
    """The target's recipe with what the options change; an option of its own wins over `--set`."""
    given = {"compress.reduction": reduction, "model.revision": revision, "device": device}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    return load_recipe(target, (*(set_ or []), *overrides))


def default_folder(target: str, recipe: Recipe) -> Path:
    """Where a run goes without `--out`."""
    reduction = (recipe.rounds or [recipe.compress.reduction])[-1]
    return Path("runs") / f"{name_of(target, recipe)}-{reduction:g}"


def name_of(target: str, recipe: Recipe) -> str:
    """What a run of this target is called: the preset, the recipe's file or the model."""
    if target in PRESETS:
        return target
    return Path(target).stem if target.endswith((".yaml", ".yml")) else Path(recipe.model.name).name
