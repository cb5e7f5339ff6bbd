"""What the low-rank methods have in common: a matrix's outputs are projected on the directions that matter most, and
the methods differ in what "matters" means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from sparsekd.compression.methods import Needs
from sparsekd.errors import UsageError
from sparsekd.recipe import PASSING, Range

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.directions import Projection
    from sparsekd.compression.plan import Plan
    from sparsekd.compression.statistics import Moments
    from sparsekd.models import MLP


@dataclass(frozen=True, kw_only=True)
class Options:
    """Ranks, and how the factors are stored."""

    # energy: the paper's threshold and tiers; global: one budget over all matrices, by curvature or by the probe
    allocation: Literal["uniform", "energy", "global"] = "uniform"
    format: Literal["pivot", "lowrank"] = "pivot"  # r(m+n) - r^2 weights for a matrix; or r(m+n)
    # measure each matrix's true KL on so many tokens before ranks are chosen; 0: do not
    probe_tokens: Annotated[int, Range(">= 0")] = 0
    rank_floor: Annotated[float, Range("[0, 1]")] = (
        0.2  # global: the least share of its uniform rank that a matrix gets
    )
    rank_cap: Annotated[float, Range("(0, 1]")] = (
        1.0  # the most of its rank that a matrix keeps; 1: it may stay as it is
    )
    rank_multiple: Annotated[int, Range(">= 1")] = 1  # ranks are multiples of this, for GPUs 8, 16 or 64
    # take the ranks from an earlier plan (compressed/stage.json) instead
    ranks_from: str | None = field(default=None, metadata=PASSING)


Directions = Callable[["Tensor", "MLP", str, "Moments | None"], "Projection"]


@dataclass(frozen=True)
class LowRank:
    """A low-rank method: `directions` gives those of one matrix, most important first, from its weight, its MLP, its
    name and the MLP's moments."""

    name: str
    directions: Directions
    passes: float = 0.0  # of the statistics, in plain forward passes; 0: none are needed
    curvature: bool = False  # whether the moments have the loss's curvature, by which matrices compare

    FORM = "lowrank"
    Options = Options

    def check(self, options: Options) -> None:
        if options.allocation == "global" and not self.curvature and not options.probe_tokens:
            raise UsageError(
                "compress.allocation is global, which compares matrices by curvature or by the probe: expected "
                f"compress.method two-sided or compress.probe_tokens above 0, found {self.name} and 0"
            )

    def needs(self, options: Options) -> Needs:
        return Needs(self.passes, options.probe_tokens, solver_flops=25.0, reads=options.ranks_from)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        """Uniform ranks."""
        from sparsekd.compression import ranks
        from sparsekd.compression.plan import require_form

        require_form(model, ("lowrank", "mask"), self.name)
        return ranks.uniform(model, reduction, options)

    def directions_of(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Projection]:
        """The directions of every MLP matrix by its name."""
        from sparsekd.models import find_mlps, linear_weight

        moments = calibration.moments(self.curvature) if self.passes else {}
        found = {}
        for mlp in find_mlps(model):
            seen = moments.pop(mlp, None)  # not all of them and all directions in memory
            for name in mlp.matrices:
                weight = linear_weight(model.get_submodule(name)).detach()
                found[name] = self.directions(weight, mlp, name, seen)
        return found

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import ranks
        from sparsekd.models import linear_weight
        from sparsekd.models.forms import lowrank

        seen, held_out = calibration.split(options.probe_tokens)
        found = self.directions_of(model, seen)
        probe = held_out.probe() if held_out is not None else None
        chosen = ranks.choose(model, plan, found, options, probe, self.curvature)
        factors = {}
        for matrix in chosen.matrices:
            projection = found.pop(matrix.name)  # from here on the factors stand for it: not both in memory
            if matrix.rank is not None:
                weight = linear_weight(model.get_submodule(matrix.name)).detach()
                factors[matrix.name] = projection.factors(weight, matrix.rank)
        lowrank.put(model, factors, options.format)
        return chosen if probe is None else replace(chosen, measured_kl=probe.of_all())
