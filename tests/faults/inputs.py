"""Inputs of all kinds that are hostile, damaged or absurd, each made from its kind and number alone.

A kind writes what it needs into a folder and gives the arguments of the call. What may come of it: it is still valid
(exit code 0, or 5 for a model that got worse), the argument parser's page, or exit code 2, 3 or 4 with one line.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import random
import shutil
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import children
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import verdicts
import yaml
from subject import documents, recipe_for

from sparsekd import cli
from sparsekd.recipe import Recipe

ROOM_BYTES = 3 * 10**9  # of address space: three times what is allowed, so that a bomb ends in this process
_LONGEST_RUN_S = 60.0  # what is asked of a whole run may be much
_BATCH = 40
Maker = Callable[[Path, Path, random.Random], list[str]]  # base, own folder, chance -> arguments


def attack(base: Path, counts: dict[str, int], seed: int, workers: int) -> list[dict[str, Any]]:
    """For each input its verdict with the reason."""
    named = [f"{kind} {seed} {number}" for kind, count in counts.items() for number in range(count)]
    random.Random(seed).shuffle(named)  # all workers have some of each kind
    return attack_named(base, named, workers)


def attack_named(base: Path, named: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """The same for inputs by their kind, seed and number: `recipe-text 0 12`."""
    return children.spread(named, functools.partial(_attack, base), workers)


def _attack(base: Path, worker: int, named: Sequence[str]) -> list[dict[str, Any]]:
    place = base / f"inputs-{worker}"
    place.mkdir(exist_ok=True)
    found = {}
    for longest_s, some in ((_LONGEST_RUN_S, True), (verdicts.LONGEST_S, False)):
        these = [name for name in named if name.startswith("whole-run") == some]
        judge = functools.partial(_judge, base, place, longest_s)
        timeout_s = 2.5 * longest_s  # of silence: a job that took too long is tried again
        answers = children.each(these, judge, timeout_s=timeout_s, batch=_BATCH, room_bytes=ROOM_BYTES)
        found |= dict(zip(these, answers, strict=True))
    return [_of_answer(name, found[name]) for name in named]


def _judge(base: Path, place: Path, longest_s: float, name: str) -> list[str]:
    call = _call(base, place, name)
    if call.seconds > longest_s:
        call = _call(base, place, name)
    costly = verdicts.of_cost(call, longest_s)
    if call.crash or call.code not in (0, 5):
        failed = verdicts.of_failure(call, [])
        return list(failed if costly is None or failed[0] == verdicts.TRACEBACK else costly)
    return list(costly or (verdicts.ACCEPTED, ""))


def _call(base: Path, place: Path, name: str) -> children.Call:
    words = arguments(base, place, name)
    here = place / "here" / "below"  # `../x` stays inside
    here.mkdir(parents=True)
    os.chdir(here)
    return children.call(*words)


def _of_answer(name: str, answer: Any) -> dict[str, Any]:
    if isinstance(answer, dict):
        verdict = verdicts.SLOW if children.STUCK in answer else verdicts.TRACEBACK
        return {"input": name, "verdict": verdict, "reason": str(answer)}
    return {"input": name, "verdict": answer[0], "reason": answer[1]}


def arguments(base: Path, place: Path, name: str) -> list[str]:
    """Writes the files of this input into the emptied `place` and returns the arguments of its call."""
    kind, seed, number = name.split(" ")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return KINDS[kind](base, place, random.Random(f"{kind} {seed} {number}"))


# ---- recipes

_YAML = [
    "&a [*a, *a]",
    "!!python/object:os.system x",
    "!!binary x",
    "1:30:00",
    "0x1f",
    ".nan",
    "-.inf",
    "1e400",
    "2001-99-99",
    "<<: *x",
    "? [a]",
    "\t",
    "\x00",
    "\x85",
    "\u2028",
    "\ud7ff",
    "%YAML 9.9",
    "--- ",
    "'",
    '"',
    "{",
    "[",
    "|",
    "*x",
    "9" * 400,
    "null",
    "preset: demo",
    "preset: [demo]",
    "a: &b [*b]",
]
_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    0.5,
    1e-9,
    1e308,
    float("inf"),
    float("nan"),
    2**31,
    2**63,
    10**30,
    "",
    " ",
    "auto",
    "x" * 5000,
    "a\nb",
    "\u202e\u0007",
    "../../x",
    "/etc/passwd",
    "~/x",
    "owner/name",
    "a/b/c",
    ".",
    "1:30",
    "1_000",
    "0x10",
    "nan",
    [],
    [1],
    [None],
    [[]],
    ["a", "b"],
    {},
    {"a": 1},
    {"a": {"b": {"c": []}}},
    {None: None},
    {1: 2},
]


def _recipe_text(base: Path, place: Path, chance: random.Random) -> list[str]:
    """A valid recipe with pieces of its text cut, doubled, or replaced by what YAML is known to trip over."""
    text = yaml.safe_dump(recipe_for(base))
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.choice([0, 0, 1, 3, 30]))
        piece = chance.choice([*_YAML, text[start:end] * 2, "", chr(chance.randrange(1, 0xD7FF))])
        text = text[:start] + piece + text[end:]
    if chance.random() < 0.02:
        text = (
            _BOMB + chance.choice(["preset: *a11\n", "model: *a11\n", "model: {name: *a11}\n", "seed: *a11\n"]) + text
        )
    content = text.encode()
    if chance.random() < 0.05:
        content = content[: chance.randrange(len(content))] + bytes(chance.randrange(256) for _ in range(9))
    (place / "recipe.yaml").write_bytes(content)
    return ["run", str(place / "recipe.yaml"), "--dry-run"]


def _recipe_values(base: Path, place: Path, chance: random.Random) -> list[str]:
    """A valid recipe with one to three values that no one would write."""
    values = recipe_for(base)
    for _ in range(chance.randint(1, 3)):
        *parents, key = chance.choice(_KEYS)
        section: Any = values
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[key] = copy.deepcopy(chance.choice(VALUES))
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return ["run", str(place / "recipe.yaml"), "--dry-run"]


def _keys(kind: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All keys of a recipe, and those of a source and of a text."""
    for name, hint in typing.get_type_hints(kind).items():
        yield (*above, name)
        inner = {"sources": "text", "texts": "other"}.get(name)
        if inner is not None:
            yield from _keys(typing.get_args(hint)[1], (*above, name, inner))
        elif dataclasses.is_dataclass(hint):
            yield from _keys(hint, (*above, name))


