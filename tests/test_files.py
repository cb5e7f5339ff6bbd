"""A final name is always whole: atomic writes, JSON, leftovers of killed processes, and full disks."""

import contextlib
import errno
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsekd import files
from sparsekd.errors import DataError, ResourceError, UsageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    for text in ("old", "new"):
        with files.atomic_path(path) as temporary:
            assert temporary.parent == path.parent  # the same disk, so that the rename is atomic
            temporary.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


def test_nothing_is_visible_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.EIO, "no"), KeyboardInterrupt()])
def test_a_block_that_raises_keeps_the_old_file_and_leaves_no_temporary(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("one", "two"):
        with files.atomic_path(path) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / name).write_text(name)
    assert names(path / "inner") == ["two"]
    assert names(tmp_path) == ["model"]


def test_a_folder_survives_a_block_that_raises(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(ValueError, match="half"), files.atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
        raise ValueError("half way")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_what_a_process_of_the_same_number_left_is_not_mixed_in(tmp_path: Path) -> None:
    left = tmp_path / f"model.tmp-{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("")
    with files.atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "fresh").write_text("")
    assert names(tmp_path / "model") == ["fresh"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors words it
    ],
)
def test_a_full_disk_is_a_resource_error_naming_the_file(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    expected = pytest.raises(ResourceError, match=r"^no space left while writing .*a\.txt .*: free some [^\n]*$")
    with expected, files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        RuntimeError("I/O error: Disk quota exceeded (os error 122)"),  # as safetensors words it
    ],
)
def test_a_quota_that_is_used_up_is_a_resource_error(error: Exception, tmp_path: Path) -> None:
    """How a disk is full on a cluster."""
    with pytest.raises(ResourceError, match=r"a\.txt"), files.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full exists on Linux only")
def test_a_disk_that_really_is_full(tmp_path: Path) -> None:
    with pytest.raises(ResourceError), files.atomic_path(tmp_path / "a.txt"):
        Path("/dev/full").write_text("too much")
    assert names(tmp_path) == []


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é": "ü\r\n"}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_without_a_word_for_it_is_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"loss": 1.0})
    with pytest.raises(DataError, match=r"a\.json: steps\.1\.loss is not finite \(-?(nan|inf)\)"):
        files.write_json(path, {"steps": [{"loss": 1.0}, {"loss": value}]})
    assert files.read_json(path) == {"loss": 1.0}
    with pytest.raises(DataError, match="it is not finite"):
        files.append_line(path, value)
    assert files.read_json(path) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_mode_that_a_new_one_has(mask: int, tmp_path: Path) -> None:
    """Safetensors makes its files private: a colleague could read all of a model but its weights."""
    before = os.umask(mask)
    try:
        with files.atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            save_file({"a": torch.ones(2)}, temporary / "model.safetensors")
        assert os.umask(mask) == mask  # it was put back
    finally:
        os.umask(before)
    assert (tmp_path / "model/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_json_is_a_data_error_naming_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)


def test_missing_json_is_a_data_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        files.read_json(tmp_path / "manifest.json")


def test_lines_are_appended(tmp_path: Path) -> None:
    for step in range(2):
        files.append_line(tmp_path / "log.jsonl", {"step": step})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_space_is_asked_of_the_disk_even_of_a_folder_to_be(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    files.require_space(folder, 1000, "the cache")
    with pytest.raises(ResourceError, match="the cache needs about") as caught:
        files.require_space(folder, 10**18, "the cache")
    assert str(folder) in str(caught.value)
    assert not folder.exists()


@pytest.mark.parametrize(("free", "enough"), [(1100, True), (1099, False)])
def test_a_tenth_more_than_needed_must_be_free(free: int, enough: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))  # type: ignore[attr-defined]
    with contextlib.nullcontext() if enough else pytest.raises(ResourceError):
        files.require_space(tmp_path, 1000, "the cache")


def test_fingerprint_depends_on_values_and_not_on_the_order_of_keys() -> None:
    value = {"a": 1, "b": {"x": [1, 2], "y": None}}
    turned = {"b": {"y": None, "x": [1, 2]}, "a": 1}
    assert files.fingerprint(value) == files.fingerprint(turned)
    assert len(files.fingerprint(value)) == 16
    others = [{**value, "a": 2}, {**value, "b": {"x": [2, 1], "y": None}}, {**value, "c": 0}]
    assert files.fingerprint(value) not in [files.fingerprint(other) for other in others]


def test_only_temporaries_are_removed(tmp_path: Path) -> None:
    kept = ["a.json", "a.tmp", "a.tmp-", "a.tmp-12x", "tmp-3", "a.tmp-1.json"]
    for name in [*kept, "a.json.tmp-123"]:
        (tmp_path / name).write_text("")
    (tmp_path / "model.tmp-9").mkdir()
    (tmp_path / "model.tmp-9" / "weights").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.tmp-1").write_text("")
    files.remove_temporaries(tmp_path)
    assert names(tmp_path) == sorted([*kept, "sub"])
    assert names(tmp_path / "sub") == ["b.tmp-1"]  # directly in the folder only
    files.remove_temporaries(tmp_path / "missing")


def test_remove_leaves_alone_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "weights").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "link")  # a missing one is fine
    assert names(tmp_path) == ["target"]
    assert names(tmp_path / "target") == ["weights"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_whose_removal_is_interrupted_has_lost_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text("{}")

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", interrupted)
        files.remove(folder)
    assert not folder.exists()
    files.remove_temporaries(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_is_for_one_or_shared(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with files.lock(path, "a"), pytest.raises(UsageError, match=r"a is in use by process \d+"), files.lock(path, "a"):
        pass
    with files.lock(path, "a", shared=True):
        with files.lock(path, "a", shared=True), pytest.raises(UsageError), files.lock(path, "a"):
            pass
        with pytest.raises(UsageError), files.lock(path, "a"):  # the other has left, this one is still in
            pass
    with files.lock(path, "a"):
        assert path.exists()
    assert not path.exists()


def take(path: Path) -> None:
    with files.lock(path, "a"):
        pass


@pytest.mark.parametrize("write", [take, lambda path: files.append_line(path, {"step": 1})], ids=["lock", "log"])
def test_what_is_written_in_place_follows_no_link(write: Callable[[Path], None], tmp_path: Path) -> None:
    foreign, path = tmp_path / "foreign", tmp_path / "in_place"
    for content in ("process 1", "", None):  # a lock, an empty file, none yet
        if content is not None:
            foreign.write_text(content)
        path.symlink_to(foreign)
        with pytest.raises(UsageError, match=f"^{path} is a link or no file[^\n]*$"):
            write(path)
        assert path.is_symlink()
        assert (foreign.read_text() if foreign.exists() else None) == content
        path.unlink()
        foreign.unlink(missing_ok=True)


@pytest.mark.parametrize("write", [take, lambda path: files.append_line(path, {"step": 1})], ids=["lock", "log"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_written_in_place_is_a_file(
    make: Callable[[Path], None], write: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "in_place")
    with pytest.raises(UsageError, match="is a link or no file"):
        write(tmp_path / "in_place")


def test_a_file_by_the_name_of_a_lock_keeps_its_content(tmp_path: Path) -> None:
    """Also one that is the same file as another elsewhere."""
    (tmp_path / "notes").write_text("a page of notes")
    (tmp_path / "run.lock").hardlink_to(tmp_path / "notes")
    with pytest.raises(UsageError, match=r"run\.lock is no lock of sparsekd"):
        take(tmp_path / "run.lock")
    assert (tmp_path / "notes").read_text() == "a page of notes"
