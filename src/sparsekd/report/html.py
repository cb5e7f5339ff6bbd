"""The HTML page: one file with everything in it, no script and no address outside."""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from sparsekd.report import plots, tables


def render(report: dict[str, Any]) -> str:
    """The page for `report.gather`'s data; every text in it is escaped, since model names and paths are not ours."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsekd.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {
        "perplexities": plots.perplexities(report["evaluation"]),
        "calibration": plots.calibration(report["evaluation"]),
        "loss": plots.loss_curve(report["distillation"]),
        "ranks": plots.ranks(report["compression"]),
    }
    seconds = [[name, tables.duration(value)] for name, value in report["seconds"].items()]
    return environment.get_template("report.html").render(
        report=report,
        pictures={name: Markup(svg) for name, svg in pictures.items()},  # noqa: S704 - our own SVG
        sizes=tables.sizes(report["compression"]),
        evaluation={table.title: table for table in tables.evaluation(report["evaluation"])},
        frequency_header=tables.FREQUENCY_HEADER,
        frequencies=tables.agreements_by_frequency(report["evaluation"]),
        matrix_header=tables.MATRIX_HEADER,
        matrices=tables.matrices(report["compression"]),
        seconds=seconds,
        total=tables.duration(sum(report["seconds"].values())),
    )
