"""The report's tables as rows of text, for the console and for HTML alike."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Rows = list[list[str]]

PERPLEXITY_HEADER = ["text", "model", "perplexity", "to dense", "bits per byte", "paper's protocol", "tokens"]
MATRIX_HEADER = [
    "matrix",
    "shape",
    "rank",
    "parameters",
    "after",
    "output energy lost",
    "predicted KL",
    "probed KL at rank",
]

SPECTRUM_HEADER = ["matrix", "shape", "effective rank", "of the weight", "rank kept", "energy lost", "predicted KL"]


def number(value: float) -> str:
    """Two decimals, or thousands separated where decimals say nothing."""
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.2f}"


def perplexities(report: dict[str, Any]) -> Rows:
    """A row a text and model: strict perplexity +- standard error, ratio to dense, and the paper's protocol."""
    evaluation = report["evaluation"]
    rows = []
    for text in next(iter(evaluation["models"].values())):
        for name, results in evaluation["models"].items():
            result = results[text]
            compared = evaluation["ratios"].get(name, {}).get(text)
            rows.append(
                [
                    text,
                    {"compressed": "compressed, not distilled"}.get(name, name),
                    f"{number(result['perplexity'])} \u00b1 {number(result['standard_error'])}",
                    f"{number(compared['ratio'])} \u00b1 {number(compared['standard_error'])}" if compared else "",
                    f"{result['bits_per_byte']:.3f}",
                    f"{number(result['paper_perplexity'])} \u00b1 {number(result['paper_standard_error'])}",
                    f"{result['num_tokens']:,}",
                ]
            )
    return rows


def matrices(plan: dict[str, Any]) -> Rows:
    """A row a matrix: what it was, what is left, and the share of its output energy that the truncation loses."""
    rows = []
    for m in plan["matrices"]:
        lost = m["relative_error"]
        rows.append(
            [
                m["name"],
                f"{m['out_features']} x {m['in_features']}",
                str(m["rank"] or "dense"),
                f"{m['parameters_before']:,}",
                f"{m['parameters_after']:,}",
                "" if lost is None else f"{lost:.2%}",
                "" if m["predicted_kl"] is None else f"{m['predicted_kl']:.5f}",
                "" if m["probed_kl"] is None else f"{m['probed_kl']:.5f} at {m['probed_rank']}",
            ]
        )
    return rows


def spectrum_title(found: dict[str, Any]) -> str:
    """What the spectra were taken by, and of which cut the last columns speak."""
    return f"Spectra by {found['method']}; a uniform cut of {found['reduction']:.0%}"


def spectrum(found: dict[str, Any]) -> Rows:
    """A row a matrix: how many directions carry it, and what a uniform cut would lose."""
    return [
        [
            m["name"],
            f"{m['out_features']} x {m['in_features']}",
            f"{m['effective_rank']:.0f}",
            f"{m['weight_effective_rank']:.0f}",
            str(m["rank"]),
            f"{m['relative_error']:.2%}",
            "" if m["predicted_kl"] is None else f"{m['predicted_kl']:.5f}",
        ]
        for m in found["matrices"]
    ]


def sizes(plan: dict[str, Any]) -> Rows:
    """Parameters before and after, of the MLPs and of the whole model."""
    return [
        [
            title,
            f"{plan[f'{part}_parameters_before']:,}",
            f"{plan[f'{part}_parameters_after']:,}",
            f"{plan[f'{part}_reduction']:.1%}",
        ]
        for part, title in (("mlp", "MLPs"), ("model", "whole model"))
    ]


def console_table(title: str, header: list[str], rows: Rows) -> Table:
    """A table for a terminal: the first two columns to the left, figures to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    """Minutes and seconds; of what takes longer, hours or days."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 48 * 60:
        return f"{seconds / 86_400:,.0f} days"
    if minutes >= 120:
        return f"{seconds / 3600:.1f} h"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} PB"