_KEYS = list(_keys(Recipe))
# values that are allowed, so that a whole run meets them
_CHOICES: dict[str, list[Any]] = {
    "seed": [0, -1, 2**52],
    "rounds": [[0.2, 0.5], [0.95]],
    "split_corpus": [True],
    "corpus.seq_len": [8, 9, 64, 300],
    "corpus.num_blocks": [1, 2, 200],
    "corpus.num_validation_blocks": [1, 50],
    "corpus.pack": [False],
    "corpus.document_mask": [True],
    "corpus.overlap": ["drop"],
    "corpus.sources.text.split": ["x", "(", "", r"(?<=\n)\n+", "."],
    "corpus.sources.text.holdout": [0.0, 0.01, 0.99],
    "corpus.sources.text.weight": [1e-300, 1e300],
    "teacher.cascade": [1],
    "teacher.recache": [True],
    "teacher.anchor": [0.5],
    "cache.codec": ["q16", "q8", "sampled"],
    "cache.top_k": [1, 256, None],
    "cache.blocks_per_shard": [1, 10**9],
    "cache.batch_size": [1, 10**9],
    "compress.reduction": [1e-9, 0.95, 0.5],
    "compress.method": ["whitened", "svd", "two-sided", "wanda", "taylor", "activation"],
    "compress.allocation": ["uniform", "energy", "global"],
    "compress.format": ["pivot", "lowrank", "mask"],
    "compress.num_tokens": [1, 10**9],
    "compress.batch_size": [1, 10**9],
    "compress.probe_tokens": [1, 64, 10**9],
    "compress.rank_floor": [0, 1],
    "compress.rank_cap": [1e-9, 0.5],
    "compress.rank_multiple": [8, 10**9],
    "distill.teacher": ["online"],
    "distill.loss": ["bucket", "paper", "exact_t", "sampled", "renorm_full"],
    "distill.start": ["fresh"],
    "distill.train": ["all", "compressed", "lora"],
    "distill.lora_rank": [1, 10**6],
    "distill.stop": ["converged"],
    "distill.learning_rate": [1, 1e-300],
    "distill.alpha": [0, 1],
    "distill.temperature": [0.1, 100, 1],
    "distill.batch_size": [2, 10**6],
    "distill.precision": ["float32", "bfloat16"],
    "distill.warmup_ratio": [0, 1],
    "distill.schedule": ["linear"],
    "distill.weight_decay": [1],
    "distill.max_grad_norm": [1e-300, float("inf")],
    "distill.validations": [1, 10**9],
    "distill.checkpoint_minutes": [0, 1e300],
    "distill.lr_scale.embeddings": [0, 100],
    "evaluate.texts": [{}],
    "evaluate.context": [2, 33, 10**6],
    "evaluate.stride": [1, 2],
    "evaluate.max_tokens": [2, None],
    "evaluate.batch_size": [1, 10**9],
    "evaluate.agreement": [False],
    "evaluate.prompts": [[], ["a"], ["\u202e\u0007", "x" * 5000]],
    "model.dtype": ["bfloat16", "float16"],
}


