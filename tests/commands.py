"""What a command came to, and what lies below a folder before and after it; the fixtures are in `conftest.py`."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """The exit code of a command, and what it has printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All paths below a folder, with the content of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
