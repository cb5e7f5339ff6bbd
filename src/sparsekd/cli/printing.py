"""How results are shown: JSON, facts, and the tables of `report`; and what is kept from showing beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekd.records import Record
    from sparsekd.report import tables
    from sparsekd.run import DevicePlan, Estimate


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    from sparsekd.files import as_json

    print(as_json(value, "the result", indent=1))


def keep(folder: Path | None, name: str, found: Record, picture: Callable[[Record], str]) -> None:
    """Writes what was measured, and the picture of it, into a folder that was asked for."""
    from sparsekd import files

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / f"{name}.json", found)
        files.write_text(folder / f"{name}.svg", picture(found))


def print_facts(facts: Record, as_json: bool) -> None:
    """A line for each fact, the values below each other."""
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def print_export(folder: Path, record: Record, as_json: bool) -> None:
    """What `export` returns, and where the folder is."""
    if as_json:
        print_json({"folder": str(folder), **record})
        return
    found, versions = record["comparison"], (f"{name} {version}" for name, version in record["versions"].items())
    here, dense = record["parameters"], record["dense_parameters"]
    beside = f", the dense model's weights {record['dense_bytes'] / 1e6:,.1f} MB" if record["dense_bytes"] else ""
    facts = {
        "folder": folder,
        "format": f"{record['format']}, {record['weights']}",
        "size": f"{record['bytes'] / 1e6:,.1f} MB{beside}",
        "parameters": f"{here:,} of the dense model's {dense:,} ({here / dense:.1%})",
        "opened with": ", ".join(versions),
        "logits": f"differ by at most {found['largest_logit_difference']:.2g} from PyTorch's in float32",
        "likeliest token": f"the same at {found['agreement']:.2%} of {found['tokens']:,} positions",
        "perplexity": f"{found['perplexity']:.4f}, PyTorch {found['reference_perplexity']:.4f}",
    }
    print_facts(facts | ({"notes": "; ".join(record["notes"])} if record["notes"] else {}), as_json=False)


def print_tables(titled: Iterable[tables.Titled]) -> None:
    """Where nobody watches, wide enough for the widest of them."""
    from rich.console import Console

    from sparsekd.report import tables

    plain = Console()
    if not plain.is_terminal:
        plain = Console(width=140)
    for table in titled:
        plain.print(tables.console_table(table.title, table.header, table.rows))


def print_evaluation(found: Record, as_json: bool) -> None:
    """What was measured of each model on texts and tasks."""
    from sparsekd.report import tables

    if as_json:
        print_json(found)
        return
    print_tables(tables.evaluation({"ratios": {}} | found))


def print_report(gathered: Record, folder: Path, as_json: bool) -> None:
    """What `report.gather` gives, and where the model and the page are."""
    from sparsekd.report import frontier, tables

    if as_json:
        print_json(gathered)
        return
    print_tables([tables.Titled("Parameters", tables.SIZE_HEADER, tables.sizes(gathered["compression"]))])
    for line in (tables.prefill(gathered["evaluation"]), tables.allocations(gathered)):
        if line is not None:
            print(line)
    if not gathered["recipe"]["evaluate"]["texts"]:
        print("perplexity: not measured, for the recipe names no text in evaluate.texts")
    print_evaluation(gathered["evaluation"], as_json=False)
    if len(gathered["rounds"]) > 1:
        print_tables([tables.Titled("Rounds", *tables.rounds(gathered))])
    if gathered["bench"]:
        print_tables(frontier.tables(gathered["bench"]))
    total = ["total", tables.duration(sum(gathered["seconds"].values()))]
    print_tables([tables.Titled("Time", ["stage", ""], [*tables.seconds(gathered["seconds"]), total])])
    print(f"peak memory {tables.memory(gathered)}")
    print(f"model:  {folder / gathered['model_folder']}   (open it with sparsekd.load)")
    print(f"report: {folder / 'report.html'}")


def print_plan(planned: Estimate, as_json: bool) -> None:
    """What `run.estimate` gives."""
    from sparsekd.report import tables

    if as_json:
        print_json(planned.as_dict())
        return
    structure = planned.compression.as_dict()
    rows = [row[:5] for row in tables.matrices(structure)]
    print_tables([tables.Titled("Matrices", tables.MATRIX_HEADER[:5], rows)])
    print_tables([tables.Titled("Parameters", tables.SIZE_HEADER, tables.sizes(structure))])
    print_costs(planned)


def print_costs(planned: Estimate) -> None:
    """The device, bytes and time of a plan, as far as it has the stages that take them."""
    from sparsekd.report import tables

    print(f"device        {planned.device}, {planned.dtype}")
    if "cache" in planned.seconds:
        _print_cache(planned)
    if "distill" in planned.seconds:
        print(f"peak memory   about {planned.peak_memory_bytes / 1e9:.1f} GB")
    for name, duration in tables.seconds(planned.seconds):
        print(f"{name:<13} about {duration}")
    print(f"{'total':<13} about {tables.duration(sum(planned.seconds.values()))}")


def _print_cache(planned: Estimate) -> None:
    from sparsekd.report import tables

    recipe = planned.recipe
    if recipe.distill.teacher == "online":
        print("teacher cache none: distill.teacher is online")
        return
    print(f"teacher cache {planned.cache_tokens:,} tokens, before zstd")
    for name, size in planned.cache.items():
        chosen = "  <- this recipe" if name == recipe.cache.codec else ""
        total = tables.size(float(size.bytes))
        print(f"  {name:<11} {size.bytes_per_token:>4} bytes a token  {total:>9}{chosen}")


def print_device_plan(planned: DevicePlan, as_json: bool) -> None:
    """What `run.plan_devices` gives."""
    from sparsekd.report import tables

    if as_json:
        print_json(planned.as_dict())
        return
    estimate = planned.estimate
    print_tables([tables.Titled("Parameters", tables.SIZE_HEADER, tables.sizes(estimate.compression.as_dict()))])
    print_tables(
        [tables.Titled("Memory of each device, and time", tables.DEVICE_HEADER, tables.devices(planned.as_dict()))]
    )
    print(f"devices       {estimate.device}, {estimate.dtype}")
    print(f"speed         {planned.assumption}")
    if planned.note is not None:
        print(f"note          {planned.note}")
    _print_cache(estimate)
    if estimate.seconds.keys() == planned.stages.keys():
        print(f"{'total':<13} about {tables.duration(sum(estimate.seconds.values()))}")


def prints_results() -> bool:
    """Whether it is this process, of several that run together, that prints."""
    from sparsekd.device import rank_and_count

    rank, _ = rank_and_count()
    return rank == 0


def quiet() -> None:
    """Silences the notes of transformers and of the harness; ours say what is going on."""
    import logging

    from transformers.utils import logging as notes

    notes.set_verbosity_error()
    notes.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
