"""How a choice is made: one file for each method, found by its name, `two_sided.py` for `two-sided`.

A file here says in its docstring what the method is and where it comes from, and holds one `METHOD`. The recipe reads
the options from it, so no file here imports torch when it is imported; its functions import what they need.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True)
class Needs:
    """What a method asks for: text, time, and a file."""

    passes: float = 0.0  # over the tokens of the statistics, in plain forward passes
    probe_tokens: int = 0  # on which each matrix's true damage is measured
    left_out_tokens: int = 0  # on which the damage of each layer that is left is measured, once for each that goes
    solver_flops: float = 0.0  # for each matrix, times its smaller side to the third power
    streams: int = 0  # hidden states of all tokens that are kept at once
    neuron_grams: int = 0  # matrices of an MLP's neurons by its neurons, in float64, at once
    weight_gradients: bool = False  # whether one of each MLP weight is kept, in float32, all at once
    reads: str | None = None  # a file that decides the result, known to a run by its content


@runtime_checkable
class Method(Protocol):
    """What the `METHOD` of a file has."""

    FORM: str  # what is left in the model: a file of `models/forms`
    Options: type[Any]  # a frozen dataclass: the recipe's section `compress.<method>`

    def check(self, options: Any) -> None:
        """Raises `UsageError` for options that do not go together."""

    def needs(self, options: Any) -> Needs:
        """What the options ask for."""
        ...

    def plan(self, model: PreTrainedModel, reduction: float, options: Any) -> Plan:
        """What the shapes alone decide; works on a model without weights."""
        ...

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Any) -> Plan:
        """Makes the model smaller, in place, all or nothing, and returns the plan with what was found out."""
        ...


def names() -> list[str]:
    """All methods."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def method_named(name: str) -> Method:
    """The method of that name, one of `names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
