"""What `sparsekd bench` and `sparsekd profile` have measured, as tables and a picture; and the paper's beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sparsekd.records import Record
from sparsekd.report.plots import COLORS, GREY, LEGEND, figures, svg
from sparsekd.report.tables import Titled, number, size

BENCH_HEADER = [
    *["batch x length", "model", "first token", "per token", "generated", "times as fast", "", "peak memory", "turns"]
]
PROFILE_HEADER = ["model", "attention", "in all"]
BOUND_HEADER = ["model", "MLP products", "arithmetic", "bound", "times as fast", "achieved"]
TOGETHER_HEADER = ["model", "attention", "attention alone", "compression alone", "both", "product"]


def bench(found: Record) -> Iterator[Titled]:
    """A table for each runtime, number format and attention: a row for each shape and model. Intervals are of the
    ratios: to the first token, and per token."""
    by_variant: dict[str, list[Record]] = {}
    for cell in found["cells"]:
        by_variant.setdefault(_variant(cell), []).append(cell)
    for variant, cells in by_variant.items():
        rows = [_bench_row(cell, name, one) for cell in cells for name, one in cell["models"].items()]
        title = f"{variant}; {cells[0]['device']}, {found['threads']} threads"
        yield Titled(title, BENCH_HEADER, rows)
    disk = [[name, size(float(facts["disk_bytes"]))] for name, facts in found["models"].items()]
    yield Titled("On disk", ["model", "bytes"], disk)


def _bench_row(cell: Record, name: str, one: Record) -> list[str]:
    ratios = one["times_as_fast"]
    device = one["device_peak_bytes"]
    return [
        f"{cell['batch']} x {cell['length']}",
        name,
        milliseconds(one["seconds"]["first_token"]["median"]),
        milliseconds(one["seconds"]["per_token"]["median"]),
        f"{one['tokens_per_second']['generated']:,.0f}/s",
        interval(ratios["first_token"]) if ratios else "",
        interval(ratios["per_token"]) if ratios else "",
        size(float(one["peak_bytes"])) + (f", GPU {size(float(device))}" if device is not None else ""),
        str(cell["turns"]),
    ]


def left_out(found: Record) -> list[str]:
    """A line for each runtime, number format and attention, and reason."""
    lines: dict[tuple[str, str], list[str]] = {}
    for one in found.get("left_out", ()):
        lines.setdefault((_variant(one), one["why"]), []).extend(one["shapes"])
    return [f"left out: {variant}: {', '.join(shapes)} ({why})" for (variant, why), shapes in lines.items()]


def _variant(one: Record) -> str:
    return " ".join(one[key] for key in ("runtime", "dtype", "attention") if one[key] != "own")


def profile(found: Record) -> Iterator[Titled]:
    """Time by kind; the bound and what of it was achieved; attention and compression together."""
    kinds = list(found["rows"][0]["shares"])
    each = f"a step of {found['batch']} after {found['length']} tokens" if found["steps"] else "a prompt"
    shape = f"{found['batch']} x {found['length']}, {found['dtype']}, {found['device']}, {found['threads']} threads"
    rows = [_profile_row(one, kinds) for one in found["rows"]]
    yield Titled(f"Where the time of {each} goes; {shape}", [*PROFILE_HEADER, *kinds], rows)
    bounds = [
        [
            one["model"],
            f"{one['mlp_share']:.1%}",
            f"{one['arithmetic_reduction']:.2f}",
            f"{one['bound']:.2f}",
            interval(one["times_as_fast"]),
            f"{one['achieved']:.0%}",
        ]
        for one in found["bounds"]
    ]
    if bounds:
        yield Titled(
            "Amdahl's bound: share of the dense model's time, reduction of its arithmetic", BOUND_HEADER, bounds
        )
    together = [
        [
            one["model"],
            f"{one['from']} to {one['to']}",
            *(interval(one[key]) for key in ("attention_alone", "compression_alone", "both")),
            f"{one['product']:.2f}",
        ]
        for one in found["together"]
    ]
    if together:
        yield Titled("Times as fast by other attention, by compression, and by both", TOGETHER_HEADER, together)


def _profile_row(one: Record, kinds: list[str]) -> list[str]:
    parts = (f"{milliseconds(one['seconds_by_kind'][kind])} ({one['shares'][kind]:.0%})" for kind in kinds)
    return [one["model"], one["attention"], milliseconds(one["seconds"]["median"]), *parts]


def picture(found: Record) -> str:
    """Time by kind, a bar for each model and attention."""
    rows = found["rows"][::-1]
    figure, (axes,) = figures(1, height=1.4 + 0.5 * len(rows), width=8.0)
    left = [0.0] * len(rows)
    for kind, color in zip(rows[0]["shares"], (*COLORS, GREY), strict=True):
        widths = [1e3 * row["seconds_by_kind"][kind] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=color, label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(yticks=range(len(rows)), xlabel="milliseconds")
    axes.set_yticklabels([f"{row['model'][-40:]}, {row['attention']}" for row in rows])
    figure.legend(loc="outside upper center", ncols=4, **LEGEND)
    return svg(figure)


def reproduced(found: Record) -> list[Titled]:
    """What `reproduce` found of one of the paper's tables of speed: beside the paper's figures, its claims, and all
    that was measured. Table X has no figures but those that are beside the claims."""
    claims, measured = _claims(found["claims"]), found["measured"]
    if "cells" in measured:
        return [_beside_served(found), claims, *bench(measured)]
    beside = [_beside_kernels(found)] if found["experiment"] == "VIII" else []
    return [*beside, claims, *profile(measured)]


def _beside_served(found: Record) -> Titled:
    """A row for each batch and compressed model."""
    rows = []
    for cell in found["measured"]["cells"]:
        dense = cell["models"][found["measured"]["reference"]]
        for name in found["arms"]:
            one, paper = cell["models"][name], found["paper"].get(str(cell["batch"]), {}).get(name, {})
            row = [f"{cell['batch']} x {cell['length']}", name]
            for what in ("first_token", "per_token"):
                row += [interval(one["times_as_fast"][what]), _known(paper.get(what))]
            rows.append([*row, number(_memory(one) / _memory(dense)), _known(paper.get("memory"))])
    header = ["batch x length", "model", "first token", "paper", "per token", "paper", "memory", "paper"]
    return Titled("Times as fast as the dense model, and memory over the dense model's", header, rows)


def _memory(one: Record) -> float:
    """Of a GPU its own peak, else that of the process without what it held before the model."""
    device = one["device_peak_bytes"]
    return float(device if device is not None else one["peak_bytes"] - one["before_bytes"])


def _beside_kernels(found: Record) -> Titled:
    """A row for each model: where its time goes, and how much faster it is."""
    products = ["MLP products", "other products"]
    header = ["model", "attention", "paper", *products, "paper: FFN/GEMM", "times as fast", "paper"]
    faster = {bound["model"]: interval(bound["times_as_fast"]) for bound in found["measured"]["bounds"]}
    rows = []
    for row in found["measured"]["rows"]:
        name, paper = row["model"], found["paper"][row["model"]]
        attention, *others = (f"{row['shares'][kind]:.0%}" for kind in ("attention", *products))
        known = [f"{paper[what]:.0%}" for what in ("attention_share", "products_share")]
        gained = [faster.get(name, ""), number(paper["times_as_fast"])]
        rows.append([name, attention, known[0], *others, known[1], *gained])
    return Titled("Shares of the time of a prompt, and times as fast as the dense model", header, rows)


def _claims(claims: list[Record]) -> Titled:
    header = ["claim", "of", "ratio (interval)", "claimed", "paper", "verdict"]
    rows = []
    for one in claims:
        cells = [interval(one["ratio"]), _range(one["above"], one["below"]), _known(one["paper"])]
        rows.append([one["claim"], one["of"], *cells, one["verdict"]])
    return Titled("What the paper claims", header, rows)


def _range(above: float | None, below: float | None) -> str:
    if above is None or below is None:
        return f"below {below:.2f}" if above is None else f"above {above:.2f}"
    return f"{above:.2f} to {below:.2f}"


def _known(value: float | str | None) -> str:
    """A figure of the paper's, if it has one."""
    return "" if value is None else value if isinstance(value, str) else number(value)


