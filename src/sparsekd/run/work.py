"""An open run, and what its stages share: its corpus and its models.

Models are opened only when a stage needs them, and the dense one is kept from stage to stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import corpus, distillation, files, models
from sparsekd.corpus import Corpus
from sparsekd.records import Record
from sparsekd.run.directory import Run
from sparsekd.run.passes import Passes
from sparsekd.run.reading import read_inputs
from sparsekd.run.rounds import CORPUS, Place
from sparsekd.run.stage import Stage

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
_T = TypeVar("_T")


class Work:
    """An open run, its corpus, and its models by place: what each is made of at once, its weights on first use."""

    def __init__(self, run: Run):
        self.run = run
        self.recipe = run.recipe
        self.placement = run.placement
        self._dense: Loaded | None = None
        self._identities: dict[str, Record] = {}
        self._led: tuple[Passes, Sequence[Place]] | None = None  # while this process leads the others' passes

    @functools.cached_property
    def blocks(self) -> Corpus:
        """The finished corpus; its stage makes it."""
        return corpus.load(self.run.folder / CORPUS)

    @property
    def dense(self) -> str:
        return self.recipe.model.name

    def identity(self, where: Place) -> Record:
        """What decides the weights of the model at `where`: its content, or what its stage was made from."""
        if isinstance(where, Path):
            return {"folder": str(where), "made_from": files.fingerprint(read_inputs(self.run.folder / where))}
        if where not in self._identities:  # hashing a model takes seconds
            commit = self.commit(where)
            found = {"content": models.source_hash(where)} if commit is None else {"name": where, "commit": commit}
            self._identities[where] = found
        return self._identities[where]

    def commit(self, where: Place) -> str | None:
        """The commit of the Hub model at `where`, the same for the whole run; None for local models."""
        if isinstance(where, Path):
            return None
        return self.run.commit(where, self.recipe.model.revision if where == self.dense else None)

    @property
    def dtype(self) -> str:
        """The number format of the teacher's pass and of evaluation, for the inputs of a stage."""
        return self.placement.number_format

    def open(self, where: Place) -> Loaded:
        """The model at `where`, to read; the dense one stays in memory until it is released or taken."""
        if where != self.dense:
            return self._open(where)
        if self._dense is None:
            self._dense = self._open(where)
        return self._dense

    def take(self, where: Place, dtype: torch.dtype) -> Loaded:
        """The model at `where`, to change: one of its own, for whoever opened it before may read it still."""
        if where == self.dense:
            self.release()
        return self._load(where, dtype)

    def release(self) -> None:
        """Room for other models."""
        self._dense = None

    def main_first(self, step: Callable[[], _T], places: Sequence[Place]) -> _T:
        """As `Processes.main_first`; where models are split, the others take part in the passes of those at `places`
        that the main process opens meanwhile."""
        processes = self.run.processes
        if not processes.is_split:
            return processes.main_first(step)
        held: dict[int, PreTrainedModel] = {}

        def model_of(number: int) -> PreTrainedModel:
            if number not in held:  # all stay: the main process reads a text with all of them in turns
                held[number] = self._load(places[number], self.placement.dtype)[0]
                models.split(held[number])
            return held[number]

        passes = Passes(processes, model_of)
        self.release()
        if not processes.is_main:
            passes.join()
            return step()
        self._led = passes, places
        try:
            result = step()
        finally:
            self._led = None
            self.release()
        passes.join()
        return result

    @contextmanager
    def shared(self, opened: Sequence[PreTrainedModel]) -> Iterator[None]:
        """Splits models, where they are to be, for as many passes as each process needs for its share; all have the
        same models, and call. The models cannot be used afterwards."""
        if not self.run.processes.is_split:
            yield
            return
        passes = Passes(self.run.processes, opened.__getitem__)
        for number, model in enumerate(opened):
            models.split(model)
            passes.announce(number, model)
        yield
        passes.join()
        self.release()

    def gathered(self, model: PreTrainedModel, where: Place) -> PreTrainedModel:
        """A model that was opened at `where` and has been split, put together in the main process's host memory; all
        have to call."""
        if not self.run.processes.is_split:
            return model
        weights = distillation.on_host(dict(model.named_parameters()), self.run.processes.is_main)
        if not self.run.processes.is_main:
            return model
        together, _ = self._load(where, torch.float32)
        with torch.no_grad():
            for name, parameter in together.named_parameters():
                parameter.copy_(weights[name])
        return together

    def _open(self, where: Place) -> Loaded:
        opened = self._load(where, self.placement.dtype)
        if self._led is not None:
            passes, places = self._led
            models.split(opened[0])
            passes.announce(places.index(where), opened[0])
        return opened

    def _load(self, where: Place, dtype: torch.dtype) -> Loaded:
        """The model at `where`, on the device or, where it is to be split, in the host's memory."""
        name = str(self.run.folder / where / "model") if isinstance(where, Path) else where
        self.run.console.say(f"loading {where} ({self.placement.device}, {self.placement.reason})")
        return models.load(
            name,
            revision=self.commit(where),
            dtype=dtype,
            device="cpu" if self.run.processes.is_split else self.placement.device,
            trust_remote_code=self.recipe.model.trust_remote_code,
        )

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: Stage) -> None:
        """Writes `model` in the stage's folder, in the number format that the dense checkpoint has, so that sizes
        compare."""
        if self.run.processes.is_main:
            dtype = models.checkpoint_dtype(self.dense, self.commit(self.dense))
            models.save(model, tokenizer, stage.folder / "model", dtype=dtype)
