"""Training states on disk: safetensors and JSON in folders that appear whole or not at all.

    checkpoints/  step-00000012/  model.safetensors  optimizer.safetensors  state.json
                  best-00000008/  model.safetensors  state.json

A checkpoint holds what trains, its optimizer's moments, and what the loop has to know; it needs the best weights that
its history names. The two newest checkpoints are kept, with their best weights: one that is damaged (`state.json` has
the others' sha256) falls back to the one before. Weights that are split over processes are put together before they
are written and split again when read, so the number of processes may change. Only the main process reads and writes;
the others, which may be on machines that do not see the folder, get from it what it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsekd import files, records
from sparsekd.device import rank_and_count
from sparsekd.errors import DataError
from sparsekd.records import Record

_KEPT = 2
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one training. With several processes all of them call, and only the main one reads, writes,
    and holds copies of what is written. A GPU's weights are copied to the host and written in the `background`, one
    after the other, while the training goes on; `wait` for the last, and what went wrong with it."""

    def __init__(self, folder: Path, is_main: bool = True, background: ThreadPoolExecutor | None = None):
        self.folder, self._is_main = folder, is_main
        self._background, self._pending = background, Future[None]()
        self._pending.set_result(None)
        self._is_alone = rank_and_count()[1] == 1
        if is_main:
            files.remove_temporaries(folder)

    def keep_best(self, model: nn.Module, step: int) -> None:
        """Writes the weights after `step` as the best so far."""
        self._write(_best(step), {"model": trained(model)}, {"step": step})

    def load_best(self, model: nn.Module, step: int) -> None:
        """Fills what trains with the best weights; raises `DataError` when they are damaged."""
        self.wait()
        folder = self.folder / _best(step)
        self._agreed(lambda: _verified(folder))
        _fill(model, self._tensors(folder / "model.safetensors", model))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Record) -> None:
        """Writes a checkpoint of `state`, JSON values with `step` and `best_step`, and removes what is not needed."""
        moments = {
            f"{name}.{key}": value
            for name, parameter in trained(model).items()
            for key, value in optimizer.state[parameter].items()
        }
        parts = {"model": trained(model), "optimizer": moments}
        self._write(_checkpoint(state["step"]), parts, state, lambda: self._remove_old(state["best_step"]))

    def wait(self) -> None:
        """Until all is on the disk; raises what kept it from there."""
        self._pending.result()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> Record | None:
        """Fills model and optimizer from the newest whole checkpoint and returns its state; None if there is none.

        One that is damaged, or whose best weights are, is named through `say` and passed over. Raises `DataError` when
        all there are are damaged.
        """
        state = self._agreed(lambda: self._newest(say))
        if state is not None:
            folder = self.folder / _checkpoint(state["step"])
            _fill(model, self._tensors(folder / "model.safetensors", model))
            _fill_moments(model, optimizer, self._tensors(folder / "optimizer.safetensors", model))
        return state

    def _newest(self, say: Callable[[str], None]) -> Record | None:
        reason = None
        for folder in reversed(self._checkpoints()):
            try:
                state = _verified(folder, ("step", "best_step"))
                _verified(self.folder / _best(state["best_step"]))
            except DataError as error:
                reason = error
                say(f"warning: {error}; going back to the checkpoint before")
                continue
            return state
        if reason is not None:
            raise DataError(
                f"{reason}, and no whole checkpoint is left; remove {self.folder} to start this training again"
            )
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-????????"))

    def _agreed(self, read: Callable[[], _T]) -> _T:
        """What `read` returns or raises in the main process, in all of them."""
        outcome: list[Any] = [None, None]
        if self._is_main or self._is_alone:
            try:
                outcome[0] = read()
            except (DataError, OSError) as error:
                outcome[1] = error
        if not self._is_alone:
            torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _tensors(self, path: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the main process reads from a file, by name; with several processes where their model is, one by one,
        so that no other process holds all."""
        values = load_file(path) if self._is_main or self._is_alone else {}
        if self._is_alone:
            yield from values.items()
            return
        forms = self._agreed(lambda: [(name, value.shape, value.dtype) for name, value in values.items()])
        device = next(model.parameters()).device
        for name, size, dtype in forms:
            value = values[name].to(device) if self._is_main else torch.empty(size, dtype=dtype, device=device)
            torch.distributed.broadcast(value, src=0)
            yield name, value

    def _write(
        self,
        name: str,
        parts: Mapping[str, Mapping[str, Tensor]],
        state: Record,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        self.wait()
        copies = {part: on_host(tensors, self._is_main) for part, tensors in parts.items()}
        if not self._is_main:
            return

        def job() -> None:
            size = sum(t.numel() * t.element_size() for tensors in copies.values() for t in tensors.values())
            files.require_space(self.folder, size, "a checkpoint")
            with files.atomic_path(self.folder / name) as temporary:
                temporary.mkdir()
                for part, tensors in copies.items():
                    save_file(tensors, temporary / f"{part}.safetensors")
                hashes = {part: files.file_sha256(temporary / f"{part}.safetensors") for part in parts}
                records.write(temporary / "state.json", state | {"sha256": hashes})
            afterwards()

        are_copies = any(value.is_cuda for tensors in parts.values() for value in tensors.values())
        if are_copies and self._background is not None:
            self._pending = self._background.submit(job)
        else:
            job()

    def _remove_old(self, best_step: int) -> None:
        kept = self._checkpoints()[-_KEPT:]
        needed = {_best(best_step), *(path.name for path in kept)}
        for path in kept:
            try:
                needed.add(_best(records.read(path / "state.json", ("best_step",))["best_step"]))
            except DataError:
                continue  # a damaged one needs nothing; it is named when it is read
        for path in self.folder.iterdir():
            if path.name not in needed:
                files.remove(path)


def verify(folder: Path) -> None:
    """Raises `DataError` naming the first file of the checkpoints there that is missing or not what was written."""
    try:
        for path in sorted(folder.glob("step-????????")):
            _verified(folder / _best(_verified(path, ("step", "best_step"))["best_step"]))
        for path in sorted(folder.glob("best-????????")):
            _verified(path)
    except DataError as error:
        raise DataError(f"{error}; the next call goes on from a whole checkpoint, or says that none is left") from None


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name, tied parameters once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def on_host(tensors: Mapping[str, Tensor], is_wanted: bool = True) -> dict[str, Tensor]:
    """Whole copies; none where they are not wanted. All processes must call: each has a part of a split tensor."""
    copies = {}
    for name, value in tensors.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if is_wanted:
            copies[name] = whole.detach().cpu().contiguous()
    return copies


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` where and how `parameter` is: on its device, split over processes as it is."""
    on_device = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)
    return on_device


