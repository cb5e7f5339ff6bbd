"""What `sparsekd frontier` has measured, as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsekd.records import Record
from sparsekd.report.plots import COLORS, GREY, LEGEND, figures, svg
from sparsekd.report.speed import milliseconds
from sparsekd.report.tables import Titled, size

HEADER = ["model", "runs in", "weights", "perplexity", "to dense", "bytes", "first token", "per token", "best for"]
_COSTS = {"per_token": "token", "first_token": "prompt", "bytes": "bytes"}
_SCALES = {"per_token": (1e3, "ms per token"), "first_token": (1e3, "ms to the first token"), "bytes": (1e-6, "MB")}


def tables(found: Record) -> Iterator[Titled]:
    """A row for each point, best for the costs by which it is not dominated: a token, a prompt, bytes."""
    rows = [
        [
            point["model"],
            point["runtime"],
            point["weights"],
            f"{point['perplexity']:.2f}",
            f"{point['ratio']:.3f}",
            size(float(point["bytes"])),
            *("" if point[cost] is None else milliseconds(point[cost]) for cost in ("first_token", "per_token")),
            ", ".join(label for cost, label in _COSTS.items() if _leads(point, cost)) or "nothing",
        ]
        for point in found["points"]
    ]
    yield Titled(f"Quality against cost; {found['device']}, {found['threads']} threads", HEADER, rows)


def _leads(point: Record, cost: str) -> bool:
    return point[cost] is not None and not point["dominated"][cost]


def picture(found: Record) -> str:
    """Perplexity against time and bytes; what another point is at least as good and as cheap as is pale, the others are
    joined."""
    points = found["points"]
    figure, panels = figures(3, height=3.6, width=9.0)
    colors = dict(zip(dict.fromkeys(point["model"] for point in points), COLORS, strict=False))
    for (cost, (scale, label)), axes in zip(_SCALES.items(), panels, strict=True):
        here = [point for point in points if point[cost] is not None]
        for point in here:
            _draw(axes, point, scale * point[cost], colors[point["model"]], _leads(point, cost))
        best = sorted((scale * point[cost], point["perplexity"]) for point in here if _leads(point, cost))
        axes.plot(*zip(*best, strict=True), color=GREY, lw=1, zorder=0) if best else None
        axes.set(xlabel=label, xlim=(0, 1.3 * max((scale * point[cost] for point in here), default=1)))
    panels[0].set_ylabel("perplexity")
    handles = [panels[0].plot([], [], "o", color=color, label=name)[0] for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, **LEGEND)
    return svg(figure)


def _draw(axes: Any, point: Record, x: float, color: str, leads: bool) -> None:
    strength = 1.0 if leads else 0.3
    axes.plot([x], [point["perplexity"]], "o", color=color, alpha=strength)
    in_torch = point["runtime"] == "torch"  # which is often where float32 is in the other runtime
    name, offset = ("PyTorch", (4, -9)) if in_torch else (point["weights"], (4, 4))
    place = {"xytext": offset, "textcoords": "offset points", "fontsize": 7, "color": GREY, "alpha": strength}
    axes.annotate(name, (x, point["perplexity"]), **place)
