"""A process of several that is killed while they train: all end, one line says so, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

LINE = "sparsekd: another process of this run has ended or hangs: run the same command again to go on from"
MODEL = "round-01/distilled/model/model.safetensors"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(recipe: Path, out: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = ["distill.epochs=8", "distill.checkpoint_minutes=0", "distill.validations=4"]
    options = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, *launcher, "-m", "sparsekd", "distill", str(recipe), "--out", str(out), *options]


def kill(launcher: subprocess.Popen[str], rank: int) -> None:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for process in children:
        if f"RANK={rank}" in Path(f"/proc/{process}/environ").read_text().split("\0"):
            os.kill(int(process), signal.SIGKILL)
            return
    raise AssertionError(f"no process of rank {rank}")


def test_a_killed_process_ends_all_and_the_run_goes_on(tiny_recipe: Path, tmp_path: Path) -> None:
    straight = subprocess.run(command(tiny_recipe, tmp_path / "whole"), env=ENVIRONMENT, check=False)
    assert straight.returncode == 0
    whole = load_file(tmp_path / "whole" / MODEL)
    for rank in (0, 1):
        goes_on(rank, command(tiny_recipe, tmp_path / f"run-{rank}"), tmp_path / f"run-{rank}")
        found = load_file(tmp_path / f"run-{rank}" / MODEL)
        assert all(found[name].equal(value) for name, value in whole.items())


def goes_on(rank: int, run: list[str], folder: Path) -> None:
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as launcher:
        while not list((folder / "round-01/distilled/checkpoints").glob("step-0000000[5-9]")):
            assert launcher.poll() is None
            time.sleep(0.02)
        kill(launcher, rank)
        start = time.monotonic()
        assert launcher.stderr is not None
        said = launcher.stderr.read()
        assert launcher.wait(60) != 0
        assert time.monotonic() - start < 10
    assert said.count(LINE) == said.count("sparsekd: ") == 1
    assert "[rank" not in said  # no traceback but the launcher's own
    resumed = subprocess.run([*run, "--resume"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "validation after step 0" not in resumed.stderr  # it did not begin anew
