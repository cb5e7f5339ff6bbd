"""Training states on disk: safetensors and JSON in folders that appear whole or not at all.

    checkpoints/  step-00000012/  model.safetensors  optimizer.safetensors  state.json
                  best-00000008/  model.safetensors  state.json

A checkpoint holds what trains, its optimizer's moments, and what the loop has to know; it needs the best weights that
its history names. The two newest checkpoints are kept, with their best weights: one that is damaged (`state.json` has
the others' sha256) falls back to the one before. Only the main process reads and writes; the others, which may be on
machines that do not see the folder, get from it what it has read.

Of weights that are split over processes, none holds all: `model` and `optimizer` are folders then, in which torch's
distributed checkpoints have each process write its parts as safetensors, so that all have to see the folder. Either
kind is read by any number of processes, split or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsekd import files, records
from sparsekd.device import rank_and_count
from sparsekd.errors import DataError, ResourceError, UsageError
from sparsekd.models import whole
from sparsekd.records import Record

parted: Any = torch.distributed.checkpoint  # documented names that are not marked as exported

_KEPT = 2
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one training. With several processes all of them call, and only the main one reads, writes,
    and holds copies of what is written. A GPU's weights are copied to the host and written in the `background`, one
    after the other, while the training goes on; `wait` for the last, and what went wrong with it."""

    def __init__(self, folder: Path, is_main: bool = True, background: Executor | None = None):
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
        """Fills what trains with the best weights; raises `DataError` when they are damaged or another model's."""
        self.wait()
        folder = self.folder / _best(step)
        self._agreed(lambda: _verified(folder))
        self._fill(folder, "model", trained(model))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Record) -> None:
        """Writes a checkpoint of `state`, JSON values with `step` and `best_step`, and removes what is not needed."""
        parts = {"model": trained(model), "optimizer": moments(model, optimizer)}
        self._write(_checkpoint(state["step"]), parts, state, lambda: self._remove_old(state["best_step"]))

    def wait(self) -> None:
        """Until all is on the disk; raises what kept it from there."""
        self._pending.result()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> Record | None:
        """Fills model and optimizer from the newest whole checkpoint and returns its state; None if there is none.

        One that is damaged, or whose best weights are, is named through `say` and passed over. Raises `DataError` when
        all there are are damaged, or of another model. The optimizer has its moments already, as `allocate` makes them.
        """
        state = self._agreed(lambda: self._newest(say))
        if state is not None:
            folder = self.folder / _checkpoint(state["step"])
            self._fill(folder, "model", trained(model))
            self._fill(folder, "optimizer", moments(model, optimizer))
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

    @torch.no_grad()
    def _fill(self, folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Copies a part of a checkpoint into tensors in place, so that ties and an optimizer's references hold."""
        path = Path(self._agreed(lambda: str(folder / part)))
        if self._agreed(path.is_dir):
            self._require_seen(path)
            reader = parted.HuggingFaceStorageReader(str(path))
            found: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
            tensors = _as_vectors(tensors)
            _require_same(path, {name: tuple(one.size) for name, one in found.items()}, tensors)
            parted.load(tensors, storage_reader=reader, no_dist=self._is_alone)
            return
        path = path.with_suffix(".safetensors")
        values = load_file(path) if self._is_main or self._is_alone else {}
        kinds = self._agreed(lambda: [(name, tuple(value.shape), value.dtype) for name, value in values.items()])
        _require_same(path, {name: shape for name, shape, _ in kinds}, tensors)
        for name, shape, dtype in kinds:  # one by one, so that no other process holds all
            device = tensors[name].device
            if self._is_alone:
                value = values[name].to(device)
            else:
                value = values[name].to(device) if self._is_main else torch.empty(shape, dtype=dtype, device=device)
                torch.distributed.broadcast(value, src=0)
            tensors[name].copy_(_like(value, tensors[name]))

    def _require_seen(self, folder: Path) -> None:
        """Raises `UsageError` unless all processes see the main one's folder."""
        seen: list[Any] = [folder.is_dir()]
        if not self._is_alone:
            seen *= rank_and_count()[1]
            torch.distributed.all_gather_object(seen, folder.is_dir())
        if not all(seen):
            raise UsageError(
                f"process {seen.index(False)} does not see {folder}, where under FSDP each writes its part: take a "
                "folder that all machines share"
            )

    def _write(
        self,
        name: str,
        parts: Mapping[str, Mapping[str, Tensor]],
        state: Record,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        self.wait()
        if any(isinstance(value, DTensor) for value in parts["model"].values()):
            self._write_parted(name, parts, state)
            if self._is_main:
                afterwards()
            return
        copies = {part: on_host(tensors, self._is_main) for part, tensors in parts.items()}
        if not self._is_main:
            return

        def job() -> None:
            self._require_space(copies)
            with files.atomic_path(self.folder / name) as temporary:
                temporary.mkdir()
                for part, tensors in copies.items():
                    save_file(tensors, temporary / f"{part}.safetensors")
                _describe(temporary, state)
            afterwards()

        are_copies = any(value.is_cuda for tensors in parts.values() for value in tensors.values())
        if are_copies and self._background is not None:
            self._pending = self._background.submit(job)
        else:
            job()

    def _write_parted(self, name: str, parts: Mapping[str, Mapping[str, Tensor]], state: Record) -> None:
        """Each process writes its parts, the main one what makes them a checkpoint."""
        if self._is_main:
            self._require_space(parts)
        with files.atomic_path(self.folder / name) if self._is_main else nullcontext() as temporary:
            if temporary is not None:
                temporary.mkdir()
            folder = Path(self._agreed(lambda: str(temporary)))
            self._require_seen(folder)
            for part, tensors in parts.items():
                writer = parted.HuggingFaceStorageWriter(str(folder / part), save_distributed=True)
                try:
                    parted.save(_as_vectors(tensors), storage_writer=writer)
                except parted.CheckpointException as error:
                    reason = next(iter(error.failures.values()))[0]
                    raise ResourceError(f"{self.folder / name} cannot be written: {reason}") from error
            if self._is_main:
                _describe(folder, state)

    def _require_space(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        size = sum(t.numel() * t.element_size() for tensors in parts.values() for t in tensors.values())
        files.require_space(self.folder, size, "a checkpoint")

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


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter that trains, by the parameter's name and its own."""
    return {
        f"{name}.{key}": value
        for name, parameter in trained(model).items()
        for key, value in optimizer.state[parameter].items()
    }


def on_host(tensors: Mapping[str, Tensor], is_wanted: bool = True) -> dict[str, Tensor]:
    """Whole copies; none where they are not wanted. All processes must call: each has a part of a split tensor."""
    copies = {}
    for name, value in tensors.items():
        together = whole(value)
        if is_wanted:
            copies[name] = together.detach().cpu().contiguous()
    return copies


def _as_vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory, numbers as vectors of one: torch's distributed checkpoints in safetensors take no others."""
    return {name: value.view(1) if value.ndim == 0 else value for name, value in tensors.items()}


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value` split over processes as `tensor` is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return value


def _require_same(path: Path, found: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
    """Raises `DataError` naming the first tensor that a file has and the model not, or the other way, or of another
    shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in dict.fromkeys([*wanted, *found]):
        there, here = found.get(name), wanted.get(name)
        if there != here:
            raise DataError(
                f"{path} is of another model: {name} is {there or 'missing'} there and {here or 'missing'} here; "
                "choose another folder, or remove that one to start anew"
            )


def _describe(folder: Path, state: Record) -> None:
    """Writes the state, with the hashes of all weights in the folder, which makes it a checkpoint."""
    written = sorted(folder.rglob("*.safetensors"))
    hashes = {path.relative_to(folder).with_suffix("").as_posix(): files.file_sha256(path) for path in written}
    records.write(folder / "state.json", state | {"sha256": hashes})


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
