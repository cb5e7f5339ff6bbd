"""The recorded experiments of `sparsekd reproduce` as Markdown, and their pictures.

    python benchmarks/reproduce_summary.py [FOLDER] [--pictures DIR]

FOLDER holds `reproduce-<experiment>.json` files, by default those of benchmarks/results/reproduce. Prints every table;
with --pictures every figure is written there as SVG.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from sparsekd import files
from sparsekd.report import experiments, figures
from sparsekd.report.tables import Titled

RECORDED = Path(__file__).parent / "results" / "reproduce"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=RECORDED)
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    for path in sorted(given.folder.glob("**/reproduce-*.json")):
        found = files.read_json(path)
        where = path.relative_to(given.folder)
        print(f"# {where}: seeds {found['seeds']}, {found['tokens']:,} tokens\n")
        for table in experiments.all_tables(found):
            print("\n".join(_markdown(table)))
        if given.pictures:
            for title, svg in figures.all_figures(found).items():
                name = "-".join([*where.parent.parts, found["experiment"], *title.lower().split()])
                files.write_text(given.pictures / f"{name}.svg", svg)


def _markdown(table: Titled) -> Iterator[str]:
    yield f"{table.title}:\n"
    for row in (table.header, ["---"] * len(table.header), *table.rows):
        yield f"| {' | '.join(row)} |"
    yield ""


if __name__ == "__main__":
    main()
