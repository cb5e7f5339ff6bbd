"""What models run in: one entry for each runtime, which opens a model as a `Session`.

PyTorch opens models, the others folders that `sparsekd export` has made for them.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from sparsekd import export, models
from sparsekd.bench.cells import OWN, STEPS, Variant
from sparsekd.bench.graphs import Graph, LlamaCpp
from sparsekd.errors import ResourceError, UsageError
from sparsekd.evaluate import Serving, Session
from sparsekd.export import gguf, llama_cpp, onnx, openvino

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")
_FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Runtime:
    """Where models run. It is there if `missing` returns None, else the line that installs it."""

    open: Callable[[str, Variant, torch.device], Session]  # raises an error of ours for a model that it cannot open
    missing: Callable[[], str | None]
    format: str | None = None  # of exported folders that it opens; None: it opens models
    dtypes: Sequence[str] = (OWN,)  # in which it computes; `OWN`: as it likes
    attentions: Sequence[str] = (OWN,)

    def takes(self, name: str) -> bool:
        """Whether the model of this name is for it."""
        if self.format is None:
            return not any((Path(name) / file).is_file() for file in _FILES.values())
        is_file = self.format == "gguf" and Path(name).suffix == Path(gguf.FILE).suffix
        return is_file or (Path(name) / _FILES[self.format]).is_file()

    @property
    def way_in(self) -> str:
        """How to have a model that is for it."""
        return (
            f"sparsekd export MODEL --format {self.format}" if self.format else "give a model, not an exported folder"
        )

    def variants(self, dtypes: Sequence[str], attentions: Sequence[str]) -> list[tuple[str, str]]:
        """Those of what is asked for that it has; what it does not let choose, as it is."""
        mine = [one for one in (*dtypes, OWN) if one in self.dtypes]
        return list(itertools.product(mine, [one for one in (*attentions, OWN) if one in self.attentions]))


def open_session(name: str, variant: Variant, device: torch.device) -> Session:
    """A model, by its name, in a runtime."""
    return RUNTIMES[variant.runtime].open(name, variant, device)


def stored_bytes(name: str) -> int:
    """Bytes of the files that hold a model's weights, whatever it is for."""
    folder = Path(name)
    for file in _FILES.values():
        if (folder / file).is_file():
            return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _SUFFIXES)
    return models.stored_bytes(name)


def installed() -> list[str]:
    """The runtimes that are there."""
    return [name for name, runtime in RUNTIMES.items() if runtime.missing() is None]


def not_installed() -> list[str]:
    """The others, each with the line that installs it."""
    lines = {name: runtime.missing() for name, runtime in RUNTIMES.items()}
    return [f"{name}: {line}" for name, line in lines.items() if line is not None]


def require(runtime: str, names: Sequence[str]) -> None:
    """Raises `ResourceError` for a runtime that is not there, where one of the models is for it."""
    line = RUNTIMES[runtime].missing()
    if line is not None and any(map(RUNTIMES[runtime].takes, names)):
        raise ResourceError(f"runtime {runtime} is not installed: {line}")


def attentions_here() -> list[str]:
    """The ways to compute attention that can be tried."""
    return [name for name in ATTENTIONS if name != _FLASH or _flash_is_there()]


def _flash_is_there() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def with_attention(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Has the model compute attention so; raises `UsageError` where it cannot, `ResourceError` without the package."""
    if attention == _FLASH and not _flash_is_there():
        raise ResourceError(
            "attention flash_attention_2 needs a GPU and the package flash-attn: pip install flash-attn"
        )
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{type(model).__name__} cannot compute attention by {attention}: {reason}") from error
    return model


def _loaded(name: str, variant: Variant, device: torch.device) -> PreTrainedModel:
    model, _ = models.load(name, dtype=getattr(torch, variant.dtype), device=device)
    return with_attention(model, variant.attention)


def _open_torch(name: str, variant: Variant, device: torch.device) -> Session:
    return Serving(_loaded(name, variant, device))


def _open_compiled(name: str, variant: Variant, device: torch.device) -> Session:
    return _Compiled(_loaded(name, variant, device))


class _Compiled(Serving):
    """With `torch.compile`, a graph for each shape of a prompt and one for a step after it; the cache has a fixed size,
    for else each step would be another shape."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, torch.compile(model, dynamic=False))
        self._model, self._shape, self._static = model, (0, 0), None

    @torch.inference_mode()
    def _new_cache(self, tokens: Int[Tensor, "B L"]) -> Any:
        shape = tuple(tokens.shape)
        if shape != self._shape:
            torch.compiler.reset()  # which makes a few graphs only and then gives up
            self._static = StaticCache(self._model.config, max_cache_len=shape[1] + STEPS)
            # its tensors are made on first use, which is not to be a part of the graph
            self._model(input_ids=tokens[:, :1].to(self._model.device), past_key_values=self._static)
            self._shape = shape
        assert self._static is not None
        self._static.reset()
        return self._static


def _open_onnx(name: str, variant: Variant, device: torch.device) -> Session:
    return Graph(onnx.cached(Path(name)))


def _open_openvino(name: str, variant: Variant, device: torch.device) -> Session:
    return Graph(openvino.cached(Path(name), {"float32": "f32", "bfloat16": "bf16"}[variant.dtype]))


def _open_llama_cpp(name: str, variant: Variant, device: torch.device) -> Session:
    return LlamaCpp(Path(name) / gguf.FILE if Path(name).is_dir() else Path(name))


def _compiler() -> str | None:
    """A GPU's graphs are compiled by Triton, which comes with torch, others in C++."""
    there = torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if there else "apt install g++"


def _packages(format_: str) -> Callable[[], str | None]:
    return lambda: export.install_line(format_)


_FILES = {"onnx": onnx.FILE, "openvino": openvino.FILE, "gguf": gguf.FILE}
_SUFFIXES = (".onnx", ".data", ".xml", ".bin", ".gguf")
RUNTIMES = {
    "torch": Runtime(_open_torch, lambda: None, None, DTYPES, ATTENTIONS),
    "compile": Runtime(_open_compiled, _compiler, None, DTYPES, ATTENTIONS),
    "onnx": Runtime(_open_onnx, _packages("onnx"), "onnx", DTYPES[:1]),
    "openvino": Runtime(_open_openvino, _packages("openvino"), "openvino", DTYPES[:2]),
    "llama.cpp": Runtime(_open_llama_cpp, llama_cpp.install_line, "gguf"),
}
