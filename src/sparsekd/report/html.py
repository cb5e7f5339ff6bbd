"""The HTML page: one file with everything in it, no script and no address outside."""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from sparsekd.device import memory_named
from sparsekd.evaluate import continuations
from sparsekd.records import Record
from sparsekd.report import experiments, figures, frontier, plots, said, tables

_drawing = memory_named(lambda: "the report", "all that it shows is finished, so call the same command again")


@_drawing
def render(report: Record) -> str:
    """The page for `report.gather`'s data; every text in it is escaped, since model names and paths are not ours."""
    pictures = {"loss": plots.loss_curve(report["distillation"])}
    if report["recipe"]["evaluate"]["texts"]:
        pictures["perplexities"] = plots.perplexities(report["evaluation"])
        pictures["calibration"] = plots.calibration(report["evaluation"])
        if len(report["rounds"]) > 1:
            pictures["rounds"] = plots.rounds(report["rounds"])
    if report["bench"]:
        pictures["frontier"] = frontier.picture(report["bench"])
    structure = report["compression"]
    left = tables.left(structure)
    if left != "zeros":
        drawn = {"neurons": plots.widths, "ranks": plots.ranks, "layers": plots.layers}[left]
        pictures["structure"] = drawn(structure)
    return _template("report.html").render(
        report=report,
        masked=left == "zeros",
        heading={
            "zeros": "Zeros by matrix",
            "neurons": "Neurons by layer",
            "ranks": "Ranks by layer",
            "layers": "Layers",
        }[left],
        pictures=_drawn(pictures),
        rounds=tables.rounds(report),
        size_header=tables.SIZE_HEADER,
        sizes=tables.sizes(structure),
        prefill=tables.prefill(report["evaluation"]),
        evaluation={table.title: table for table in tables.evaluation(report["evaluation"])},
        frequency_header=tables.FREQUENCY_HEADER,
        frequencies=tables.agreements_by_frequency(report["evaluation"]),
        said=said.side_by_side(report["evaluation"]["continuations"]),
        num_said=continuations.NUM_TOKENS,
        allocations=tables.allocations(report),
        matrix_header=tables.MATRIX_HEADER,
        matrices=tables.matrices(structure),
        frontier=list(frontier.tables(report["bench"])) if report["bench"] else [],
        seconds=tables.seconds(report["seconds"]),
        memory=tables.memory(report),
        total=tables.duration(sum(report["seconds"].values())),
    )


@_drawing
def render_experiment(found: Record) -> str:
    """The page for what `reproduce` found."""
    name = "speed.html" if "measured" in found else "experiment.html"
    return _template(name).render(
        found=found, tables=experiments.all_tables(found), pictures=_drawn(figures.all_figures(found))
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsekd.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _drawn(pictures: dict[str, str]) -> dict[str, Markup]:
    return {name: Markup(svg) for name, svg in pictures.items()}  # noqa: S704 - our own SVG
