"""The report's tables as rows of text, for the console and for HTML alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from rich.table import Table

from sparsekd.compression import widths
from sparsekd.records import Record

Rows = list[list[str]]


class Titled(NamedTuple):
    """A table with its title."""

    title: str
    header: list[str]
    rows: Rows
    style: str = "two"  # columns of names on the left; "words": one, and the last column is wrapped


PERPLEXITY_HEADER = ["text", "model", "perplexity", "to dense", "bits per byte", "paper's protocol", "tokens"]
CALIBRATION_HEADER = ["text", "model", "calibration error", "overconfidence", "accuracy", "Brier score", "entropy"]
AGREEMENT_HEADER = ["text", "model", "KL to the teacher", "same likeliest token"]
FREQUENCY_HEADER = ["text", "model", "occurrences", *AGREEMENT_HEADER[2:], "tokens"]
SAID_HEADER = ["model", "tokens", "ended", "repetition", "tokens in common"]
TASK_HEADER = ["task", "model", "metric", "score", "rows"]
SIZE_HEADER = ["", "before", "after", "removed"]
DEVICE_HEADER = ["stage", "one device", "DDP", "FSDP2", "fits as", "each holds", "tokens/s", "time"]
MATRIX_HEADER = [
    "matrix",
    "shape",
    "left",
    "parameters",
    "after",
    "output energy lost",
    "predicted KL",
    "probed KL at rank",
]

SPECTRUM_HEADER = ["matrix", "shape", "effective rank", "of the weight", "rank kept", "energy lost", "predicted KL"]
_KEPT = (0.95, 0.85, 0.65, 0.5, 0.35, 0.2)  # of the neurons
_ALLOCATIONS = ("global", "uniform")
DAMAGE_HEADER = ["reads the neurons", "neurons", *(f"{share:.0%}" for share in _KEPT), *_ALLOCATIONS]


def number(value: float) -> str:
    """Two decimals, or thousands separated where decimals say nothing."""
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.2f}"


def plus_minus(value: float, error: float | None, show: Callable[[float], str] = number) -> str:
    """The value and its error, or the value alone where the error is unknown."""
    return show(value) if error is None else f"{show(value)} \u00b1 {show(error)}"


def evaluation(found: Record) -> list[Titled]:
    """All that was measured on texts and tasks, without the tables that have no row."""
    tables = [
        Titled("Perplexity", PERPLEXITY_HEADER, perplexities(found)),
        Titled("Calibration", CALIBRATION_HEADER, calibrations(found)),
        Titled("Agreement with the teacher", AGREEMENT_HEADER, agreements(found)),
        Titled("What the models say", SAID_HEADER, continuations(found)),
        Titled("Tasks", TASK_HEADER, tasks(found)),
    ]
    return [table for table in tables if table.rows]


def perplexities(evaluation: Record) -> Rows:
    """A row a text and model: strict perplexity +- standard error, ratio to dense, and the paper's protocol."""
    rows = []
    for text, name, result in _results(evaluation):
        compared = evaluation["ratios"].get(name, {}).get(text)
        rows.append(
            [
                text,
                model_title(name),
                plus_minus(result["perplexity"], result["standard_error"]),
                plus_minus(compared["ratio"], compared["standard_error"]) if compared else "",
                f"{result['bits_per_byte']:.3f}",
                plus_minus(result["paper_perplexity"], result["paper_standard_error"]),
                f"{result['num_tokens']:,}",
            ]
        )
    return rows


def rounds(report: Record) -> tuple[list[str], Rows]:
    """Header and a row a round: what is removed, and the perplexities to dense before and after training, by text."""
    texts = list(report["rounds"][0]["models"]["dense"])
    header = ["round", "removed", *(f"{text}, {when}" for text in texts for when in ("pruned", "distilled"))]
    rows = []
    for one in report["rounds"]:
        compared = [one["ratios"].get(name, {}).get(text) for text in texts for name in ("compressed", "distilled")]
        cells = [plus_minus(c["ratio"], c["standard_error"]) if c else "" for c in compared]
        rows.append([one["name"], f"{one['mlp_reduction']:.1%}", *cells])
    return header, rows


