"""The processes of one run, as `torchrun` and `accelerate launch` start them: who writes, and who waits for whom."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

from sparsekd.device import rank_and_count
from sparsekd.errors import UsageError

_TIMEOUT = timedelta(minutes=30)  # of what all do together: one that hangs must not hold the others' machines
_PATIENCE = timedelta(days=7)  # while the main process does what cannot be shared, the others wait
_T = TypeVar("_T")


class Processes:
    """All processes of a run, which share its directory; one, unless a launcher started more.

    Raises `UsageError` under FSDP, which splits weights that a run has to save: DDP is what it can do.
    """

    def __init__(self, device: torch.device):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
                raise UsageError(
                    "a run in several processes uses DDP: start it with torchrun, or without FSDP in accelerate's "
                    "settings"
                )
            atexit.register(PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT).destroy_process_group)
        self.rank, self.count = rank_and_count()
        if self.count > 1:  # on the CPU: a GPU would be kept busy by waiting
            self._waiting: Any = torch.distributed.new_group(timeout=_PATIENCE, backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            torch.distributed.barrier(self._waiting)

    def main_first(self, step: Callable[[], _T]) -> _T:
        """What `step` returns; the others begin it when the main process is done, and find everything there."""
        if not self.is_main:
            self.wait()
        result = step()
        if self.is_main:
            self.wait()
        return result
