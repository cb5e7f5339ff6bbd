"""Which part of a model a moment of a pass belongs to.

Every part that has a kind is a range of the profiler's while it runs, found by what it is in the model: the matrices of
the MLPs, other linear layers, attention, norms, embedding and head. An operator is of the kind of the innermost range
that it runs in; outside of all, it is a product or element-wise by its name. What a pass takes longer than all its
operators is overhead: Python, the dispatcher, and on a GPU the time in which it waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function
from transformers import PreTrainedModel

from sparsekd.models import find_mlps, is_attention, is_linear

ATTENTION, MLP, PRODUCTS, NORMS, ELEMENTWISE, ENDS, OVERHEAD = KINDS = (
    "attention",  # all that it does but its projections and norms: turning, masking, keeping what the cache holds
    "MLP products",
    "other products",
    "norms",
    "element-wise",
    "embedding and head",
    "overhead",
)
_PREFIX = "sparsekd: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::baddbmm", "mkldnn::")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@contextmanager
def marked(model: PreTrainedModel) -> Iterator[None]:
    """Has the parts of the model be ranges of the profiler's inside the context."""
    handles = []
    try:
        for module, kind in _parts(model):
            opened: list[record_function] = []

            def enter(*_: Any, kind: str = kind, opened: list[record_function] = opened) -> None:
                opened.append(record_function(_PREFIX + kind))
                opened[-1].__enter__()

            def leave(*_: Any, opened: list[record_function] = opened) -> None:
                opened.pop().__exit__(None, None, None)

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    mlps = {id(model.get_submodule(name)) for mlp in find_mlps(model) for name in mlp.matrices}
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}

    def inside(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        kind = ENDS if id(module) in ends else MLP if id(module) in mlps else None
        if kind is None and is_linear(module):
            kind = PRODUCTS
        if kind is None and _is_norm(module):
            kind = NORMS
        if kind is not None:  # nothing inside is of another kind; a compressed layer's own layers must not be hooked
            yield module, kind
            return
        if module is not model and is_attention(module) and any(is_linear(child) for child in module.children()):
            yield module, ATTENTION
        for child in module.children():
            yield from inside(child)

    yield from inside(model)


def _is_norm(module: nn.Module) -> bool:
    """One of torch's, or a module whose only parameters are vectors, as the norms of transformers."""
    if isinstance(module, _NORMS):
        return True
    sizes = [parameter.ndim for parameter in module.parameters()]
    return not list(module.children()) and bool(sizes) and max(sizes) == 1


def seconds_by_kind(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Seconds of the operators of each kind. On a GPU the time of its kernels counts, by the operator that started
    them."""
    found = dict.fromkeys((kind for kind in KINDS if kind != OVERHEAD), 0.0)
    for event in events:
        if event.device_type.name != "CPU" or "::" not in event.name:  # a kernel itself; a range
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[_kind(event)] += microseconds / 1e6
    return found


def _kind(event: FunctionEvent) -> str:
    around = event.cpu_parent
    while around is not None:
        if around.name.startswith(_PREFIX):
            return around.name.removeprefix(_PREFIX)
        around = around.cpu_parent
    return PRODUCTS if event.name.startswith(_PRODUCTS) else ELEMENTWISE
