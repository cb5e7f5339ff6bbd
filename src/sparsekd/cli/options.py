"""The options that several verbs have, each declared once; the recipe that they ask for, and where its run goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekd.errors import UsageError
from sparsekd.recipe import PRESETS, Recipe, load_recipe, model_name

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL", help="A recipe (.yaml), preset, or model: folder, Hub id, .gguf, smollm2-135m."
    ),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Folder, Hub id, .gguf, smollm2-135m, run; the others are compared with the first.",
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
Devices = Annotated[
    str | None,
    typer.Option(metavar="NxDEVICE", help="With --dry-run, plan for these: 8xH100, 8x80GB, 8x80GB:312 (TFLOP/s)."),
]
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


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of an option with commas between them; raises `UsageError` naming the option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is {text}: expected numbers with commas between them") from None


def words(option: str, text: str, known: Collection[str]) -> list[str]:
    """The words of an option with commas between them; raises `UsageError` for one that is not `known`."""
    found = [part.strip() for part in text.split(",")]
    unknown = next((word for word in found if word not in known), None)
    if unknown is not None:
        raise UsageError(f"{option} is {unknown}: expected {', '.join(known)}, several with commas between them")
    return found


def counts(option: str, text: str) -> list[int]:
    """The same for numbers of which each is at least 1."""
    found = numbers(option, text, int)
    if min(found) < 1:
        raise UsageError(f"{option} is {text}: expected numbers from 1 on")
    return found


def model_names(given: Sequence[str]) -> list[str]:
    """Each model's one name, of a run its last model's; raises `UsageError` for one that is given twice."""
    from sparsekd.export import locate

    names: list[str] = []
    for name in given:
        name = model_name(locate(name).name, names)
        if name in names:
            raise UsageError(f"model {name} is given twice: to see the noise, compare with a copy of the folder")
        names.append(name)
    return names
