"""Models outside PyTorch, as `Session`s: exported graphs, and GGUF files in llama.cpp.

Shape letters: B prompts, L tokens of each.
"""

from __future__ import annotations

import json
import subprocess
import weakref
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparsekd.bench.cells import STEPS
from sparsekd.errors import ResourceError
from sparsekd.export import Cached, llama_cpp


class Graph:
    """An exported graph, in the runtime that opened it."""

    def __init__(self, graph: Cached):
        self._graph = graph

    def prefill(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
        self._graph.forget()
        return self._graph.read(tokens, kept=1)[:, -1].argmax(-1)

    def decode(self, tokens: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return self._graph.read(tokens[:, None], kept=1)[:, -1].argmax(-1)


class LlamaCpp:
    """A GGUF file in llama.cpp, in a process of its own that is asked line by line, in JSON."""

    def __init__(self, file: Path):
        """Raises `ResourceError` where llama.cpp does not open the file."""
        self._process = subprocess.Popen(  # noqa: S603
            llama_cpp.command(Path(__file__).with_name("llama_cpp.mjs")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        weakref.finalize(self, _end, self._process)
        asked = {"packages": str(llama_cpp.folder()), "model": str(file), "threads": torch.get_num_threads()}
        self.before_bytes: int = self._ask(asked)["held"]

    @property
    def pid(self) -> int:
        """Of the process that holds the model."""
        return self._process.pid

    def prefill(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
        return self._step(tokens, prompt=True)

    def decode(self, tokens: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return self._step(tokens[:, None], prompt=False)

    def _step(self, tokens: Int[Tensor, "B L"], *, prompt: bool) -> Int[Tensor, " B"]:
        return torch.tensor(self._ask({"tokens": tokens.tolist(), "prompt": prompt, "steps": STEPS})["next"])

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> Exception:
        assert self._process.stderr is not None
        reason = llama_cpp.reason(self._process.stderr.read())
        if "memory" in reason.lower():
            return MemoryError(reason)
        return ResourceError(f"llama.cpp ended, it says: {reason}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for end in (process.stdin, process.stdout, process.stderr):
        assert end is not None
        end.close()
