"""Faults in the files of a run, and what the program makes of each.

A fault is a line of words that says all of it, so that it can be given again: `flip run round-01/eval/stage.json 12 8`.
After each fault the commands below are called on a copy of the run. What they answer is compared with what they
answer on an untouched copy at the same place: what `inspect` and `report` print; of both saved models the weights,
the logits for a few tokens, config, generation config, and tokenizer with what it makes of a text; and after
`run --resume` the report and both models again. Times and memory may differ only where a stage was made again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import children
import torch
import verdicts
from children import Call
from subject import MODELS, files_of

import sparsekd
from sparsekd import models

PAGE = 4096
KINDS = ("flip", "cut", "zero", "swap", "delete")
_MEASURED = {
    "seconds",
    "prefill",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
}  # not the same when a stage is made again
_TEXT = "river <e> garden\n\n  mo12.5 \u00e9"


# ---- faults


def plan(base: Path, counts: dict[str, int], seed: int) -> list[str]:
    """`counts` of each kind of fault, spread evenly over the files, in the finished and in the stopped run; `delete`
    takes each file once."""
    generator = random.Random(seed)
    targets = [("run", name) for name in files_of(base / "run")]
    targets += [("stopped", name) for name in files_of(base / "stopped", "round-01/distilled")]
    faults: list[str] = []
    for kind in KINDS:
        number = min(counts[kind], len(targets)) if kind == "delete" else counts[kind]
        order: list[tuple[str, str]] = []
        while len(order) < number:
            order += generator.sample(targets, len(targets))
        faults += [_fault(base, kind, run, name, generator) for run, name in order[:number]]
    return faults


def _fault(base: Path, kind: str, run: str, name: str, generator: random.Random) -> str:
    size = (base / run / name).stat().st_size
    words: list[Any] = [kind, run, name]
    if kind == "flip":
        words += [_position(size, generator), 1 << generator.randrange(8)]
    elif kind == "cut":
        words += [generator.choice([0, 1, 8, size // 2, size - 1, generator.randrange(size)])]
    elif kind == "zero":
        words += [PAGE * generator.randrange(-(-size // PAGE))]
    elif kind == "swap":
        words += [_partner(base, run, name, generator)]
    return " ".join(map(str, words))


def _position(size: int, generator: random.Random) -> int:
    """Anywhere, more often in the head or the tail of a file, which are read first."""
    edge = min(size, 64)
    return generator.choice(
        [generator.randrange(size), generator.randrange(edge), size - 1 - generator.randrange(edge)]
    )


def _partner(base: Path, run: str, name: str, generator: random.Random) -> str:
    """The same file of the run with another seed, or another file of this run; one with other bytes."""
    content = (base / run / name).read_bytes()
    foreign = base / "another" / name
    if generator.random() < 0.5 and foreign.exists() and foreign.read_bytes() != content:
        return f"another/{name}"
    others = [other for other in files_of(base / run) if (base / run / other).read_bytes() != content]
    alike = [other for other in others if Path(other).suffix == Path(name).suffix]
    return f"{run}/{generator.choice(alike or others)}"


def apply(fault: str, run: Path, base: Path) -> list[str]:
    """Does to the copy `run` what the fault says; returns the files that are no longer what they were."""
    kind, of, name, *rest = fault.split(" ")
    path = run / name
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[int(rest[0])] ^= int(rest[1])
    elif kind == "cut":
        del content[int(rest[0]) :]
    elif kind == "zero":
        page = slice(int(rest[0]), min(int(rest[0]) + PAGE, len(content)))
        content[page] = bytes(page.stop - page.start)
    elif kind == "swap":
        source, _, other = rest[0].partition("/")
        if source == of:
            (run / other).write_bytes(content)
        path.write_bytes((base / source / other).read_bytes())
        return [name, other] if source == of else [name]
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(content)
    return [name]


# ---- what the program makes of them


def attack(base: Path, faults: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """For each fault its verdict, and that of each command with the reason."""
    return children.spread(faults, functools.partial(_attack, base), workers)


def _attack(base: Path, worker: int, faults: Sequence[str]) -> list[dict[str, Any]]:
    """One process's faults: its runs lie in a place of their own, for their messages name it."""
    place = base / f"worker-{worker}"
    place.mkdir()
    untouched = {of: children.each([of], lambda of: _untouched(base, place, of), timeout_s=60)[0] for of in COMMANDS}
    results = []
    for fault in faults:
        result = children.each([fault], lambda fault: _judge(base, place, fault, untouched), timeout_s=60)[0]
        if children.STUCK in result:
            result = {"fault": fault, "verdict": verdicts.SLOW, "commands": {"?": [verdicts.SLOW, "60 s, killed"]}}
        elif children.DEAD in result:
            result = {
                "fault": fault,
                "verdict": verdicts.TRACEBACK,
                "commands": {"?": [verdicts.TRACEBACK, str(result)]},
            }
        results.append(result)
    return results


def _untouched(base: Path, place: Path, of: str) -> dict[str, Any]:
    run = _copy(base / of, place / "run")
    answers = {name: answer(run, base) for name, answer in COMMANDS[of].items()}
    assert all(answer.code == 0 and not answer.crash for answer in answers.values()), answers
    return {name: answer.out for name, answer in answers.items()}