def calibrations(evaluation: Record) -> Rows:
    """A row a text and model: calibration error, and overconfidence, accuracy, Brier score, entropy +- error."""
    rows = []
    for text, name, result in _results(evaluation):
        found = result["calibration"]
        estimates = [_estimate(found[key]) for key in ("overconfidence", "accuracy", "brier", "entropy")]
        rows.append([text, model_title(name), f"{found['expected_calibration_error']:.3f}", *estimates])
    return rows


def agreements(evaluation: Record) -> Rows:
    """A row a text and model that was compared with its teacher: KL in nats a token and top-1 agreement +- error."""
    return [
        [text, model_title(name), _estimate(result["agreement"]["kl"]), _estimate(result["agreement"]["top1"])]
        for text, name, result in _results(evaluation)
        if result["agreement"] is not None
    ]


def agreements_by_frequency(evaluation: Record) -> Rows:
    """The same for each fifth of the text, by how often the predicted token occurs in the training blocks."""
    return [
        [
            text,
            model_title(name),
            f"{part['least']:,}" if part["least"] == part["most"] else f"{part['least']:,} to {part['most']:,}",
            _estimate(part["kl"]),
            _estimate(part["top1"]),
            f"{part['num_tokens']:,}",
        ]
        for text, name, result in _results(evaluation)
        if result["agreement"] is not None
        for part in result["agreement"]["by_frequency"]
    ]


def continuations(evaluation: Record) -> Rows:
    """A row a model, means over the prompts: tokens, how many ended, repetition, and how many tokens it has in common
    with the first model before it parts from it."""
    rows = []
    for number, (name, said) in enumerate(evaluation["continuations"].items()):
        lengths = [len(one["tokens"]) for one in said]
        in_common = [n if one["parts_at"] is None else one["parts_at"] for n, one in zip(lengths, said, strict=True)]
        rows.append(
            [
                model_title(name),
                f"{np.mean(lengths):.1f}",
                f"{sum(one['has_ended'] for one in said)} of {len(said)}",
                f"{np.mean([one['repetition'] for one in said]):.2f}",
                f"{np.mean(in_common):.1f}" if number else "",
            ]
        )
    return rows


def tasks(evaluation: Record) -> Rows:
    """A row a task, model and metric, with the harness's standard error, or why the task was skipped."""
    rows = []
    for task in dict.fromkeys(task for found in evaluation["tasks"].values() for task in found):
        for name, found in evaluation["tasks"].items():
            result = found[task]
            if result["skipped"] is not None:
                rows.append([task, model_title(name), "skipped", result["skipped"], ""])
            for metric, score in result["scores"].items():
                rows.append([task, model_title(name), metric, _estimate(score), f"{result['num_rows']:,}"])
    return rows


def _results(evaluation: Record) -> Iterator[tuple[str, str, Record]]:
    """(text, model, what was measured), the models of a text side by side."""
    for text in next(iter(evaluation["models"].values())):
        for name, results in evaluation["models"].items():
            yield text, name, results[text]


def model_title(name: str) -> str:
    """What a model of a run is called."""
    return {"compressed": "compressed, not distilled"}.get(name, name)


def _estimate(found: Record) -> str:
    return plus_minus(found["value"], found["standard_error"], "{:.3f}".format)


def left(plan: Record) -> str:
    """What the cut leaves of the matrices: zeros, neurons, ranks, or other sizes alone; or of the model: layers."""
    if plan.get("layer_scores"):  # a run of version 0.1 has none
        return "layers"
    keys = {"zeros": "zeros", "neurons": "neurons", "ranks": "rank"}
    found = (name for name, key in keys.items() if any(m.get(key) for m in plan["matrices"]))
    return next(found, "sizes")


def _left(matrix: Record) -> str:
    """The same of one matrix, with its number."""
    for name in ("zeros", "neurons"):  # a run of version 0.1 has no neurons
        if matrix.get(name):
            return f"{matrix[name]:,} {name}"
    if matrix["rank"]:
        return f"rank {matrix['rank']:,}"
    if not matrix["parameters_after"]:
        return "removed"
    return "dense" if matrix["parameters_after"] == matrix["parameters_before"] else "smaller"


