"""Where a model runs and in which number format, with the reason for the log."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor

from sparsekd.errors import ResourceError, UsageError

T = TypeVar("T")
R = TypeVar("R")

WITHOUT_FLOAT64 = {"mps"}  # types of devices
_EXACT = ContextVar("_EXACT", default=False)
_IS_FASTER = ContextVar[bool | None]("_IS_FASTER", default=None)  # this processor in bfloat16; None: to be measured
_WORTHWHILE = 1.2  # times as fast, from which bfloat16 is chosen; less may be a busy moment


class Placement(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of the weights
    reason: str
    has_fast_products: bool = False  # the products of a pass are bfloat16, though the weights are not

    @property
    def number_format(self) -> str:
        """Of weights and products, for the inputs of a stage."""
        weights = str(self.dtype).removeprefix("torch.")
        return f"{weights}, products in bfloat16" if self.has_fast_products else weights

    def products(self) -> torch.autocast:
        """A context for a model's passes: in it products are in bfloat16, where the placement says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.has_fast_products)


def place(device: str = "auto", dtype: str = "auto") -> Placement:
    """Chooses device and number format: a GPU in bfloat16 if there is one that knows it, else weights in float32, with
    products in bfloat16 on processors that are faster at them.

    Of processes that a launcher started, each takes its own GPU. Raises `UsageError` for a device that is not there or
    a dtype that is not a floating point one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if dtype != "auto":
        explicit = getattr(torch, dtype, None)
        if not isinstance(explicit, torch.dtype) or not explicit.is_floating_point:
            raise UsageError(f"model.dtype is {dtype!r}: expected auto, float32, bfloat16 or float16")
        return Placement(chosen, explicit, f"{dtype} as asked")
    if chosen.type == "cuda" and torch.cuda.is_bf16_supported():
        return Placement(chosen, torch.bfloat16, "bfloat16: this GPU supports it")
    if multiplies_bfloat16(chosen):
        gain = f"{bfloat16_gain():.1f} times as fast on this processor"
        return Placement(chosen, torch.float32, f"float32 with products in bfloat16: {gain}", True)
    return Placement(chosen, torch.float32, f"float32: the safe choice on {chosen.type}")


def solver_device(device: torch.device) -> torch.device:
    """Where float64 is computed with for tensors of `device`: there, or on the host if it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(value: Tensor) -> Tensor:
    """The same numbers in float64, on the `solver_device`; they are moved before they become float64."""
    return value.to(solver_device(value.device)).double()


def rank_and_count() -> tuple[int, int]:
    """Which of the processes that work together this one is, and how many there are; (0, 1) alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_first_to_fail() -> bool:
    """Whether none of the processes that work together has failed before; to be asked by one that has."""
    if rank_and_count()[1] == 1:
        return True
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("sparsekd has failed", 1) == 1
    except RuntimeError:  # the process that kept the store has ended, and said nothing
        return True


def lost_process(error: BaseException) -> bool:
    """Whether an exception says that another of the processes that work together does not answer any more."""
    is_of_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)  # which names its own source file
    return is_of_gloo or isinstance(error, torch.distributed.DistError)


def add_over_processes(value: torch.Tensor) -> None:
    """Makes a tensor, wherever it is, the sum of all processes' own, in place; alone it stays what it is."""
    if rank_and_count()[1] == 1:
        return
    shared = value.to("cuda") if torch.distributed.get_backend() == "nccl" else value.cpu()
    torch.distributed.all_reduce(shared)
    value.copy_(shared)


def trains_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a training's products are bfloat16, its weights and sums float32: as asked, or where that is faster."""
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster than in float32: on GPUs that know it, and on processors with the
    instructions for it, if a measurement says so too. Without them they can take a hundred times as long."""
    if _EXACT.get():
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and is_faster_in_bfloat16()


def is_faster_in_bfloat16() -> bool:
    """The same of this processor; a measurement, unless `measured_before` has an answer."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # of x86; those with AMX have it too
    if known is None or not known():
        return False
    answer = _IS_FASTER.get()
    return bfloat16_gain() > _WORTHWHILE if answer is None else answer


@contextmanager
def measured_before(is_faster: bool) -> Iterator[None]:
    """In it `is_faster_in_bfloat16` has this answer, where the processor has the instructions: a busy moment must not
    change what a run computes that goes on."""
    token = _IS_FASTER.set(is_faster)
    try:
        yield
    finally:
        _IS_FASTER.reset(token)


