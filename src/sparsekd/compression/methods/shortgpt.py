"""`shortgpt`: the decoder layers that turn the hidden state least are taken out, all at once.

ShortGPT (Men et al., arXiv 2403.03853). A layer's block influence is `1 - E[cos(x, y)]`, the mean over all tokens, x
what the layer reads and y what it writes. A forward pass over the text. What is left is an ordinary, shorter model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekd.compression.methods import Needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekd.compression.calibration import Calibration
    from sparsekd.compression.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Options:
    """None: all layers are weighed alike."""


@dataclass(frozen=True)
class ShortGPT:
    """The method."""

    FORM = "depth"
    Options = Options

    def check(self, options: Options) -> None:
        pass

    def needs(self, options: Options) -> Needs:
        return Needs(passes=1.0, streams=1)

    def plan(self, model: PreTrainedModel, reduction: float, options: Options) -> Plan:
        """The nearest count of layers."""
        from sparsekd.compression import depths

        return depths.nearest(model, reduction, "shortgpt")

    def apply(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, options: Options) -> Plan:
        from sparsekd.compression import depths

        calibration.require_text("shortgpt")
        found = influences(calibration)
        depths.require_finite(model, found)
        least = sorted(found, key=lambda layer: found[layer])[: depths.num_removed(plan, model)]
        return depths.remove(model, plan, least, found)


def influences(calibration: Calibration) -> dict[int, float]:
    """The block influence of each layer, by its number."""
    import torch
    from torch.nn.functional import cosine_similarity

    from sparsekd.device import add_over_processes

    walk = calibration.walk()
    sums = torch.zeros(len(walk.layers), dtype=torch.float64)
    for layer in walk.layers:
        # a batch is read here before the step puts the layer's output in its place
        for before, (_, after) in zip(walk.hidden, walk.step(layer), strict=True):
            sums[layer] += cosine_similarity(before.flatten(0, -2).float(), after, dim=-1).sum().cpu()
    add_over_processes(sums)
    return dict(enumerate((1 - sums / calibration.num_tokens).tolist()))


METHOD = ShortGPT()
