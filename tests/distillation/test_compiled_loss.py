"""The compiled step of the fused loss: the numbers of the plain one, few compilations, and no silence about more."""

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import MODES, N, V, case, targets_for
from torch._dynamo.testing import CompileCounter

from sparsekd.distillation import fused, losses
from sparsekd.distillation.losses import Mode


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """The module without the tests' checks, which the compiler cannot read; it compiles on a CPU, by a backend."""
    for checked in (losses, fused):
        spec: Any = importlib.util.spec_from_file_location(f"{checked.__name__}_without_checks", checked.__file__)
        module = importlib.util.module_from_spec(spec)
        for name in (checked.__name__, spec.name):  # the first for `fused`, the second for the compiler
            monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)

    def by(backend: Any) -> Any:
        monkeypatch.setattr(module, "_compiled_step", functools.partial(module._compiled_step, backend=backend))
        return module

    torch._dynamo.reset()
    return by


def require_same_gradients(compiled: Any, mode: Mode, vocab_size: int = V, **options: Any) -> None:
    hidden, weight, labels, teacher = case()
    leaves, labels = (hidden.requires_grad_(), weight.requires_grad_()), labels % vocab_size
    targets = targets_for(mode, teacher[:, :vocab_size].detach())
    options |= {"mode": mode, "denominator": N, "vocab_size": vocab_size}
    found, expected = (
        torch.autograd.grad(loss(*leaves, labels, targets, **options).total, leaves)
        for loss in (functools.partial(compiled.linear_kd_loss, compiled=True), fused.linear_kd_loss)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("mode", "temperature"), [("bucket", 2.0), ("exact_t", 3.0), ("sampled", 1.0)])
def test_the_step_of_a_chunk_compiles_and_gives_the_same_numbers(
    mode: Mode, temperature: float, compiling: Callable[[Any], Any]
) -> None:
    """As on a GPU, but for the kernels; the last chunk is shorter."""
    compiled = compiling("aot_eager")
    options = {"alpha": 0.5, "temperature": temperature, "scale": 0.5, "softcap": 20.0, "chunk_size": 16}
    require_same_gradients(compiled, mode, **options)
    require_same_gradients(compiled, mode, **options, weights=torch.linspace(0.5, 3, N))


def test_many_objectives_are_compiled_once_for_each_structure(compiling: Callable[[Any], Any]) -> None:
    """Whatever their numbers and chunks; a fallback would be a warning, which is an error here."""
    counter = CompileCounter()
    compiled = compiling(counter)
    numbers = list(itertools.product((1.7, 2.6), ((0.0, 1.0), (0.3, 0.5)), ((48, V), (21, 90), (13, V))))
    for mode, capped in (kinds := list(itertools.product(MODES, (False, True)))):
        for temperature, (alpha, scale), (chunk_size, vocab_size) in numbers:
            require_same_gradients(
                compiled,
                mode,
                vocab_size,
                alpha=alpha,
                temperature=1.0 if mode == "sampled" else temperature,
                scale=scale,
                softcap=10 * temperature if capped else None,
                chunk_size=chunk_size,
            )
    assert counter.frame_count <= 5 * len(kinds)  # whole and last chunks, the first, one position, vocabularies


def test_a_loss_that_is_not_compiled_says_so(compiling: Callable[[Any], Any]) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    compiled = compiling(broken)
    with pytest.warns(UserWarning, match="(?s)the loss is not compiled from here on, .*no compiler here"):
        require_same_gradients(compiled, "bucket", alpha=0.5, temperature=2.0)
    require_same_gradients(compiled, "bucket", alpha=0.5, temperature=2.0)


def test_the_limit_of_compilations_is_never_reached_silently(compiling: Callable[[Any], Any]) -> None:
    compiled = compiling("eager")
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(UserWarning, match="the loss is not compiled from here on"),
    ):
        require_same_gradients(compiled, "bucket", alpha=0.5, temperature=2.0, chunk_size=16)  # two sizes of chunks
