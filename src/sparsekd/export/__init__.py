"""Models for the software that serves them. In: a model; out: a folder that its own runtime has opened and agreed on.

A format is a file of this folder, found by its name. It writes the folder and opens it again in the runtime that it is
for; `export` compares what that says with what PyTorch says, and keeps the folder only where they agree.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparsekd
from sparsekd import files, models, records
from sparsekd.errors import QualityError, ResourceError, UsageError
from sparsekd.export import card
from sparsekd.export._tracing import Cached as Cached
from sparsekd.export.checking import Runtime as Runtime
from sparsekd.export.checking import Tolerance as Tolerance
from sparsekd.export.checking import compare as compare
from sparsekd.export.checking import sample as sample
from sparsekd.export.source import Source as Source
from sparsekd.export.source import locate as locate
from sparsekd.records import Record

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RECORD = models.EXPORTED  # in the exported folder: what it was made from, versions, differences, hashes


@runtime_checkable
class Format(Protocol):
    """A file of this folder. It may have `PACKAGES` too, the modules of the extra of its name; `usage`, which gives
    Python for the card of a folder; and, where it is for several runtimes, `check_further`, which asks the others and
    returns what the record says of them, and notes."""

    WEIGHTS: Mapping[str, Tolerance]  # the number formats that it can have; by default the checkpoint's, or the first

    def require(self, model: PreTrainedModel) -> None:
        """Raises `UsageError` for a form that the format cannot take, `ResourceError` for a package that is missing."""

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
    ) -> list[str]:
        """Fills an empty folder; returns what should be known of it."""
        ...

    def open(self, folder: Path) -> Runtime:
        """The exported model in the runtime that it is for."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Of the packages that wrote and opened it."""
        ...


def names() -> list[str]:
    """All formats."""
    found = [file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_")]
    return sorted(name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "WEIGHTS"))


def format_named(name: str) -> Format:
    """The format of that name; raises `UsageError` where there is none, `ResourceError` for a package that it lacks."""
    known = names()
    if name not in known:
        offered = (f"{one} (not installed: {_install(one)})" if _lacking(one) else one for one in known)
        raise UsageError(f"--format {name}: expected one of {', '.join(offered)}")
    if _lacking(name):
        raise ResourceError(f"format {name} needs {', '.join(_lacking(name))}: {_install(name)}")
    return _module(name)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


def _lacking(name: str) -> list[str]:
    """The packages of a format that are not installed."""
    return [one for one in getattr(_module(name), "PACKAGES", ()) if importlib.util.find_spec(one) is None]


def install_line(name: str) -> str | None:
    """What installs the packages of a format; None where all are there."""
    return _install(name) if _lacking(name) else None


def _install(name: str) -> str:
    return f'pip install "sparsekd[{name}]"'


def stored_as(source: Source, format_name: str) -> str:
    """The number format that a model is exported in by default: its checkpoint's, where the format has it."""
    known = list(format_named(format_name).WEIGHTS)
    found = str(models.checkpoint_dtype(source.name, source.revision)).removeprefix("torch.")
    return found if found in known else known[0]


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format_name: str,
    out: Path,
    source: Source,
    *,
    weights: str | None = None,
    text: str | None = None,
) -> Record:
    """Writes `model` as the folder `out`, which must not exist or be empty, and returns what the record there says.

    Raises `UsageError` for what cannot be exported so, `ResourceError` for a package or disk space that is missing,
    `QualityError` where the runtime does not say what PyTorch does: then there is no folder.
    """
    chosen = format_named(format_name)
    weights = weights or stored_as(source, format_name)
    if weights not in chosen.WEIGHTS:
        raise UsageError(f"--weights {weights}: format {format_name} has {', '.join(chosen.WEIGHTS)}")
    require_free(out)
    chosen.require(model)
    files.require_space(out, sum(p.numel() * p.element_size() for p in model.parameters()), "the exported model")
    tokens = sample(model, tokenizer, text)
    with files.atomic_path(out) as temporary:
        temporary.mkdir()
        notes = chosen.write(model, tokenizer, temporary, weights, source)
        written = [path for path in temporary.rglob("*") if path.is_file()]
        found = compare(model, chosen.open(temporary), tokens)
        problem = chosen.WEIGHTS[weights].problem(found)
        if problem:
            raise QualityError(f"format {format_name} ({weights}) does not say what the model does: {problem}")
        check_further = getattr(chosen, "check_further", None)
        further = check_further(model, tokenizer, temporary, weights, source, tokens) if check_further else {}
        dense, number = models.forms.dense_sizes(model).model, getattr(torch, weights, None)
        record = {
            "format": format_name,
            "weights": weights,
            "source": source.name,
            "notes": notes + further.pop("notes", []),
            "sparsekd": sparsekd.__version__,
            "versions": dict(chosen.versions()),
            "comparison": found.as_dict(),
            "parameters": models.num_parameters(model),
            "dense_parameters": dense,
            "dense_bytes": dense * number.itemsize if number in _FLOATS else None,  # others have scales beside them
            **further,
            "bytes": sum(path.stat().st_size for path in written),
            "files": records.listing(temporary, written),
        }
        usage = getattr(chosen, "usage", None)
        card.write(temporary, model, source, record, usage and usage(temporary))  # not listed: it may be added to
        records.write(temporary / RECORD, record)
    return record


def require_free(out: Path) -> None:
    """Raises `UsageError` for a folder that is there and has something in it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already: choose another --out, or remove it")
