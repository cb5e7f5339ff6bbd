"""The script for a GPU, rehearsed on the host: every figure comes, and each is a line of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_for_a_gpu_gives_every_figure(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert not [row["failed"] for row in rows if "failed" in row]
    assert {row["figure"] for row in rows} == {"machine", "gradients", "training", "structural", "passes", "agreement"}
    (gradients,) = (row for row in rows if row["figure"] == "gradients")
    assert max(gradients["hidden"], gradients["weight"]) < 0.004  # one rounding to bfloat16
    loops = {row["loop"]: row["losses"] for row in rows if row["figure"] == "training" and "losses" in row}
    assert len(loops) == 3
