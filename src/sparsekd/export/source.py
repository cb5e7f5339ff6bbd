"""What `RUN|MODEL` names: the last model of a finished run, or a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsekd.errors import DataError
from sparsekd.recipe import model_name
from sparsekd.run import is_run, planned, read_recipe


@dataclass(frozen=True)
class Source:
    """A model to export, and the run that made it, which knows what it is worth."""

    name: str  # what `models.load` opens
    run: Path | None = None
    revision: str | None = None  # of a Hub id

    @property
    def base(self) -> str:
        """What the run started from; of a model without a run, itself."""
        return self.name if self.run is None else read_recipe(self.run).model.name


def locate(target: str, revision: str | None = None) -> Source:
    """The model that is meant. Raises `DataError` for a run that has no finished model."""
    folder = Path(target)
    if not (folder.is_dir() and is_run(folder)):
        return Source(model_name(target), revision=revision)
    where = planned(read_recipe(folder))[-1].distilled
    if not (folder / where / "stage.json").is_file():
        raise DataError(f"{folder} has no finished model yet: continue it with sparsekd run ... --out {folder}")
    return Source(str(folder / where / "model"), folder)