def pictures(found: Record) -> dict[str, str]:
    """What an experiment of speed has, by title."""
    if "cells" in found["measured"]:
        return {"Times as fast as the dense model": _served(found)}
    return {"Time of a prompt by kind": picture(found["measured"])}


def _served(found: Record) -> str:
    """Both ratios by batch, with intervals; the paper's as open points."""
    figure, all_axes = figures(2)
    cells = sorted(found["measured"]["cells"], key=lambda cell: cell["batch"])
    for axes, what, title in zip(all_axes, ("first_token", "per_token"), ("first token", "per token"), strict=True):
        for name, color in zip(found["arms"], COLORS, strict=False):
            ratios = [cell["models"][name]["times_as_fast"][what] for cell in cells]
            middle = [one["median"] for one in ratios]
            spread = [[abs(one["median"] - one[end]) for one in ratios] for end in ("low", "high")]
            axes.errorbar(range(len(cells)), middle, yerr=spread, fmt="o-", color=color, capsize=3, label=name)
            paper = [found["paper"].get(str(cell["batch"]), {}).get(name, {}).get(what, math.nan) for cell in cells]
            axes.plot(range(len(cells)), paper, "o--", lw=0.8, mfc="none", color=color, label=f"{name}, paper")
        axes.axhline(1, ls=":", color=GREY)
        axes.set(title=title, xlabel="batch", ylabel="times as fast", xticks=range(len(cells)))
        axes.set_xticklabels([str(cell["batch"]) for cell in cells])
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **LEGEND)
    return svg(figure)


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def interval(found: Record) -> str:
    """A ratio and where it lies; with which confidence, if that is less than 95 %."""
    certain = "" if found["confidence"] >= 0.95 else f"; {found['confidence']:.0%}"
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f}{certain})"
