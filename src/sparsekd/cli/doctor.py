"""`sparsekd doctor`: what is installed here, and on which machine."""

from __future__ import annotations

from sparsekd.cli import printing
from sparsekd.cli.options import AsJson


def command(as_json: AsJson = False) -> None:
    """Versions, device, free disk, and which optional packages are here."""
    from sparsekd.run import diagnose

    printing.print_facts(diagnose(), as_json)
