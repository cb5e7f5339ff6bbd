"""The cache writer killed at counted write calls, and called again: the crash benchmark, a few kills of it."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "crash.py"


def test_killed_at_write_calls_and_called_again_gives_the_same_bytes() -> None:
    command = [sys.executable, str(SCRIPT), "--until", "cache", "--kills", "8", "--random", "0", "--no-record"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the same bytes") == 8
    assert "'not_the_same': []" in done.stdout
    assert int(done.stdout.split("'write_calls': ")[1].split(",")[0]) > 50  # a shard is several calls, there are 14
