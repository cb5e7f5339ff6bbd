"""Records: the JSON objects that SparseKD writes and reads again, and the hashes of the files beside them.

A record carries a checksum of the rest of itself, so that a changed figure is noticed as surely as a torn file. A
listing has the size and the sha256 of each of a folder's files by their names; it stands in a record, which vouches for
it. Records of earlier versions have no checksum and are taken as they are. Who changes a file and its hashes as well
goes unnoticed: this is against damage, not against forgery.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from sparsekd import files
from sparsekd.errors import DataError

_CHECKSUM = "checksum"
Record = dict[str, Any]  # a JSON object, as it is written and read again
Listing = dict[str, Record]


def write(path: Path, content: Record) -> None:
    """Writes a record atomically."""
    files.write_json(path, content | {_CHECKSUM: _checksum(content)})


def read(path: Path, needed: Iterable[str] = (), way_out: str = "") -> Record:
    """The content of a record; raises `DataError` naming the file and the `way_out` when it is missing, is not what was
    written, or lacks one of the keys that are `needed`."""
    hint = f"; {way_out}" if way_out else ""
    try:
        content = files.read_json(path)
    except DataError as error:
        raise DataError(f"{error}{hint}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: expected a JSON object{hint}")
    checksum = content.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(content):
        raise DataError(f"{path} is damaged: its content is not what was written{hint}")
    missing = [key for key in needed if key not in content]
    if missing:
        raise DataError(f"{path} is damaged: {missing[0]} is missing{hint}")
    return content


def exponential(nats: float) -> float:
    """e^nats, e^700 at most: what a destroyed model has stays a number that a float, and JSON, can hold."""
    return math.exp(min(nats, 700.0))


def _checksum(content: Record) -> str:
    return files.sha256(json.dumps(content))  # in the order of the keys, which a file keeps


def listing(folder: Path, paths: Iterable[Path]) -> Listing:
    """Size and sha256 of each of these files of the folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)}
        for path in sorted(paths)
    }


def require(record: Path, listed: Any, way_out: str, spared: str | None = None) -> None:
    """Raises `DataError` naming the first file beside the record that is not as it is `listed` there; those of the
    folder `spared` may be missing."""
    if not _is_listing(listed):
        raise DataError(f"{record} is damaged: expected files with their sizes and hashes; {way_out}")
    for name, facts in listed.items():
        path = record.parent / name
        if not path.is_file():
            if spared is not None and name.startswith(f"{spared}/"):
                continue
            raise DataError(f"{path} is missing; {way_out}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise DataError(f"{path} is damaged: {size} bytes, expected {facts['bytes']}; {way_out}")
        if files.file_sha256(path) != facts["sha256"]:
            raise DataError(f"{path} is damaged: its content is not what was written; {way_out}")


def _is_listing(value: Any) -> bool:
    """Whether a value that was read is a listing, of files in the folder and nowhere else."""
    return isinstance(value, dict) and all(
        isinstance(facts, dict) and facts.keys() == {"bytes", "sha256"} and _is_inside(PurePosixPath(name))
        for name, facts in value.items()
    )


def _is_inside(path: PurePosixPath) -> bool:
    return not path.is_absolute() and ".." not in path.parts
