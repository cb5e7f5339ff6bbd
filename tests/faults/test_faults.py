"""A sample of what `make fuzz` does for an hour: nothing silent, no traceback, nothing slow or large, clear messages.

A process of its own attacks, for this one has computed already and is not to be forked. `benchmarks/faults.py --replay`
repeats what is shown of a failure.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


KINDS = ("flip", "cut", "zero", "swap", "delete")
KINDS += ("recipe-text", "recipe-values", "whole-run", "arguments", "model", "text", "memory")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--quick", "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_gets_through(kind: str, found: dict[str, Any]) -> None:
    assert found["counts"].keys() == set(KINDS)
    assert [one for one in found["what_got_through"] if one["replay"].split(" ")[0] == kind] == []


def test_what_is_not_found_is_counted() -> None:
    """The judge itself: a changed figure is silent, an exception a traceback, a message one line of its place."""
    command = [sys.executable, "-c", _JUDGED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


_JUDGED = """
import children, damage, verdicts
from children import Call

def verdict(call, **changes):
    untouched = '{"figure": 1, "seconds": 2, "cache": "finished"}'
    return damage._verdict(call, untouched, ["part-0", "/run/corpus"], **changes)[0]

def failed(message, code=3):
    return verdict(Call(code, "", message), was_remade=False)

whole = '{"figure": %d, "seconds": %d, "cache": "%s"}'
assert verdict(Call(0, whole % (1, 2, "finished"), ""), was_remade=False) == verdicts.HARMLESS
assert verdict(Call(0, whole % (3, 2, "finished"), ""), was_remade=True) == verdicts.SILENT
assert verdict(Call(0, whole % (1, 9, "finished"), ""), was_remade=False) == verdicts.SILENT
assert verdict(Call(0, whole % (1, 9, "finished"), ""), was_remade=True) == verdicts.REMADE
assert verdict(Call(0, whole % (1, 2, "damaged"), ""), was_remade=False) == verdicts.NAMED
begun = '{"train": "started, not finished"}'
assert damage._verdict(Call(0, '{"train": "damaged: x"}', ""), begun, [], True)[0] == verdicts.NAMED
assert damage._verdict(Call(0, '{"train": "not started"}', ""), begun, [], True)[0] == verdicts.SILENT
assert verdict(Call(1, "", "", crash="KeyError"), was_remade=False) == verdicts.TRACEBACK
assert verdict(Call(0, whole % (1, 2, "finished"), "", seconds=11), was_remade=False) == verdicts.SLOW
assert verdict(Call(0, whole % (1, 2, "finished"), "", memory_bytes=2 * 10**9), was_remade=False) == verdicts.LARGE
assert failed("corpus ...\\nsparsekd: part-0 is damaged\\n") == verdicts.NAMED
assert failed("sparsekd: part-0 is damaged\\nbelow\\n") == verdicts.UNCLEAR
assert failed("sparsekd: something is damaged\\n") == verdicts.UNCLEAR
assert failed("sparsekd: part-0 " + "x" * 5000) == verdicts.UNCLEAR
assert failed("sparsekd: part-0 is damaged\\n", code=1) == verdicts.UNCLEAR
assert children.each(["dies", "hangs", "answers"], lambda job: {
    "dies": lambda: __import__("os").abort(), "hangs": lambda: __import__("time").sleep(60), "answers": lambda: 7
}[job](), timeout_s=1, batch=3) == [{"dead": "signal 6"}, {"stuck": 1}, 7]
assert children.each([0], lambda _: children.watched(lambda: bytearray(10**9) and None).crash[:11], timeout_s=9,
    room_bytes=10**8) == ["MemoryError"]
"""
