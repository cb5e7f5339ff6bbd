"""Work in forked children, so that a hang, an abort or a bomb is an outcome like any other.

A child is forked from a process that has imported everything and computed nothing: each begins like a fresh
interpreter, in milliseconds. It sends what each job came to through a pipe; a child that is silent for too long, or
dies, has failed the job that it was at, and another goes on with the next.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekd import cli

DEAD, STUCK = "dead", "stuck"  # keys of what stands for the answer of a child that gave none
_OURS = 70  # exit code of a child with an exception that `watched` did not see
_STATUS = Path("/proc/self/status")


@dataclass
class Call:
    """What one call of the program came to."""

    code: int
    out: str
    err: str
    crash: str = ""  # where and why, of an exception that was no error for the user
    seconds: float = 0.0
    memory_bytes: int = 0  # most memory, above what there was before


def each(
    jobs: Sequence[Any], work: Callable[[Any], Any], *, timeout_s: float, batch: int = 1, room_bytes: int | None = None
) -> list[Any]:
    """What `work` answers for each of the jobs, `batch` of them in one child, which may take `room_bytes` of address
    space more than it begins with. A job without an answer has {"stuck": seconds} or {"dead": how}."""
    answers: list[Any] = []
    while len(answers) < len(jobs):
        some = jobs[len(answers) : len(answers) + batch]
        answers += _some(some, work, timeout_s, room_bytes)
    return answers


def spread(jobs: Sequence[Any], work: Callable[[int, Sequence[Any]], list[Any]], workers: int) -> list[Any]:
    """The answers of `work(worker, its jobs)` in the order of the jobs, from several processes."""
    pipes = []
    for worker in range(workers):
        reader, child = _fork(lambda send, worker=worker: send(work(worker, jobs[worker::workers])))
        pipes.append((reader, child))
    answers: list[Any] = [None] * len(jobs)
    for worker, (reader, child) in enumerate(pipes):
        with os.fdopen(reader) as lines:
            line = lines.readline()
        os.waitpid(child, 0)
        assert line, f"worker {worker} died"
        answers[worker::workers] = json.loads(line)
    return answers


def _some(jobs: Sequence[Any], work: Callable[[Any], Any], timeout_s: float, room_bytes: int | None) -> list[Any]:
    """Answers for the jobs up to the first that ends the child."""

    def all_of_them(send: Callable[[Any], None]) -> None:
        for job in jobs:
            with contextlib.nullcontext() if room_bytes is None else limited(room_bytes):
                answer = work(job)
            send(answer)

    reader, child = _fork(all_of_them)
    answers: list[Any] = []
    pending = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while len(answers) < len(jobs):
            if not select.select([pipe], [], [], timeout_s)[0]:
                os.kill(child, signal.SIGKILL)
                answers.append({STUCK: timeout_s})
                break
            read = pipe.read(1 << 16)
            pending += read
            *lines, pending = pending.split(b"\n")
            answers += [json.loads(line) for line in lines]
            if not read and len(answers) < len(jobs):
                answers.append({DEAD: ""})
                break
    how = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert how != _OURS, "what attacks is at fault: the exception above is not the program's"
    if answers[-1] == {DEAD: ""}:
        answers[-1] = {DEAD: f"signal {-how}" if how < 0 else f"exit code {how}"}
    return answers


def _fork(work: Callable[[Callable[[Any], None]], None]) -> tuple[int, int]:
    """A child that works and sends JSON lines into a pipe; the pipe's end to read from, and the child."""
    gc.freeze()  # else the children's collections would touch, and so copy, all that was imported
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    code = 1
    try:
        os.close(reader)
        torch.set_num_threads(1)
        work(lambda answer: _write_all(writer, json.dumps(answer).encode() + b"\n"))
        code = 0
    except MemoryError:  # of what we do around the program, in the memory that it left: the parent counts it
        pass
    except BaseException:
        traceback.print_exc()
        code = _OURS
    finally:
        os._exit(code)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def call(*arguments: str) -> Call:
    """Calls the command line in this process, as `main` of the installed script does."""
    sys.argv = ["sparsekd", *arguments]
    return watched(cli.main)


@contextlib.contextmanager
def limited(room_bytes: int) -> Iterator[None]:
    """Leaves the process `room_bytes` of address space above what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_field("VmSize") + room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def watched(work: Callable[[], Any]) -> Call:
    """Calls `work` with its output, time and memory watched; what it returns stands for its output."""
    out, err = io.StringIO(), io.StringIO()
    before, start = _reset_peak(), time.monotonic()
    code, crash = 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            returned = work()
            if returned is not None:
                out.write(returned)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        except BaseException as error:
            code, crash = 1, _where(error)
    return Call(code, out.getvalue(), err.getvalue(), crash, time.monotonic() - start, _field("VmHWM") - before)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "sparsekd" in frame.filename and "/tests/" not in frame.filename] or frames
    last = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {last}: {' '.join(str(error).split())[:300]}"


def _reset_peak() -> int:
    """Memory now, from which the peak counts anew."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _field("VmRSS")


def _field(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", _STATUS.read_text())[1])  # type: ignore[index]
