"""The only module that writes files: temporary name, flush to disk, rename. A final name is always whole.

Nothing here knows what a file means. Readers raise `DataError` with the path, so that damage is named where it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekd.errors import DataError, ResourceError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the limit of one file
_CLOCK_NS = 100_000_000  # of file systems, generously: a change soon after another may leave a file's time as it was
_HASHES: dict[tuple[int, ...], str] = {}  # of files that were hashed here, by what tells them apart without reading
_HOLDER = re.compile(r"(process \d+)?")  # what a lock file says
_TEMPORARY = re.compile(r"(\.old)?\.tmp-\d+$")  # on its way in, or out


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to be filled as a file or a folder; renamed to `path` when the block ends.

    An existing file is replaced; an existing folder is replaced only after the new one is complete. If the block
    raises, the temporary is removed and `path` is as it was. Raises `ResourceError` when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    remove(temporary)
    try:
        yield temporary
        _settle(temporary)
        if path.is_dir():
            remove(path)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        remove(temporary)
        if error.errno in _FULL:
            raise ResourceError(_disk_full(path)) from error
        raise
    except BaseException as error:
        remove(temporary)
        # safetensors and pyarrow put the system's words into exceptions of their own
        if any(os.strerror(code) in str(error) for code in _FULL):
            raise ResourceError(_disk_full(path)) from error
        raise


def _disk_full(path: Path) -> str:
    free = shutil.disk_usage(path.parent).free
    return f"no space left while writing {path} ({_size(free)} free): free some and run the same command again"


def _size(num_bytes: int | float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e7 else f"{num_bytes:,.0f} bytes"


def _settle(path: Path) -> None:
    """Gives every file the mode that a new file has, since safetensors makes its own private, and flushes it."""
    mask = os.umask(0o077)  # it can be read only by setting it
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; raises `DataError` naming the number that is not finite."""
    write_text(path, as_json(value, str(path), indent=1) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Appends one JSON line to a log. A torn last line after a crash is harmless: logs are never read back as input."""
    line = as_json(value, str(path)) + "\n"
    with os.fdopen(_open_in_place(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as handle:
        handle.write(line)


def as_json(value: Any, what: str, indent: int | None = None) -> str:
    """`value` as JSON, which has no NaN and no infinity; raises `DataError` naming the first of them in `what`."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        name, number = next(_not_finite(value))
        raise DataError(f"{what}: {name} is not finite ({number}): the model that it is of is broken") from None


def _not_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested objects and lists that are NaN or infinite, with their places."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name or "it", value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, one in inner:
        yield from _not_finite(one, f"{name}.{key}" if name else str(key))


def _open_in_place(path: Path, flags: int) -> int:
    """Opens a file that is written without a temporary; raises `UsageError` for a link, which may lead to a file that
    is not ours, and for anything else but a file."""
    try:
        # without waiting: a pipe would wait for its other end
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise _not_a_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file(path)
    return descriptor


def _not_a_file(path: Path) -> UsageError:
    return UsageError(f"{path} is a link or no file, so it is not written to: remove it, or choose another --out")


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises `DataError` naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise DataError(f"{path} is damaged: not JSON ({error})") from None


def remove(path: Path) -> None:
    """Removes a file or a folder with its content; a missing one is fine.

    A folder loses its name first: a process killed here leaves a temporary, not half a folder that looks whole.
    """
    if path.is_dir() and not path.is_symlink():
        if not is_temporary(path):
            path = path.rename(path.with_name(f"{path.name}.old.tmp-{os.getpid()}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a name is of what is on its way in, or out."""
    return bool(_TEMPORARY.search(path.name))


def remove_temporaries(folder: Path, owned: Callable[[str], bool] = lambda name: True) -> None:
    """Removes what a killed process left half written directly in `folder`, of the final names that are `owned`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path) and owned(_TEMPORARY.sub("", path.name)):
            remove(path)


@contextmanager
def lock(path: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock file `path`; `shared` lets others share it, and nobody hold it alone.

    The system releases the lock of a process that dies. Raises `UsageError` naming `what` and who has it.
    """
    descriptor = _take(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, what)
    try:
        yield
    finally:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)  # while it is held: whoever opened it meanwhile sees that it is gone
        except BlockingIOError:
            pass  # others share it still
        finally:
            os.close(descriptor)


def _take(path: Path, kind: int, what: str) -> int:
    while True:
        descriptor = _open_in_place(path, os.O_RDWR)
        content = os.read(descriptor, 100).decode(errors="replace")
        if not _HOLDER.fullmatch(content):
            os.close(descriptor)
            raise UsageError(f"{path} is no lock of sparsekd: remove it, or choose another --out")
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            holder = content or "another process"
            raise UsageError(f"{what} is in use by {holder}: wait for it, or choose another --out") from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
            return descriptor
        os.close(descriptor)  # its last holder removed it after it was opened here


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises `ResourceError` unless `folder`'s disk has `num_bytes` and a tenth more free."""
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * num_bytes:
        raise ResourceError(
            f"{what} needs about {_size(1.1 * num_bytes)} in {folder}, only {_size(free)} are free: "
            "free some, or choose another disk with --out"
        )


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the sha256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(text: str) -> str:
    """Hex sha256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; those of a file that stays as it is are read once in a process."""
    found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _HASHES:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if time.time_ns() - found.st_mtime_ns < _CLOCK_NS:
            return digest
        _HASHES[key] = digest
    return _HASHES[key]
