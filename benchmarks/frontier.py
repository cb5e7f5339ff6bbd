"""Perplexity against speed and bytes: the dense model and the last ones of runs, as they are and quantised.

    python benchmarks/frontier.py RUN... [--format openvino] [--text wikitext2] [--minutes 5]

What `sparsekd frontier` measures, recorded; and the picture of it for the README and docs/bench.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _record import RESULTS, record

from sparsekd import files, pipeline
from sparsekd.console import Console
from sparsekd.report import frontier

PICTURE = RESULTS.parents[1] / "docs" / "images" / "frontier.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--format")
    parser.add_argument("--text")
    parser.add_argument("--minutes", type=float, default=5.0)
    given = parser.parse_args()
    found = pipeline.frontier(given.runs, given.text, Console(), format_=given.format, minutes=given.minutes)
    record("frontier", found)
    files.write_text(PICTURE, frontier.picture(found))


if __name__ == "__main__":
    main()
