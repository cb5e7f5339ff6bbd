"""Every stage with less memory than it wants: it gets by with a smaller batch, or ends with exit code 4 and one line.

Batches are wide, so that what does not fit is theirs. A stage is made again in a copy of a finished run, in a process
whose address space may grow by so many MB from where it was after a first such run: loading libraries and starting
threads under a limit ends in their own aborts, which no program of Python can catch.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import children
import verdicts

LEVELS_MB = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
# what is removed, and so made again; the folders of later stages stay, for equal inputs make equal outputs
STAGES = {
    "corpus": "corpus",
    "cache": "round-01/cache",
    "compress": "round-01/compressed",
    "distill": "round-01/distilled",
    "evaluate": "round-01/eval",
    "report": "report.json",
}
_WIDE = {
    "corpus.seq_len": 512,
    "corpus.num_blocks": 40,
    "cache.batch_size": 32,
    "compress.batch_size": 32,
    "compress.num_tokens": 8192,
    "distill.batch_size": 32,
    "distill.micro_batch_size": 32,
    "distill.epochs": 1,
    "evaluate.context": 512,
    "evaluate.stride": 64,
    "evaluate.max_tokens": 3000,
    "evaluate.batch_size": 32,
}
_NARROW = {"cache.batch_size": 1, "distill.micro_batch_size": 1, "evaluate.batch_size": 1}  # results are the same


def attack(base: Path, levels: Sequence[int], workers: int) -> list[dict[str, Any]]:
    """For each stage and level its verdict with the reason."""
    return attack_named(base, [f"{stage} {level}" for stage in STAGES for level in levels], workers)


def attack_named(base: Path, jobs: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """The same for jobs by stage and level: `distill 16`."""
    made = children.each([base / "wide"], lambda out: _run(base, out, _WIDE).code, timeout_s=120)
    assert made == [0], made
    return children.spread(jobs, functools.partial(_attack, base), workers)


def _attack(base: Path, worker: int, jobs: Sequence[str]) -> list[dict[str, Any]]:
    judge = functools.partial(_judge, base, base / f"memory-{worker}")
    answers = children.each(jobs, judge, timeout_s=90)
    results = []
    for job, answer in zip(jobs, answers, strict=True):
        if isinstance(answer, dict):
            answer = [verdicts.SLOW if children.STUCK in answer else verdicts.TRACEBACK, str(answer)]
        results.append({"input": f"memory {job}", "verdict": answer[0], "reason": answer[1]})
    return results


def _judge(base: Path, run: Path, job: str) -> tuple[str, str]:
    stage, level = job.split(" ")
    _without_stage(base, run, stage)
    _run(base, run, _WIDE | _NARROW)
    _without_stage(base, run, stage)
    with children.limited(int(level) << 20):
        call = _run(base, run, _WIDE)
    if call.crash or call.code != 0:
        verdict, reason = verdicts.of_failure(call, [])
        wrong_code = verdict == verdicts.NAMED and call.code != 4
        return (verdicts.UNCLEAR, f"exit code {call.code}: {reason}") if wrong_code else (verdict, reason)
    return _same_results(run, base / "wide")


def _run(base: Path, out: Path, settings: dict[str, Any]) -> children.Call:
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return children.call("run", str(base / "recipe.yaml"), "--out", str(out), *sets)


def _without_stage(base: Path, run: Path, stage: str) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base / "wide", run)
    path = run / STAGES[stage]
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _same_results(run: Path, whole: Path) -> tuple[str, str]:
    """Smaller batches change the rounding only."""
    one, other = (_perplexities(folder) for folder in (run, whole))
    if all(math.isclose(one[name], other[name], rel_tol=1e-3) for name in other):
        return verdicts.HARMLESS, ""
    return verdicts.SILENT, f"perplexities {one} instead of {other}"


def _perplexities(run: Path) -> dict[str, float]:
    models = json.loads((run / "report.json").read_text())["evaluation"]["models"]
    return {f"{model} {text}": found["perplexity"] for model, texts in models.items() for text, found in texts.items()}
