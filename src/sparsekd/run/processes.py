"""The processes of one run, as `torchrun` and `accelerate launch` start them: who writes, and who waits for whom."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

from sparsekd.device import rank_and_count
from sparsekd.errors import UsageError
from sparsekd.models import is_split
from sparsekd.recipe import Recipe, as_dict
from sparsekd.run.machine import versions
from sparsekd.run.reading import difference_of
from sparsekd.run.signals import ignore_stop

_TIMEOUT = timedelta(minutes=30)  # of what all do together: one that hangs must not hold the others' machines
_PATIENCE = timedelta(days=7)  # while the main process does what cannot be shared, the others wait
_ALIKE = ("sparsekd", "torch", "transformers")  # packages whose versions decide what a process computes
_T = TypeVar("_T")


class Processes:
    """All processes of a run, which share its directory; one, unless a launcher started more.

    Raises `UsageError` for a version of FSDP that is not supported.
    """

    def __init__(self, device: torch.device):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            atexit.register(PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT).destroy_process_group)
        self.is_split = is_split()
        self.rank, self.count = rank_and_count()
        if self.count > 1:  # on the CPU: a GPU would be kept busy by waiting
            self._waiting: Any = torch.distributed.new_group(timeout=_PATIENCE, backend="gloo")

    def require_alike(self, recipe: Recipe) -> None:
        """Raises `UsageError`, in all processes, naming the first one whose recipe or versions are not the main one's:
        each would make its share of something else. Each may have a device of its own."""
        if self.count == 1:
            return
        known = versions()
        mine = {
            "recipe": {key: value for key, value in as_dict(recipe).items() if key != "device"},
            "version": {name: known[name] for name in _ALIKE},
        }
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, mine, self._waiting)
        for rank, theirs in enumerate(found):
            for what, expected in found[0].items():
                difference = difference_of(theirs[what], expected, now="in process 0")
                if difference is not None:
                    raise UsageError(
                        f"process {rank} has another {what} than process 0: {difference}; start all processes with "
                        "the same recipe, options and packages"
                    )

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Lets a process that fails say why: when another one has failed before it, the launcher sends all SIGTERM."""
        try:
            yield
        except BaseException:
            if self.count > 1:
                ignore_stop()
            raise

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            torch.distributed.barrier(self._waiting)

    def of_main(self, step: Callable[[], _T]) -> _T:
        """What `step` returns in the main process, for all of them."""
        found: list[Any] = [step() if self.is_main else None]
        if self.count > 1:
            torch.distributed.broadcast_object_list(found, group=self._waiting)
        return found[0]

    def turn(self, wanted: int | None) -> int | None:
        """The highest number that any process wants; None when none wants one. All have to call."""
        value = torch.tensor(-1 if wanted is None else wanted)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, self._waiting)
        return None if value < 0 else int(value)

    def main_first(self, step: Callable[[], _T]) -> _T:
        """What `step` returns; the others begin it when the main process is done, and find everything there."""
        if not self.is_main:
            self.wait()
        result = step()
        if self.is_main:
            self.wait()
        return result
