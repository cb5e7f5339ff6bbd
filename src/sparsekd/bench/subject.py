"""One model in one runtime, in a process of its own, so that its memory is the system's own figure and no runtime's
threads are in another one's way. The process is asked line by line, in JSON, and answers so.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sparsekd import errors
from sparsekd.bench.cells import STEPS, Shape, Variant
from sparsekd.bench.runtimes import open_session
from sparsekd.device import out_of_memory, peak_device_memory_bytes
from sparsekd.errors import ResourceError, SparseKDError
from sparsekd.evaluate import prompt, timed
from sparsekd.records import Record
from sparsekd.run import memory_bytes, peak_memory_bytes, reset_peak_memory


class OutOfTime(Exception):
    """A process did not answer in time."""


class Subject:
    """A model that is measured, in this process."""

    def __init__(self, name: str, variant: Variant, device: torch.device):
        self._device = device
        before = memory_bytes()
        self._session = open_session(name, variant, device)
        # llama.cpp holds the model in a process of its own
        self._process: int | None = getattr(self._session, "pid", None)
        self._before: int = getattr(self._session, "before_bytes", before)

    def turn(self, shape: Sequence[int]) -> Record:
        """Seconds until the first token of a prompt, and of each of `STEPS` tokens after it."""
        tokens = prompt(*shape)
        first_s, token = timed(lambda: self._session.prefill(tokens))

        def decode() -> None:
            following = token
            for _ in range(STEPS):
                following = self._session.decode(following)

        return {"first_token": first_s, "per_token": timed(decode)[0] / STEPS}

    def forget_peak(self) -> Record:
        """Peaks are from here on."""
        reset_peak_memory(self._process)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return {}

    def memory(self) -> Record:
        """Peaks of the process and of a GPU, and what the process held before the model was opened."""
        return {
            "peak_bytes": peak_memory_bytes(self._process),
            "before_bytes": self._before,
            "device_peak_bytes": peak_device_memory_bytes(self._device),
        }


class Remote:
    """The same in another process. Its questions take the time, of `time.monotonic`, until which an answer is waited
    for; they raise `OutOfTime`, `MemoryError` where memory runs out, and an error of ours for what the model cannot."""

    def __init__(self, name: str, variant: Variant, device: str, threads: int):
        """Starts the process, which opens the model; `opened` waits for it."""
        self._name, self._variant = name, variant
        self._opening = [name, list(variant), device, threads]
        self._start(threads)

    def opened(self, until: float) -> None:
        self._answer(until)

    def turn(self, shape: Shape, until: float) -> Record:
        self._tell(["turn", shape])
        return self._answer(until)

    def forget_peak(self, until: float) -> None:
        self._tell(["forget_peak"])
        self._answer(until)

    def memory(self, until: float) -> Record:
        self._tell(["memory"])
        return self._answer(until)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout, self._log):
            assert end is not None
            end.close()

    def open_again(self, until: float) -> None:
        """Starts anew if the process has died."""
        if self._process.poll() is not None:
            self.close()
            self._start(self._opening[-1])
            self.opened(until)

    def _start(self, threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsekd.bench"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._tell(self._opening)

    def _tell(self, question: list[Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which the missing answer tells
            self._process.stdin.write(json.dumps(question).encode() + b"\n")

    def _answer(self, until: float) -> Record:
        answer = json.loads(self._line(until))
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        if "no_memory" in answer:
            raise MemoryError(answer["no_memory"])
        return answer

    def _line(self, until: float) -> bytes:
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise OutOfTime
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                raise self._death()
            line += part
        return line

    def _death(self) -> Exception:
        code = self._process.wait()
        if code == -signal.SIGKILL:  # by the system, where memory is short
            return MemoryError("the system ended the process")
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return ResourceError(f"model {self._name} in {self._variant}: its process ended with code {code}: {said[-1]}")


def serve(requests: Iterable[str], answer: Callable[[Record], None]) -> None:
    """Opens the model that the first line names and answers what the others ask, until there are no more."""
    subject: Subject | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if subject is None:
                name, variant, device, threads = request
                torch.set_num_threads(threads)
                subject = Subject(name, Variant(*variant), torch.device(device))
                found: Record = {}
            else:
                what, *given = request
                found = getattr(subject, what)(*given)
        except SparseKDError as error:
            found = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            if not out_of_memory(error):
                raise
            found = {"no_memory": str(error)}
        answer(found)