def matrices(plan: Record) -> Rows:
    """A row a matrix: what it was, what is left, and the share of its output energy that the truncation loses."""
    rows = []
    for m in plan["matrices"]:
        lost = m["relative_error"]
        rows.append(
            [
                m["name"],
                f"{m['out_features']} x {m['in_features']}",
                _left(m),
                f"{m['parameters_before']:,}",
                f"{m['parameters_after']:,}",
                "" if lost is None else f"{lost:.2%}",
                "" if m["predicted_kl"] is None else f"{m['predicted_kl']:.5f}",
                "" if m["probed_kl"] is None else f"{m['probed_kl']:.5f} at {m['probed_rank']}",
            ]
        )
    return rows


def spectrum(found: Record) -> Titled:
    """A row a matrix: how many directions carry it, and what a uniform cut would lose."""
    rows = [
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
    return Titled(f"Spectra by {found['method']}; a uniform cut of {found['reduction']:.0%}", SPECTRUM_HEADER, rows)


def damage(found: Record) -> Titled:
    """A row an MLP: the predicted KL of keeping a share of its neurons, between multiples by a straight line, and its
    width with a width a layer and with one width; last the sums of what these cost."""
    rows = []
    for mlp in found["mlps"]:
        curve = np.interp([share * mlp["neurons"] for share in _KEPT], mlp["kept"], mlp["predicted_kl"])
        given = [f"{mlp['neurons_by_allocation'][name]:,}" for name in _ALLOCATIONS]
        rows.append([mlp["name"], f"{mlp['neurons']:,}", *(f"{kl:.2g}" for kl in curve), *given])
    sums = [f"{found['predicted_kl_by_allocation'][name]:.3g}" for name in _ALLOCATIONS]
    rows.append(["predicted KL of all", *[""] * (1 + len(_KEPT)), *sums])
    title = (
        f"Predicted KL (nats a token) of keeping a share of the neurons; widths for {found['reduction']:.0%} removed"
    )
    return Titled(title, DAMAGE_HEADER, rows)


def sizes(plan: Record) -> Rows:
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


def prefill(evaluation: Record) -> str | None:
    """How fast the last model reads a prompt beside the dense one; None where they were not timed side by side."""
    found = evaluation.get("prefill")  # a run of version 0.1 has none
    if found is None:
        return None
    dense, other = (found["seconds"][name] for name in ("dense", list(found["seconds"])[-1]))
    return (
        f"prefill {dense / other:.2f} times as fast as the dense model's, in PyTorch on this machine "
        f"({found['blocks']} blocks of {found['length']} tokens, the median of seven passes in turns)"
    )


def allocations(report: Record) -> str | None:
    """What the widths that were chosen are predicted to give up, and what the other allocation's would have; None where
    the method knows of one only."""
    plan, section = report["compression"], report["recipe"]["compress"]
    if plan.get("predicted_kl_by_allocation") is None:  # a run of version 0.1 has none
        return None
    return widths.compared(plan, section["method"], section[section["method"]]["allocation"])


def devices(plan: Record) -> Rows:
    """A row a stage: what each device holds by way to spread, the least that fits, and how fast that is."""
    found = []
    for stage, planned in plan["stages"].items():
        held, fit, speed = planned["memory_bytes"], planned["fit"], planned["tokens_per_second"]
        row = [stage, *(size(held[way]) if way in held else "" for way in DEVICE_HEADER[1:4])]
        if fit is None:
            found.append([*row, "nothing", "", "", ""])
            continue
        how = fit["way"] if fit["devices"] in (1, plan["devices"]["count"]) else f"{fit['way']} on {fit['devices']}"
        how += f", {fit['setting']}" if fit["setting"] else ""
        time = "not known" if planned["seconds"] is None else duration(planned["seconds"])
        found.append([*row, how, size(fit["memory_bytes"]), "" if speed is None else f"{speed:,.0f}", time])
    return found


def seconds(by_stage: dict[str, float]) -> Rows:
    """A row a stage: how long it took, or will take."""
    return [[name, duration(value)] for name, value in by_stage.items()]


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


def memory(gathered: Record) -> str:
    """The most that a stage held of the host's memory, and of the device's where it is no CPU."""
    host, device = gathered["peak_memory_bytes"] / 1e9, gathered["peak_device_memory_bytes"]
    return f"{host:.1f} GB" if device is None else f"{host:.1f} GB host, {device / 1e9:.1f} GB device"


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} PB"
