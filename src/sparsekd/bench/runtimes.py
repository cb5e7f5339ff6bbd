"""What models run in: one entry for each runtime, which opens a model as a `Session`.

Another runtime is one function that opens an exported folder, and one line of `RUNTIMES`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from sparsekd import models
from sparsekd.bench.cells import Variant
from sparsekd.errors import ResourceError, UsageError
from sparsekd.evaluate import Serving, Session

STEPS = 16  # tokens that are decoded after a prompt
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")
_FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Runtime:
    """Where models run."""

    open: Callable[[str, Variant, torch.device], Session]  # raises an error of ours for a model that it cannot open
    is_there: Callable[[], bool]
    install: str  # the line that makes it be there


def open_session(name: str, variant: Variant, device: torch.device) -> Session:
    """A model, by its name, in a runtime."""
    return RUNTIMES[variant.runtime].open(name, variant, device)


def installed() -> list[str]:
    """The runtimes that are there."""
    return [name for name, runtime in RUNTIMES.items() if runtime.is_there()]


def not_installed() -> list[str]:
    """The others, each with the line that installs it."""
    return [f"{name}: {runtime.install}" for name, runtime in RUNTIMES.items() if not runtime.is_there()]


def require(runtime: str) -> None:
    """Raises `ResourceError` for a runtime that is not there."""
    chosen = RUNTIMES[runtime]
    if not chosen.is_there():
        raise ResourceError(f"runtime {runtime} is not installed: {chosen.install}")


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


def _has_compiler() -> bool:
    """A GPU's graphs are compiled by Triton, which comes with torch, others in C++."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


RUNTIMES = {
    "torch": Runtime(_open_torch, lambda: True, "pip install torch"),
    "compile": Runtime(_open_compiled, _has_compiler, "apt install g++"),
}
