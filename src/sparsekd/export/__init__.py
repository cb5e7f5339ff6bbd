"""Models for the software that serves them. In: a model; out: a folder that its own runtime has opened and agreed on.

A format is a file of this folder, found by its name. It writes the folder and opens it again in the runtime that it is
for; `export` compares what that says with what PyTorch says, and keeps the folder only where they agree.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import files, records
from sparsekd.errors import QualityError, UsageError
from sparsekd.export.checking import Runtime as Runtime
from sparsekd.export.checking import Tolerance as Tolerance
from sparsekd.export.checking import compare as compare
from sparsekd.export.checking import sample as sample
from sparsekd.export.source import Source as Source
from sparsekd.export.source import locate as locate
from sparsekd.records import Record

RECORD = "export.json"  # in the exported folder: what it was made from, versions, differences, hashes


@runtime_checkable
class Format(Protocol):
    """A file of this folder."""

    WEIGHTS: Mapping[str, Tolerance]  # the number formats that it can have, the first by default

    def require(self, model: PreTrainedModel) -> None:
        """Raises `UsageError` for a form that the format cannot take, `ResourceError` for a package that is missing."""

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: str, source: Source
    ) -> None:
        """Fills an empty folder."""

    def open(self, folder: Path) -> Runtime:
        """The exported model in the runtime that it is for."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Of the packages that wrote and opened it."""
        ...


def names() -> list[str]:
    """All formats."""
    modules = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    return sorted(module.__name__.rpartition(".")[2] for module in modules if hasattr(module, "WEIGHTS"))


def format_named(name: str) -> Format:
    """The format of that name; raises `UsageError` where there is none."""
    if name not in names():
        raise UsageError(f"--format {name}: expected one of {', '.join(names())}")
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module


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
    weights = weights or next(iter(chosen.WEIGHTS))
    if weights not in chosen.WEIGHTS:
        raise UsageError(f"--weights {weights}: format {format_name} has {', '.join(chosen.WEIGHTS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already: choose another --out, or remove it")
    chosen.require(model)
    files.require_space(out, sum(p.numel() * p.element_size() for p in model.parameters()), "the exported model")
    tokens = sample(model, tokenizer, text)
    with files.atomic_path(out) as temporary:
        temporary.mkdir()
        chosen.write(model, tokenizer, temporary, weights, source)
        found = compare(model, chosen.open(temporary), tokens)
        problem = chosen.WEIGHTS[weights].problem(found)
        if problem:
            raise QualityError(f"format {format_name} ({weights}) does not say what the model does: {problem}")
        written = [path for path in temporary.rglob("*") if path.is_file()]
        record = {
            "format": format_name,
            "weights": weights,
            "source": source.name,
            "versions": dict(chosen.versions()),
            "comparison": found.as_dict(),
            "bytes": sum(path.stat().st_size for path in written),
            "files": records.listing(temporary, written),
        }
        records.write(temporary / RECORD, record)
    return record
