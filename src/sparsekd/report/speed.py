"""What `sparsekd bench` and `sparsekd profile` have measured, as tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator

from sparsekd.records import Record
from sparsekd.report.plots import COLORS, GREY, LEGEND, figures, svg
from sparsekd.report.tables import Titled, size

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
    for one in found["left_out"]:
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


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def interval(found: Record) -> str:
    """A ratio and where it lies."""
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
