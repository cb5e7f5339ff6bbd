"""Training in two processes of one thread each (DDP over gloo) against one process of two threads: tokens a second.

    python benchmarks/processes_speed.py [--bfloat16]

Both train the same compressed model on the same blocks (those of `training_speed.py`, by neurons), four blocks a step,
in turns. Bar: 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _record import record, summary
from training_speed import BATCH, ROUNDS, STEPS, our_steps, prepare

import sparsekd
from sparsekd.device import rank_and_count
from sparsekd.teacher import Cache

THREADS = {1: 2, 2: 1}  # by processes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", metavar="FOLDER", help="one turn; used by the script itself")
    parser.add_argument("--bfloat16", action="store_true")
    given = parser.parse_args()
    if given.child:
        turn(Path(given.child), given.bfloat16)
        return
    speeds: dict[int, list[float]] = {count: [] for count in THREADS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), "neurons")
        for _ in range(ROUNDS):
            for count, threads in THREADS.items():
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
                command = [sys.executable, *(launcher if count > 1 else []), __file__, "--child", folder]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                flags = ["--bfloat16"] if given.bfloat16 else []
                subprocess.run([*command, *flags], check=True, env=environment)
                speeds[count].append(json.loads((Path(folder) / "found.json").read_text())["tokens_per_second"])
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    figures = {f"{count} processes, tokens per second": summary(found) for count, found in speeds.items()}
    figures |= {"ratio": summary(ratios), "tokens": STEPS * BATCH * 256, "bfloat16": given.bfloat16}
    record("processes_speed", figures)


def turn(folder: Path, bfloat16: bool) -> None:
    blocks = np.load(folder / "blocks.npy").astype(np.int64)
    model, _ = sparsekd.load(str(folder / "model"))
    found = our_steps(model, blocks, Cache(folder / "cache"), 2, bfloat16)
    rank, count = rank_and_count()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    if count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
