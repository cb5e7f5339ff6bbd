"""Attacks finished runs of a tiny model and the inputs of the program, and counts what gets through.

    python benchmarks/faults.py                  half an hour: `make fuzz`
    python benchmarks/faults.py --quick          a sample of it: `make test`
    python benchmarks/faults.py --replay 'flip run round-01/eval/stage.json 12 8'
    python benchmarks/faults.py --replay 'model 0 19'

`tests/faults/` says what is done: damage.py to the files of a run, inputs.py to recipes, arguments, models and texts,
memory.py to the address space; verdicts.py says what may come of it. Recorded are the counts of each verdict and what
got through, as words for --replay. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no fault asks the network
os.environ["OMP_NUM_THREADS"] = "1"  # what was forked has no other threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

import children
import damage
import inputs
import memory
import subject
import verdicts
from _record import record

# imported before anything is forked: what a child imports, it imports for itself alone
from sparsekd.evaluate import harness  # noqa: F401
from sparsekd.run import inspection  # noqa: F401

FAULTS = {"flip": 1000, "cut": 200, "zero": 100, "swap": 100, "delete": 1000}
INPUTS = {
    "recipe-text": 5000,
    "recipe-values": 4500,
    "whole-run": 500,
    "arguments": 4000,
    "model": 3000,
    "text": 3000,
}
QUICK_FAULTS = {"flip": 7, "cut": 2, "zero": 2, "swap": 2, "delete": 2}
QUICK_INPUTS = {
    "recipe-text": 30,
    "recipe-values": 30,
    "whole-run": 2,
    "arguments": 30,
    "model": 20,
    "text": 20,
}
QUICK_LEVELS_MB = (8,)
_SHOWN = 200  # of what got through, in the record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=["damage", "inputs", "memory"])
    parser.add_argument("--scale", type=float, default=1.0, help="times the counts")
    parser.add_argument("--replay", metavar="WORDS")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        made = children.each([str(base)], _make, timeout_s=300)[0]
        if made != "made":
            sys.exit(f"the runs to attack cannot be made: {made}")
        if options.replay:
            print(json.dumps(replay(base, options.replay), indent=1))
            return
        start = time.monotonic()
        results = attack(base, options)
    figures = {"seed": options.seed, "seconds": round(time.monotonic() - start), **summary(results)}
    if options.no_record:
        print(json.dumps(figures, indent=1))
    else:
        record("faults", figures)
    sys.exit(bool(figures["got_through"]))


def _make(folder: str) -> str:
    call = children.watched(lambda: subject.make(Path(folder)))
    return call.crash or "made"


def attack(base: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All outcomes, by the part of the program that made them."""
    of_damage, of_inputs, levels = FAULTS, INPUTS, memory.LEVELS_MB
    if options.quick:
        of_damage, of_inputs, levels = QUICK_FAULTS, QUICK_INPUTS, QUICK_LEVELS_MB
    scaled = [{kind: round(count * options.scale) for kind, count in some.items()} for some in (of_damage, of_inputs)]
    results = {}
    if options.only in (None, "damage"):
        faults = damage.plan(base, scaled[0], options.seed)
        results["damage"] = damage.attack(base, faults, options.workers)
    if options.only in (None, "inputs"):
        results["inputs"] = inputs.attack(base, scaled[1], options.seed, options.workers)
    if options.only in (None, "memory"):
        results["memory"] = memory.attack(base, levels, options.workers)
    return results


def replay(base: Path, words: str) -> Any:
    kind = words.split(" ")[0]
    if kind in inputs.KINDS:
        kept = Path(tempfile.mkdtemp(prefix="faults-"))
        call = inputs.arguments(base, kept / "input", words)
        return {"kept": str(kept), "arguments": call, **inputs.attack_named(base, [words], 1)[0]}
    if kind == "memory":
        return memory.attack_named(base, [words.removeprefix("memory ")], 1)[0]
    return damage.attack(base, [words], 1)[0]


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The counts of each verdict by kind, and what got through."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    bad = []
    for outcome in [outcome for outcomes in results.values() for outcome in outcomes]:
        words = outcome.get("fault") or outcome["input"]
        counts[words.split(" ")[0]][outcome["verdict"]] += 1
        if outcome["verdict"] in verdicts.BAD:
            bad.append(outcome)
    figures: dict[str, Any] = {"counts": {kind: dict(found) for kind, found in counts.items()}}
    if "damage" in results:
        figures |= {
            "untouched_results_by_file": _by_file(results["damage"], verdicts.HARMLESS),
            "damage_that_inspect_verify_passed": [one["fault"] for one in results["damage"] if _was_missed(one)],
        }
    return figures | {"got_through": len(bad), "what_got_through": [_short(outcome) for outcome in bad[:_SHOWN]]}


def _by_file(outcomes: list[dict[str, Any]], verdict: str) -> dict[str, int]:
    found = collections.Counter(one["fault"].split(" ")[2] for one in outcomes if one["verdict"] == verdict)
    return dict(found.most_common())


def _was_missed(outcome: dict[str, Any]) -> bool:
    """Whether `inspect --verify` found a run whole that another command found damaged."""
    verified = outcome["commands"].get("inspect --verify", [None])[0]
    return verified == verdicts.HARMLESS and outcome["verdict"] not in (verdicts.HARMLESS, verdicts.REMADE)


def _short(outcome: dict[str, Any]) -> dict[str, str]:
    """What got through as one line each: what to replay, the verdict, and the reason of the command it is of."""
    reasons = [f"{name}: {reason}" for name, (verdict, reason) in _commands(outcome).items() if verdict in verdicts.BAD]
    reason = outcome.get("reason") or "; ".join(reasons)
    return {"replay": outcome.get("fault") or outcome["input"], "verdict": outcome["verdict"], "reason": reason[:500]}


def _commands(outcome: dict[str, Any]) -> dict[str, Any]:
    return outcome.get("commands", {})


if __name__ == "__main__":
    main()