@torch.no_grad()
def _fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Copies values into the parameters in place, so that ties and an optimizer's references hold."""
    parameters = trained(model)
    for name, value in values:
        parameter = parameters.pop(name)
        parameter.copy_(_like(value, parameter))
    assert not parameters, f"the checkpoint lacks {', '.join(parameters)}"


def _fill_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Iterable[tuple[str, Tensor]]) -> None:
    parameters = trained(model)
    for name, value in moments:
        parameter_name, _, key = name.rpartition(".")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = _like(value, parameter)


def _verified(folder: Path, needed: tuple[str, ...] = ()) -> Record:
    """The folder's state; raises `DataError` naming the file that is missing, not what was written, or of another
    step."""
    path = folder / "state.json"
    state = records.read(path, needed)
    if not isinstance(state.get("sha256"), dict):
        raise DataError(f"{path} is damaged: no hashes in it")
    if "step" in state and not folder.name.endswith(f"-{state['step']:08}"):  # best weights of before have none
        raise DataError(f"{path} is of step {state['step']}, not of its folder's")
    for name, expected in state["sha256"].items():
        path = folder / f"{name}.safetensors"
        if not path.exists() or files.file_sha256(path) != expected:
            raise DataError(f"{path} is damaged or missing")
    return state


def _checkpoint(step: int) -> str:
    return f"step-{step:08d}"


def _best(step: int) -> str:
    return f"best-{step:08d}"