@contextmanager
def exact_products(is_wanted: bool) -> Iterator[None]:
    """In it nothing multiplies in bfloat16 on its own account: `multiplies_bfloat16` is false everywhere."""
    token = _EXACT.set(_EXACT.get() or is_wanted)
    try:
        yield
    finally:
        _EXACT.reset(token)


@functools.cache
def bfloat16_gain() -> float:
    """How many times as fast this processor multiplies in bfloat16 as in float32: a product of an MLP's size, the
    best of thirty in turns: a tenth of a second. On a busy machine the best of five gave 0.6 to 6.5 where this gave 2.1
    to 2.7."""
    factors = torch.ones(256, 512), torch.ones(512, 1536)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(30):
        for dtype, taken in seconds.items():
            a, b = (factor.to(dtype) for factor in factors)
            start = time.perf_counter()
            torch.mm(a, b)
            taken.append(time.perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def fast_products(device: torch.device) -> torch.autocast:
    """A context in which products are in bfloat16 where that is faster; weights, sums and norms stay what they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def slow_kernels(device: torch.device) -> str | None:
    """What to do about products in float32 and float64 at half speed, if this is a processor that MKL slows down."""
    if device.type != "cpu":
        return None
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:  # another system
        return None
    is_slowed = "AuthenticAMD" in known and "avx512f" in known and torch.backends.mkl.is_available()
    if not is_slowed or "mkl" in os.environ.get("LD_PRELOAD", ""):
        return None
    return (
        "MKL takes slow kernels on this AMD processor: docs/troubleshooting.md, half the speed on an AMD processor, "
        "has two lines that change it"
    )


@contextmanager
def rounded_factors(is_wanted: bool = True) -> Iterator[None]:
    """In it a processor that multiplies bfloat16 rounds the factors of a product in float32 to that; sums and result
    stay float32. Faster than casting them. On a torch that cannot do it, as before 2.9, nothing changes, and hardly
    anything on processors without AMX."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not is_wanted or settings is None or not multiplies_bfloat16(torch.device("cpu")):
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _AtOnce(Executor):
    """Does what is submitted when it is submitted."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        done: Future[R] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def beside(device: torch.device) -> Executor:
    """One thread for what is to go on beside the work of a GPU. A processor has all its cores at work already, and
    before Python 3.13 starting a thread hangs where memory has run out: there it is done at once."""
    return ThreadPoolExecutor(1) if device.type == "cuda" else _AtOnce()


# of oneDNN, torch, the system, Python
_NO_MEMORY = (
    "could not create a primitive",
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "can't start new thread",
)
# of Python, which forgets the MemoryError where there is no room for one more call on its stack
_NO_STACK = "error return without exception set"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; of the host's, most say it in the text only."""
    if isinstance(error, SystemError):
        return str(error) == _NO_STACK
    is_named = any(text in str(error) for text in _NO_MEMORY)
    return is_named or isinstance(error, (torch.OutOfMemoryError, MemoryError))


@contextmanager
def memory_named(where: Callable[[], str], way_out: str) -> Iterator[None]:
    """Makes running out of memory a `ResourceError` that says where and what to do, unless what ran out knew it."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(f"out of memory in {where()}: {way_out}") from error


class Batches:
    """Items in batches of at most `size`, which is halved for good whenever memory runs out.

    For messages, `setting` is the recipe's key of the size and `length` that of an item's length.
    """

    def __init__(self, size: int, setting: str, length: str, say: Callable[[str], None] = lambda text: None):
        self._size, self._setting, self._length, self._say = size, setting, length, say

    def run(self, items: Sequence[T], step: Callable[[Sequence[T]], R]) -> Iterator[R]:
        """What `step` returns for each batch; raises `ResourceError` when memory runs out for a single item."""
        while items:
            batch = items[: self._size]
            try:
                result = step(batch)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                result = None
            if result is None:  # outside of `except`, which holds on to what the failed step has made
                self._halve(len(batch))
                continue
            yield result
            del result  # what comes next is made before it would be replaced
            items = items[len(batch) :]

    def _halve(self, tried: int) -> None:
        self._size = tried // 2
        if not self._size:
            raise ResourceError(
                f"out of memory with {self._setting}=1: lower {self._length}, or choose a smaller model.dtype"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._say(f"  out of memory: {self._setting} is {self._size} from here on")


def measured_flops(placement: Placement) -> float:
    """Floating point operations a second of a 1024-wide matrix product here, the best of three; for time estimates."""
    size = 1024
    a = torch.ones(size, size, device=placement.device, dtype=placement.dtype)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """The most of a GPU's memory that this process has held so far; None for a CPU, which has the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":  # which knows no peak, but what its driver has taken is seldom given back
        return torch.mps.driver_allocated_memory()
    return None
