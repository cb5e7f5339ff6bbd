"""Where documents come from: local files, Hub data sets, and text that installed packages carry.

`read` gives (id, text) pairs in a fixed order. An id names the source file and the row, article or function.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd.corpus import embedded
from sparsekd.errors import DataError, ResourceError, UsageError
from sparsekd.recipe import Source, expanded

_EMPTY_LINE = re.compile(r"(?>\r\n|\r|\n)\s*[\r\n]")  # the default split, whatever ends the lines
_BATCH_BYTES = 2**25  # of a Parquet file's rows that are unpacked at a time


def read(source: Source, root: str | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of each document that is not blank.

    Raises `DataError` for a file that is missing, empty or not what its name says, `ResourceError` for a package that
    is not installed, `UsageError` for a kind of file that is not known.
    """
    if source.embedded == "wikipedia":
        documents = embedded.wikipedia()
    elif source.embedded == "python":
        documents = embedded.python_functions()
    elif source.hub is not None:
        documents = _hub(source)
    else:
        assert source.path is not None
        documents = _file(resolve(source.path, root), source)
    kept = ((identifier, text) for identifier, text in documents if text.strip())
    first = next(kept, None)
    if first is None:
        raise DataError(f"{source.path or source.hub or source.embedded}: no text in it")
    return itertools.chain([first], kept)


def resolve(path: str, root: str | None) -> Path:
    """A recipe's path: relative ones start from `corpus.root`; raises `DataError` when there is no such file."""
    resolved = expanded(root or ".") / expanded(path)
    if not resolved.is_file():
        hint = "" if root else "; relative paths start from corpus.root"
        raise DataError(f"{resolved}: no such file{hint}")
    return resolved


def _file(path: Path, source: Source) -> Iterator[tuple[str, str]]:
    if path.suffix == ".txt":
        try:
            split = _EMPTY_LINE if source.split == Source.split else re.compile(source.split)
        except re.error as error:
            raise UsageError(f"{path}: split {source.split!r} is not a regular expression: {error}") from None
        rows: Iterator[str] = (piece for piece in split.split(read_txt(path)) if piece is not None)
    elif path.suffix == ".jsonl":
        rows = (_column(row, source.text, f"{path}:{number}") for number, row in read_jsonl(path))
    elif path.suffix == ".parquet":
        rows = _parquet(path, source.text)
    else:
        raise UsageError(f"{path}: expected a .txt, .jsonl or .parquet file")
    return ((f"{path.name}:{number}", text) for number, text in enumerate(rows))


def read_txt(path: Path) -> str:
    """A UTF-8 text file as it is; raises `DataError` when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}: convert it first") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row) of each row; raises `DataError` naming the line that is not JSON."""
    with path.open("rb") as lines:  # bytes: some texts contain Unicode line separators, which are not row ends
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # a lone \ud800 is JSON, but not text
                yield number, row
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not a JSON object: {error}") from None


def _parquet(path: Path, template: str) -> Iterator[str]:
    names = _names(template)
    number = 0
    try:
        columns = pq.read_schema(path).names
        absent = set(names) - set(columns)
        if absent:
            raise _no_column(str(path), min(absent), columns)
        file = pq.ParquetFile(path, read_dictionary=names)  # a text of megabytes that repeats is held once
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group)
            batch_size = max(1, min(256, _BATCH_BYTES * size.num_rows // max(1, size.total_byte_size)))
            for batch in file.iter_batches(batch_size, row_groups=[group], columns=names):
                for index in range(batch.num_rows):
                    where = f"{path} row {number}"
                    yield _column({name: _text(batch.column(name)[index], where) for name in names}, template, where)
                    number += 1
    except (pa.ArrowException, OSError, KeyError) as error:  # KeyError: a column that only the Arrow schema has
        raise DataError(f"{path}: not readable as Parquet: {' '.join(str(error).split())}") from None


def _text(value: pa.Scalar, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}: convert it first") from None


def _names(template: str) -> list[str]:
    """The columns of a template, in which {name} stands for one; without any, it is the name of a column."""
    return re.findall(r"\{(\w+)\}", template) or [template]


def _column(row: Any, template: str, where: str) -> str:
    """The text of a row: one column, or a template of several."""
    names = _names(template)
    for name in names:
        if not isinstance(row, dict) or name not in row:
            raise _no_column(where, name, row if isinstance(row, dict) else [type(row).__name__])
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name!r} is {type(row[name]).__name__}: expected text; set `text` of the source")
    if names == [template]:
        return row[template]
    return re.sub(r"\{(\w+)\}", lambda match: row[match[1]], template)


def _no_column(where: str, name: str, found: Iterable[str]) -> DataError:
    return DataError(f"{where}: no text column {name!r} (found: {', '.join(found)}); set `text` of the source")


def _hub(source: Source) -> Iterator[tuple[str, str]]:
    """A Hub data set as a stream: nothing is downloaded beyond what is read."""
    try:
        import datasets
    except ImportError:
        raise ResourceError('Hub data sets need a package: pip install "sparsekd[data]"') from None
    assert source.hub is not None
    split = source.split if source.split != Source.split else "train"
    try:
        stream = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision, streaming=True)
        for number, row in enumerate(stream):
            yield f"{source.hub}:{split}:{number}", _column(row, source.text, f"{source.hub} row {number}")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data set {source.hub} cannot be read: {reason}") from error