def _whole_runs(base: Path, place: Path, chance: random.Random) -> list[str]:
    """A whole run with values from the edges of what is allowed."""
    settings = {name: chance.choice(_CHOICES[name]) for name in chance.sample(list(_CHOICES), chance.randint(1, 3))}
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["run", str(base / "recipe.yaml"), "--out", str(place / "out"), *flags, "--json"]


# ---- arguments

_VERBS = ["run", "corpus", "cache", "compress", "distill", "reproduce", "eval", "spectrum", "report", "inspect"]
_WORDS = [
    "",
    " ",
    "-",
    "--",
    "0",
    "-1",
    "1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "9" * 30,
    "a=b",
    "=",
    "a.b.c=1",
    "seed=1:30",
    "compress.reduction=0.2",
    "cache=1",
    "model.name=[]",
    "corpus.sources.text=null",
    "seed={a: [}",
    "seed=" + "[" * 5000,
    "1/2",
    "0/0",
    "1/",
    "2/1",
    "II",
    "controls",
    "svd",
    "cpu",
    "cuda",
    "cuda:99",
    "mps",
    "float16",
    "x" * 300,
    "../x",
    "owner/name",
    "./x",
    "a/b/c",
    "\u202e",
    "a\nb",
    "/dev/null",
    "/etc/passwd",
    "nowhere.gguf",
    "nowhere.yaml",
    "local_x",
]


def _arguments(base: Path, place: Path, chance: random.Random) -> list[str]:
    """A verb with options and values that may or may not go together; nothing above a plan is worked out."""
    shutil.copytree(base / "run", place / "run")  # it may be told to remove it
    inside = ("run", "run/corpus", "run/round-01/cache", "run/round-01/distilled/model")
    known = [str(place / name) for name in inside] + [str(base / name) for name in ("recipe.yaml", "model", "text.txt")]
    verb = chance.choice(_VERBS)
    is_planned = verb in ("run", "corpus", "cache", "compress", "distill", "reproduce") and chance.random() < 0.8
    is_planned = is_planned or verb == "reproduce"  # whose experiments are minutes of work
    if not is_planned and verb not in (
        "eval",
        "report",
        "inspect",
    ):  # of a model alone they do the demo's minutes of work
        known = [word for word in known if "model" not in word]
    words = [chance.choice([*known, *_WORDS])] if chance.random() < 0.95 else []
    if verb == "reproduce":
        words.insert(0, chance.choice(["II", "III", "controls", "svd", *_WORDS]))
    for option in chance.choices(_options(verb), k=chance.randint(0, 3)):
        name = option.opts[0]
        words += [name] if option.is_flag else [name, _value(name, known, chance)]
    if chance.random() < 0.1:
        words.append(chance.choice(["--nonsense", "--", "-v", "--help", *_WORDS]))
    if is_planned:
        words.insert(0, "--dry-run")
    out = [] if verb in ("eval", "report", "inspect") else ["--out", str(place / "out")]
    return [verb, *out, *words]


def _options(verb: str) -> list[Any]:
    command: Any = typer.main.get_command(cli.app)
    return [one for one in command.commands[verb].params if one.param_type_name == "option"]


def _value(option: str, known: list[str], chance: random.Random) -> str:
    """Mostly of the option's type, so that the parser lets it through."""
    if option in ("--limit", "--context", "--stride", "--max-tokens"):
        return chance.choice(["1", "2", "64", "1000000", "-1", "9" * 30])
    if option == "--reduction":
        return chance.choice(["0.2", "0.95", "1e-9", "nan", "-inf"])
    return chance.choice([*known, *_WORDS])


# ---- models


def _model(base: Path, place: Path, chance: random.Random) -> list[str]:
    """A dense or compressed model with a file changed; without hashes beside it, for those of others have none."""
    source = chance.choice(["model", "run/round-01/distilled/model"])
    folder = place / "model"
    shutil.copytree(base / source, folder)
    (folder / "sparsekd.json").unlink(missing_ok=True)
    name = chance.choice(["config.json"] * 3 + sorted(path.name for path in folder.iterdir()))
    _spoil(folder / name, chance)
    verb = ["eval", str(folder), "--text", str(base / "other.txt"), "--max-tokens", "64"]
    windows = ["--context", "32", "--stride", "16"]
    return [*verb, *windows] if chance.random() < 0.7 else ["inspect", str(folder)]