def _judge(base: Path, place: Path, fault: str, untouched: dict[str, dict[str, str]]) -> dict[str, Any]:
    of = fault.split(" ")[1]
    run = _copy(base / of, place / "run")
    touched = apply(fault, run, base)
    commands = {}
    for name, answer in COMMANDS[of].items():
        before = _stages(run)
        found = answer(run, base)
        if found.seconds > verdicts.LONGEST_S:
            found = answer(_again(fault, run, base), base)
        was_remade = of == "stopped" or _stages(run) != before
        commands[name] = _verdict(found, untouched[of][name], _places(run, touched), was_remade)
    verdict = verdicts.worst([verdict for verdict, _ in commands.values()])
    return {"fault": fault, "verdict": verdict, "commands": commands}


def _again(fault: str, run: Path, base: Path) -> Path:
    apply(fault, _copy(base / fault.split(" ")[1], run), base)
    return run


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def _stages(run: Path) -> dict[str, int]:
    """When each stage was finished."""
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("stage.json")}


def _places(run: Path, touched: list[str]) -> list[str]:
    """What a message may say to name one of these files: the file, its model or its stage."""
    folders = {parent for name in touched for parent in Path(name).parents if parent != Path()}
    whole = {str(run / folder) for folder in folders} | {str(folder) for folder in folders if len(folder.parts) > 1}
    return [Path(name).name for name in touched] + sorted(whole)


def _verdict(found: Call, expected: str, places: list[str], was_remade: bool) -> tuple[str, str]:
    costly = verdicts.of_cost(found)
    if found.crash or found.code != 0:
        failed = verdicts.of_failure(found, places)
        return failed if costly is None or failed[0] == verdicts.TRACEBACK else costly
    if costly is not None:
        return costly
    if found.out == expected:
        return verdicts.HARMLESS, ""
    one, other = json.loads(found.out), json.loads(expected)
    changed = [name for name, state in other.items() if one.get(name) != state]
    told = [name for name in changed if other[name] == "finished" or str(one.get(name)).startswith("damaged: ")]
    if told:  # what `inspect` is there to say
        return verdicts.NAMED, ", ".join(f"{name}: {one.get(name)}" for name in told)
    if was_remade and _without(one, _MEASURED) == _without(other, _MEASURED):
        return verdicts.REMADE, ""
    return verdicts.SILENT, _first_difference(one, other)


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


def _first_difference(one: Any, other: Any, name: str = "") -> str:
    """Where two answers differ first, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*(key for key in one if key not in other), *other]):
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    return f"{name}: {str(one)[:80]} instead of {str(other)[:80]}"


# ---- the commands, each on a run; what they print is JSON


def _inspect(run: Path, base: Path) -> Call:
    return children.call("inspect", str(run), "--json")


def _inspect_verify(run: Path, base: Path) -> Call:
    return children.call("inspect", "--verify", str(run), "--json")


def _report(run: Path, base: Path) -> Call:
    return children.call("report", str(run), "--json")


def _resume(run: Path, base: Path) -> Call:
    """Goes on with the run; its answer is what the report holds then, and both models."""
    call = children.call("run", str(base / "recipe.yaml"), "--out", str(run), "--resume", "--json")
    if call.code == 0 and not call.crash:
        report = json.loads((run / "report.json").read_text())
        assert json.loads(call.out) == report
        opened = _load(run, base)
        models = {"models": opened.crash or opened.err} if opened.code else json.loads(opened.out)
        call.out = json.dumps({"report": report} | models)
    return call


def _load(run: Path, base: Path) -> Call:
    """Opens both models with `sparsekd.load`, as a user's own program does."""

    def load() -> str:
        try:
            return json.dumps(_loaded(run))
        except sparsekd.SparseKDError as error:
            raise _Refused(error) from error

    return _refused_as_printed(load)


class _Refused(Exception):
    pass


def _refused_as_printed(work: Callable[[], str]) -> Call:
    """An error for the user that the API raised, as the command line would print it."""
    refused: list[sparsekd.SparseKDError] = []

    def caught() -> str:
        try:
            return work()
        except _Refused as error:
            refused.append(error.args[0])
            return ""

    call = children.watched(caught)
    if refused:
        return dataclasses.replace(call, code=refused[0].exit_code, err=f"sparsekd: {refused[0]}\n")
    return call


def _loaded(run: Path) -> dict[str, Any]:
    return {folder: _content(*sparsekd.load(str(run / folder))) for folder in MODELS}


def _content(model: Any, tokenizer: Any) -> dict[str, str]:
    """What a loaded model is, each part as short as a hash."""
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = model(ids).logits
    parts = {
        "logits": logits.numpy().tobytes(),
        "weights": models.weights_hash(model).encode(),
        "config": model.config.to_json_string(use_diff=False).encode(),
        "generation": model.generation_config.to_json_string(use_diff=False).encode(),
        "tokenizer": tokenizer.backend_tokenizer.to_str().encode(),
        "special tokens": repr((tokenizer.special_tokens_map, tokenizer.all_special_ids)).encode(),
        "settings": repr((tokenizer.chat_template, tokenizer.padding_side, tokenizer.model_max_length)).encode(),
        "ids": repr((tokenizer(_TEXT)["input_ids"], tokenizer.decode(tokenizer(_TEXT)["input_ids"]))).encode(),
    }
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}


COMMANDS: dict[str, dict[str, Callable[[Path, Path], Call]]] = {
    "run": {
        "inspect": _inspect,
        "inspect --verify": _inspect_verify,
        "load": _load,
        "report": _report,
        "run --resume": _resume,
    },
    "stopped": {"inspect": _inspect, "inspect --verify": _inspect_verify, "run --resume": _resume},
}
