"""One process's part of a training, alone or of several: accelerate, the share of each step, gradients, validations."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from sparsekd import records
from sparsekd.device import out_of_memory, trains_in_bfloat16
from sparsekd.distillation.history import Validation
from sparsekd.distillation.objective import Batch, Data, Objective, make_batch, require_document_mask
from sparsekd.distillation.optimizer import make_optimizer
from sparsekd.errors import DataError, Diverged, ResourceError, UsageError
from sparsekd.models import find_layers, is_split, split, whole
from sparsekd.recipe import Distill
from sparsekd.teacher import Cache

# Tokens of a training from which layers, and on a GPU the loss, are compiled. It took 26 s on an H200 and made the rest
# 1.8 times as fast, which two and a half million tokens win back (docs/experiments/gpu.md); in bfloat16 on two cores it
# took 31 s and made the layers of SmolLM2 1.2 times as fast, which 90,000 win back. Each further kind of layer is
# compiled by itself: 18 kinds took 100 s on another processor, where 1.04 times the speed wins them back in 870,000 (a
# lone trial). What a further kind takes on a GPU is a guess.
_FIRST_KIND = {"cuda": 2**22, "cpu": 2**18}
_FURTHER_KIND = {"cuda": 2**19, "cpu": 2**15}


@contextmanager
def accelerated(student: PreTrainedModel, options: Distill, folder: Path) -> Iterator[Accelerator]:
    """Accelerate, with the trackers that the recipe names; raises `ResourceError` for one that is not installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in options.trackers:
        if name not in available:
            raise ResourceError(
                f"distill.trackers: {name} is not installed here; there are: {', '.join(available) or 'none'}"
            )
    trackers: Any = options.trackers or None
    on_cpu = device_of(student).type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", log_with=trackers, project_dir=folder)
    if options.trackers:
        accelerator.init_trackers("trackers")
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model trains: where it is or, if it is to be split over processes, where each has its part."""
    own: Any = PartialState().device if is_split() else model.device
    return own


def is_worth_compiling(student: PreTrainedModel, options: Distill, num_tokens: int) -> bool:
    """Whether a training is worth the compiler: on a GPU, where Triton is there, or in bfloat16 on a processor, where
    g++ is there; and if it is long."""
    if options.gradient_checkpointing or is_split():  # with which it was not tried
        return False
    device = student.device
    if device.type not in _FIRST_KIND or num_tokens < compiled_from(device.type, num_kinds(student)):
        return False
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return trains_in_bfloat16(options.precision, device) and shutil.which("g++") is not None


def compiled_from(device_type: str, kinds: int) -> int:
    """Tokens from which a training is long enough for the compiler, with so many kinds of layers."""
    return _FIRST_KIND[device_type] + (kinds - 1) * _FURTHER_KIND[device_type]


def num_kinds(student: PreTrainedModel) -> int:
    """Of decoder layers, by the shapes of their weights: layers of one kind share their compiled code. Where neurons
    are taken out, most layers are of a kind of their own."""
    return len({tuple(weight.shape for weight in layer.parameters()) for layer in find_layers(student)})


@contextmanager
def compiled(
    student: PreTrainedModel, is_wanted: bool, backend: str | Callable[..., Any] = "inductor"
) -> Iterator[None]:
    """The decoder layers compiled one by one: those of one kind share their code, so that it is compiled once. They run
    as they are where nothing is trained, and where the compiler fails, which torch then logs. Undone at the end."""
    if not is_wanted:
        yield
        return
    layers = find_layers(student)
    for layer in layers:
        layer.compile(backend=backend)
    try:
        limit = torch._dynamo.config.recompile_limit + num_kinds(student)  # by default the ninth runs as it is
        settings = torch._dynamo.config.patch(suppress_errors=True, recompile_limit=limit)
        with settings, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def require_splittable(options: Distill) -> None:
    """Raises `UsageError` for a training that does not work in parts: merging adapters needs whole matrices, and an
    online teacher would be asked by one process more often than by another."""
    for setting, given in (("train", options.train), ("teacher", options.teacher)):
        if given in ("lora", "online"):
            raise UsageError(
                f"distill.{setting} is {given}, which FSDP cannot split: choose another, or start it without FSDP"
            )


def distribute(
    student: PreTrainedModel,
    data: Data,
    options: Distill,
    accelerator: Accelerator,
    reader: Executor,
    is_compiled: bool,
) -> tuple[Any, Worker]:
    """The optimizer and this process's worker: alone, with DDP as accelerate runs it, or split over processes.

    Raises `UsageError` for what cannot be trained in parts.
    """
    if is_split():
        require_splittable(options)
    elif accelerator.num_processes > 1:  # a single process leaves the student where it was put
        nn.Module.to(student, accelerator.device)
    if data.separator is not None:
        require_document_mask(student)
    device = device_of(student)
    bfloat16 = trains_in_bfloat16(options.precision, device)
    objective: Any = Objective(student, options, data.teacher.vocab_size, bfloat16, is_compiled)
    vocab_size = objective.vocab_size
    if is_split():
        split(student, objective)
        optimizer: Any = make_optimizer(student, options)
    else:
        objective, optimizer = accelerator.prepare(
            objective, make_optimizer(student, options), device_placement=[False, False]
        )
    size = options.micro_batch_size
    return optimizer, Worker(objective, data, accelerator, device, vocab_size, bfloat16, size, reader)


@dataclass
class Worker:
    """One process's share of the work, and how much of it goes through the model at once."""

    objective: Any  # an `Objective`, as accelerate wraps it
    data: Data
    accelerator: Accelerator
    device: torch.device
    vocab_size: int
    bfloat16: bool  # the products
    micro_batch_size: int
    reader: Executor  # one thread at most, that does all reading: a Parquet file is not to be read by two
    _ahead: dict[tuple[int, ...], Future[Batch]] = field(default_factory=dict)
    _stance: str = "default"  # to code that is compiled, where any is

    def read_ahead(self, ids: Sequence[int]) -> None:
        """Reads a later step's blocks and targets from the disk while the device works on this one's."""
        for micro in self._shares(ids) if isinstance(self.data.teacher, Cache) else []:
            self._ahead[tuple(micro)] = self.reader.submit(self._read, micro)

    def gradients(
        self, ids: Sequence[int], source_weights: Mapping[str, float] | None = None
    ) -> Float[Tensor, " 3"] | None:
        """Adds the gradient of a step's blocks up, whose KD is weighted by source, if it is; this process's part of
        loss, KD and CE. None: memory ran out."""
        denominator = self.data.num_positions(ids)
        if denominator == 0:
            raise DataError(f"no position of blocks {', '.join(map(str, ids))} predicts a token: nothing to learn from")
        sums = torch.zeros(3, device=self.device)
        shares, is_parted = self._shares(ids), isinstance(self.objective, FSDPModule)
        try:
            for number, micro in enumerate(shares, 1):
                batch = self._batch(micro, source_weights)
                # only the last backward pass adds the gradients of all processes up, unless they are held in parts only
                is_added = number == len(shares) or is_parted
                synced = nullcontext() if is_added else self.accelerator.no_sync(self.objective)
                with synced, torch.compiler.set_stance(self._stance):
                    outcome = self.objective(batch, denominator)
                    # which takes their mean, but the loss is a sum over all of them
                    (outcome.total * self.accelerator.num_processes).backward()
                sums += torch.stack([outcome.total, outcome.kd, outcome.ce]).detach()
                self._stance = "eager_on_recompile"  # a batch of another shape is not worth the compiler's time
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        return sums

    def clip(self, max_norm: float) -> float:
        """Scales the gradients down to a norm of at most `max_norm`, and returns what it was."""
        return float(whole(nn.utils.clip_grad_norm_(self.objective.parameters(), max_norm)))

    def validate(self, step: int, say: Callable[[str], None] = lambda text: None) -> Validation:
        """Losses on the validation blocks, by source of the blocks and over all."""
        while (validation := self._validated(step)) is None:  # memory ran out
            self.halve(say)
        return validation

    @torch.no_grad()
    def _validated(self, step: int) -> Validation | None:
        sources = self.data.sources
        by_domain: dict[str, list[int]] = {}
        for block_id in self.data.validation_ids:
            by_domain.setdefault(sources[block_id] if sources is not None else "all", []).append(block_id)
        sums = torch.zeros(len(by_domain), 4, device=self.device)
        try:
            for row, ids in zip(sums, by_domain.values(), strict=True):
                for micro in self._shares(ids):
                    outcome = self.objective(self._batch(micro), 1)
                    row += torch.stack([value.float() for value in outcome])
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None
        reduced: Any = self.accelerator.reduce(sums, "sum")
        sums = reduced.cpu().double()
        counts = torch.tensor([self.data.num_positions(ids) for ids in by_domain.values()]).to(sums)
        domains = {
            name: _losses(row / count)
            for name, row, count in zip(by_domain, sums, counts, strict=True)
            if int(count)  # a domain whose blocks are nothing but separators has no losses
        }
        overall = _losses(sums.sum(0) / counts.sum())
        if not math.isfinite(overall["loss"]):
            raise Diverged(f"the validation loss after step {step} is not finite: try a lower distill.learning_rate")
        return Validation(step, **overall, domains=domains)

    def summed(self, sums: Float[Tensor, " 3"]) -> list[float]:
        """The sums of all processes together."""
        reduced: Any = self.accelerator.reduce(sums, "sum")
        return reduced.tolist()

    def agreed(self, stop: int | None, is_due: bool) -> tuple[int | None, bool]:
        """The same decision everywhere: the signal that any process got, and whether the main one is due to save."""
        gathered: Any = self.accelerator.gather(torch.tensor([[stop or 0, is_due]], device=self.device))
        return int(gathered[:, 0].max()) or None, bool(gathered[0, 1])

    def halve(self, say: Callable[[str], None]) -> None:
        """A smaller micro batch after memory ran out; the step, and so the training, stays what it is but for rounding.

        Raises `ResourceError` where there is no smaller one.
        """
        size = self.micro_batch_size
        if self.accelerator.num_processes > 1 or size == 1:  # the other processes wait for this one: no second try
            raise ResourceError(
                f"out of memory with distill.micro_batch_size={size}: make it smaller, or set "
                "distill.gradient_checkpointing=true or a smaller corpus.seq_len"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._ahead.clear()  # of micro batches as they were
        self._stance = "default"
        self.micro_batch_size = size // 2
        say(f"  out of memory: distill.micro_batch_size is {size // 2} from here on, the step stays as it is")

    def _batch(self, micro: Sequence[int], source_weights: Mapping[str, float] | None = None) -> Batch:
        """Blocks and targets on the device; those that were read ahead, if they were."""
        if isinstance(self.data.teacher, Cache):
            reading = self._ahead.pop(tuple(micro), None) or self.reader.submit(self._read, micro)
            batch = reading.result()
        else:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):  # the teacher answers now
                batch = self._read(micro)
        if source_weights is not None and self.data.sources is not None:
            weights = [source_weights[self.data.sources[block_id]] for block_id in micro]
            batch = batch._replace(weights=torch.tensor(weights or [1.0]))
        return batch.to(self.device)

    def _read(self, micro: Sequence[int]) -> Batch:
        return make_batch(self.data, micro, self.vocab_size)

    def _shares(self, ids: Sequence[int]) -> list[list[int]]:
        """This process's micro batches, of blocks of about one length, which leaves little padding; as many as every
        other has, so some may be empty."""
        processes, micro_batch_size = self.accelerator.num_processes, self.micro_batch_size
        by_length = sorted(ids, key=lambda block_id: -len(self.data.blocks[block_id]))
        mine = by_length[self.accelerator.process_index :: processes]
        count = math.ceil(math.ceil(len(ids) / processes) / micro_batch_size)
        return [mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]


def _losses(means: Float[Tensor, " 4"]) -> dict[str, float]:
    loss, kd, ce, agreement = means.tolist()
    return {"loss": loss, "kd": kd, "ce": ce, "perplexity": records.exponential(ce), "agreement": agreement}