def _spoil(path: Path, chance: random.Random) -> None:
    """Changes a value somewhere in a JSON file, or a few bytes of any."""
    if path.suffix == ".json" and chance.random() < 0.8:
        value = json.loads(path.read_text())
        for _ in range(chance.randint(1, 2)):
            _change(value, chance)
        path.write_text(json.dumps(value))
        return
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 4)):
        content[_head_or_any(len(content), chance)] = chance.randrange(256)
    if chance.random() < 0.2:
        del content[chance.randrange(len(content)) :]
    path.write_bytes(content)


def _head_or_any(size: int, chance: random.Random) -> int:
    return chance.randrange(min(size, chance.choice([8, 200, size])))


def _change(value: Any, chance: random.Random) -> None:
    """Replaces, removes or adds something in a tree of JSON, where it is."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            break
        key = chance.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and chance.random() < 0.7:
            value = inner
            continue
        if chance.random() < 0.2:
            del value[key]
        else:
            value[key] = chance.choice([one for one in VALUES if not isinstance(one, dict) or None not in one])
        return


# ---- texts


def _text(base: Path, place: Path, chance: random.Random) -> list[str]:
    """A corpus from a text of some kind of file, damaged or odd."""
    kind = chance.choice(["txt", "jsonl", "parquet"])
    path = place / f"learn.{kind}"
    texts = documents(chance.choice([1, 5, 40]), chance.randrange(10**6))
    odd = chance.choice(_ODD)
    for _ in range(chance.randint(0, 3)):
        texts.insert(chance.randrange(len(texts) + 1), odd)
    content = {"txt": _txt, "jsonl": _jsonl, "parquet": _parquet}[kind](texts, path, chance)
    for _ in range(chance.choice([0, 0, 1, 5])):
        content[_head_or_any(len(content), chance)] = chance.randrange(256)
    if chance.random() < 0.1:
        del content[chance.randrange(len(content)) :]
    path.write_bytes(content)
    column = chance.choice(["text", "text", "no", "'{text}{n}'"])
    source = f"corpus.sources.text={{path: {path}, text: {column}}}"
    sets = ["--set", source, "--set", "evaluate.texts={other: {path: other.txt}}"]
    return ["corpus", str(base / "recipe.yaml"), "--out", str(place / "out"), *sets]


_ODD = [
    "",
    "\x00" * 9,
    "\ufeff",
    "\r",
    "a\rb",
    "\u2028\u2029\x85",
    "<e>" * 50,
    "\U0001f469\u200d\U0001f52c" * 30,
    "a\u0300" * 500,
    "x" * 100_000,
    "word " * 20_000,
    "\u202ereversed",
    "\ufffd",
    " " * 10_000,
]


def _txt(texts: list[str], path: Path, chance: random.Random) -> bytearray:
    return bytearray(chance.choice(["\n\n", "\n\n", "\r\n\r\n", "\r\r", "\n", ""]).join(texts).encode())


def _jsonl(texts: list[str], path: Path, chance: random.Random) -> bytearray:
    rows: list[Any] = [{"text": text, "n": number} for number, text in enumerate(texts)]
    for _ in range(chance.choice([0, 0, 1])):
        rows.insert(chance.randrange(len(rows) + 1), chance.choice(VALUES[:-2]))
    for _ in range(chance.choice([0, 0, 1])):
        rows.insert(chance.randrange(len(rows) + 1), {"text": chance.choice(VALUES[:-2])})
    lines = [json.dumps(row) for row in rows]
    if chance.random() < 0.1:
        lines.insert(0, chance.choice(["[" * 100_000, '{"text": "\\ud800"}', '{"text": "a", "text": 1}', "NaN"]))
    return bytearray("\n".join(lines).encode())


def _parquet(texts: list[str], path: Path, chance: random.Random) -> bytearray:
    columns: dict[str, Any] = {"text": texts, "n": list(range(len(texts)))}
    odd = chance.random()
    if odd < 0.15:
        columns["text"] = pa.array([text.encode() + b"\xff\xfe" for text in texts], pa.binary()).view(pa.string())
    elif odd < 0.4:
        other = [
            [[text] for text in texts],
            [None] * len(texts),
            [{"a": 1}] * len(texts),
            [text.encode() for text in texts],
        ]
        columns["text"] = chance.choice(other)
    elif odd < 0.5:
        columns["text"] = pa.array(texts, chance.choice([pa.large_string(), pa.string_view()]))
    elif odd < 0.55:
        columns = {"text": pa.array(["x" * 40_000_000] * 3)}
    table = pa.table(columns)
    pq.write_table(table, path, compression=chance.choice(["zstd", "snappy", "none"]))
    return bytearray(path.read_bytes())


KINDS: dict[str, Maker] = {
    "recipe-text": _recipe_text,
    "recipe-values": _recipe_values,
    "whole-run": _whole_runs,
    "arguments": _arguments,
    "model": _model,
    "text": _text,
}
