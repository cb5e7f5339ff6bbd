"""What a run directory says of itself: the recipe, what each stage was made from, and what came out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsekd import files, records
from sparsekd.errors import DataError, MismatchError
from sparsekd.recipe import Recipe, load_recipe
from sparsekd.records import Record

Inputs = Record  # what a stage is made from: inputs.json
Summary = Record  # what came out of a stage: stage.json
KIND = "sparsekd run"  # what makes a folder ours: many programs write a manifest.json, none with this in it
VERSIONS = "versions"  # in inputs.json, beside the inputs
RECIPE = "recipe_sha256"  # in the run's manifest
FINISHED = "finished"  # in the run's manifest: names of stages, by which a lost stage.json is known from none yet
_MANIFEST_LOST = "put back a copy of it, or start again with another --out"
FILES = "files"  # in stage.json, beside the summary: sizes and hashes
_FIRST_MOMENT = re.compile(r"run\.lock|manifest\.json\.tmp-\d+")  # what there is before the manifest


def is_run(folder: Path) -> bool:
    """Whether the folder's manifest is one that a run wrote; raises `DataError` when it was and is damaged."""
    path = folder / "manifest.json"
    if not (path.is_file() and KIND.encode() in path.read_bytes()):
        return False
    return records.read(path, way_out=_MANIFEST_LOST).get("kind") == KIND


def read_manifest(folder: Path, needed: Iterable[str] = ()) -> Record:
    """A run's manifest; raises `DataError` when it is damaged, another record or lacks a key that is `needed`."""
    path = folder / "manifest.json"
    manifest = records.read(path, needed, _MANIFEST_LOST)
    if manifest.get("kind") != KIND:
        raise DataError(f"{path} is damaged: it is not what a run writes there; {_MANIFEST_LOST}")
    return manifest


def read_recipe(folder: Path) -> Recipe:
    """The recipe that a run was last called with; raises `DataError` when its file is not what was written, or the
    manifest, which says so, is another run's."""
    path, manifest = folder / "recipe.yaml", folder / "manifest.json"
    written = read_manifest(folder).get(RECIPE)
    if written is not None and written != files.file_sha256(path):
        raise DataError(
            f"{path} is damaged: its content is not what was written, or {manifest} is another run's; run the same "
            "command again, which writes both"
        )
    return load_recipe(str(path))


def is_free(folder: Path) -> bool:
    """Whether a folder is empty, but for what a run leaves that was killed in its first moment."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or ("run.lock" in names and all(_FIRST_MOMENT.fullmatch(name) for name in names))


def read_inputs(folder: Path) -> Inputs | None:
    """What the stage in `folder` was made from; None where none was begun. Raises `DataError` when it is damaged, or
    missing where something was made: of what, nobody knows then."""
    path = folder / "inputs.json"
    if not path.exists():
        if _has_output(folder):
            raise DataError(f"{path} is missing; {way_out(folder)}")
        return None
    return {key: value for key, value in records.read(path, (), way_out(folder)).items() if key != VERSIONS}


def as_now(inputs: Inputs) -> Inputs:
    """Inputs as this version words them: version 0.1 had the options of ranks beside those of zeros, all students went
    on from their own weights, and all rates followed a cosine."""
    if isinstance(trained := inputs.get("distill"), dict):
        inputs = inputs | {"distill": {"start": "weights", "schedule": "cosine"} | trained}
    section = inputs.get("compress")
    if not (isinstance(section, dict) and section.get("format") == "mask"):
        return inputs
    return inputs | {"compress": {key: section.get(key) for key in ("reduction", "method", "num_tokens", "batch_size")}}


def _has_output(folder: Path) -> bool:
    """Whether there is more than what a process left that was killed before it wrote anything whole."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return any(not files.is_temporary(path) and not (path / "inputs.json").exists() for path in inside)


def finished_stages(folder: Path) -> list[str]:
    """The stages of a run that were finished, by their names; a run of an earlier version knows of none."""
    return read_manifest(folder).get(FINISHED, [])


def read_summary(
    folder: Path,
    needed: Iterable[str] = (),
    warn: Callable[[str], None] = lambda text: None,
    *,
    needs_model: bool = True,
) -> Summary | None:
    """What the stage in `folder` was finished with; None where none is.

    Raises `DataError` naming the first of its files that is missing or not what was written, or the key of those
    `needed` that the summary lacks; a stage of an earlier version has no hashes, which `warn` hears of. Without
    `needs_model` its model, which is large, may have been removed.
    """
    path = folder / "stage.json"
    if not path.exists():
        return None
    summary = records.read(path, ("seconds", *needed), way_out(folder))  # of every version, and of no other record
    if FILES in summary:
        records.require(path, summary.pop(FILES), way_out(folder), None if needs_model else "model")
    else:
        warn(f"{folder} was finished by an earlier version, which kept no hashes: its files are not checked")
    return summary


def way_out(folder: Path) -> str:
    """What to do about a damaged stage."""
    return f"remove {folder} to make the stage again"


def answered_for(folder: Path) -> Iterator[Path]:
    """The files that a finished stage has to have, whole. Logs are not read again; corpus and cache list their own
    files in manifests, because these may be added to; a stage inside another one answers for itself."""
    yield folder / "inputs.json"
    if not (folder / "manifest.json").exists():
        yield from (path for path in folder.glob("*.json") if path.name not in ("inputs.json", "stage.json"))
        yield from (path for path in (folder / "model").rglob("*") if path.is_file())


def other_run(folder: Path, difference: str) -> MismatchError:
    """The error for a stage that was made from other things, with the first that differs."""
    return MismatchError(
        f"{folder} holds another run: {difference}; choose another --out, remove that folder to make the stage again, "
        "or replace the whole run with --fresh"
    )


def difference_of(found: Any, wanted: Any, name: str = "", now: str = "now") -> str | None:
    """The first field in which the two differ, with both values; None where they are equal. `now` says where the
    second one is."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return None if found == wanted else f"{name} is {found} there and {wanted} {now}"
    fields = dict.fromkeys([*wanted, *found])
    differences = (
        difference_of(found.get(key), wanted.get(key), f"{name}.{key}" if name else key, now) for key in fields
    )
    return next((difference for difference in differences if difference is not None), None)


def settings_in(inputs: Inputs, wanted: Record) -> Record:
    """Of a stage's inputs the keys that the settings `wanted` have, and of each of its sections the same."""
    found = {key: inputs.get(key) for key in wanted}
    return {
        key: {inner: section.get(inner) for inner in wanted[key]}
        if isinstance(section, dict) and isinstance(wanted[key], dict)
        else section
        for key, section in found.items()
    }
