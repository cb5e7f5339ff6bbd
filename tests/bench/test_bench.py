"""Models in turns: what comes first, what is left out, what does not fit; and the command, in processes."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd.bench import Plan, Shape, compare
from sparsekd.bench.cells import Variant, in_order
from sparsekd.bench.latency import _Bench, _Pace, summarize, take_turns
from sparsekd.bench.subject import OutOfTime, Subject, serve
from sparsekd.errors import DataError, ResourceError, UsageError
from sparsekd.report import speed
from sparsekd.run import peak_memory_bytes, reset_peak_memory

BASE = Variant("torch", "float32", "sdpa")


def test_what_matters_comes_first() -> None:
    plan = Plan(["torch", "compile"], ["float32", "bfloat16"], ["sdpa", "eager"], [16, 1, 64], [1024, 128])
    groups = in_order(plan.variants(), plan.batches, plan.lengths)
    first = [Shape(1, 128), Shape(16, 128)]
    assert groups[0] == (BASE, first)
    assert [shapes for _, shapes in groups[:8]] == [first] * 8
    assert groups[8] == (BASE, [Shape(1, 1024), Shape(64, 128), Shape(16, 1024), Shape(64, 1024)])
    differing = [sum(a != b for a, b in zip(variant, BASE, strict=True)) for variant, _ in groups]
    assert differing == [0, 1, 1, 1, 2, 2, 2, 3] * 2
    assert in_order([BASE], [2, 1], [8]) == [(BASE, [Shape(1, 8), Shape(2, 8)])]


def test_a_runtime_has_what_it_has() -> None:
    plan = Plan(["torch", "onnx", "openvino", "llama.cpp"], ["bfloat16", "float32"], ["sdpa"], [1], [8])
    assert [str(one) for one in plan.variants()] == [
        *["torch bfloat16 sdpa", "torch float32 sdpa", "onnx float32", "openvino bfloat16", "openvino float32"],
        "llama.cpp",
    ]
    with pytest.raises(UsageError, match="--dtype float16 --attention sdpa: onnx has float32"):
        Plan(["onnx"], ["float16"], ["sdpa"], [1], [8]).variants()


def test_a_runtime_that_no_model_is_for(refused: Any, model_folder: Any) -> None:
    line = refused("bench", model_folder("llama"), "--runtime", "llama.cpp", error=UsageError)
    assert "none of the models is for runtime llama.cpp: sparsekd export MODEL --format gguf" in line


class Timed:
    """A subject of known times, of which some are disturbed."""

    def __init__(self, log: list[str], name: str, seconds: float, peak: int = 10):
        self.log, self.name, self.seconds, self.peak, self.turns = log, name, seconds, peak, 0

    def forget_peak(self, until: float) -> None:
        self.turns = 0

    def turn(self, shape: Shape, until: float) -> dict[str, float]:
        if time.monotonic() > until:
            raise OutOfTime
        self.log.append(self.name)
        self.turns += 1
        load = 1 + len(self.log) // 4 % 3  # the machine becomes slower and faster, for both
        return {"first_token": load * self.seconds, "per_token": load * self.seconds / 10}


def test_turns_change_places_and_a_ratio_is_of_pairs() -> None:
    log: list[str] = []
    subjects = {"dense": Timed(log, "dense", 3.0), "small": Timed(log, "small", 2.0)}
    turns = take_turns(subjects, Shape(2, 8), time.monotonic() + 60, 0.0, _Pace())
    assert log[:2] == ["dense", "small"]  # not counted
    assert log[2:10] == ["dense", "small", "small", "dense"] * 2
    memory: dict[str, Any] = {name: {"peak_bytes": 10, "device_peak_bytes": None} for name in subjects}
    found = summarize(turns, memory, Shape(2, 8))
    assert found["models"]["dense"]["times_as_fast"] is None
    ratio = found["models"]["small"]["times_as_fast"]["first_token"]
    assert ratio["median"] == 1.5 and found["turns"] == len(turns["dense"])
    seconds = found["models"]["small"]["seconds"]["per_token"]["median"]
    assert found["models"]["small"]["tokens_per_second"]["generated"] == pytest.approx(2 / seconds)


def test_turns_end_when_the_time_is_over() -> None:
    with pytest.raises(OutOfTime):
        take_turns({"dense": Timed([], "dense", 1.0)}, Shape(1, 8), time.monotonic() - 1, 0.0, _Pace())


class Small(Timed):
    """With memory for two prompts."""

    def turn(self, shape: Shape, until: float) -> dict[str, float]:
        if shape.batch > 2:
            raise MemoryError
        return super().turn(shape, until)

    def open_again(self, until: float) -> None:
        self.log.append("opened again")

    def memory(self, until: float) -> dict[str, Any]:
        return {"peak_bytes": 10, "before_bytes": 1, "device_peak_bytes": None}


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch: Any) -> None:
    said: list[str] = []
    log: list[str] = []
    bench = _Bench(["dense"], "cpu", 1, 0.1, 1.0, said.append, said.append)
    opened = contextlib.nullcontext({"dense": Small(log, "dense", 1e-6)})
    monkeypatch.setattr(bench, "_opened", lambda variant: opened)
    bench.measure(BASE, [Shape(2, 8), Shape(8, 8), Shape(12, 8)])
    assert [(cell["batch"], cell["length"]) for cell in bench.cells] == [(2, 8), (1, 8)]  # 12, 6, 3, 1
    assert [one["shapes"] for one in bench.left_out] == [["8 x 8"], ["4 x 8"], ["12 x 8"], ["6 x 8"], ["3 x 8"]]
    assert "  out of memory: torch float32 sdpa, 8 x 8 does not fit: the batch is 4 instead" in said
    assert log.count("opened again") == 5


def test_a_pace_is_carried_over_to_other_shapes() -> None:
    pace = _Pace()
    assert pace.seconds(Shape(64, 1024)) == 0
    pace.add(Shape(2, 100), [{"first_token": 1.0, "per_token": 0.125}, {"first_token": 1.0, "per_token": 0.125}])
    assert pace.seconds(Shape(2, 100)) == pytest.approx(2 + 16 * 0.25)
    assert pace.seconds(Shape(4, 200)) == pytest.approx(8 + 2 * 16 * 0.25)


def test_the_peak_begins_anew() -> None:
    large = torch.ones(50_000_000)
    held = peak_memory_bytes()
    assert held > 200e6
    del large
    reset_peak_memory()
    assert peak_memory_bytes() < held - 150e6


def test_a_process_says_that_memory_ran_out_and_goes_on(model_folder: Any) -> None:
    answers: list[dict[str, Any]] = []
    opening = json.dumps([str(model_folder("llama")), list(BASE), "cpu", 1])
    requests = [opening, '["turn", [4000000000, 100000]]', '["turn", [2, 8]]', '["memory"]']
    serve(requests, answers.append)
    assert answers[0] == {} and "no_memory" in answers[1]
    assert answers[2]["first_token"] > 0 and answers[2]["per_token"] > 0
    assert answers[3]["peak_bytes"] > 50e6 and answers[3]["before_bytes"] > 50e6


def test_a_subject_decodes_from_the_cache(model_folder: Any) -> None:
    for attention in ("sdpa", "eager"):
        found = Subject(str(model_folder("llama")), Variant("torch", "bfloat16", attention), torch.device("cpu"))
        assert found.turn((2, 8))["per_token"] > 0
        assert found._session._run.dtype == torch.bfloat16
        assert found._session._run.config._attn_implementation == attention


def test_the_command(sparsekd: Any, small_model: Any, model_folder: Any, tmp_path: Path) -> None:
    folder, _ = small_model
    dense, out = model_folder("llama"), tmp_path / "bench.json"
    options = ("--runtime", "torch", "--dtype", "float32", "--attention", "sdpa", "--length", "8")
    printed = sparsekd("bench", dense, folder, *options, "--batch", 2, "--precision", 0, "--out", out)
    assert printed.code == 0, printed
    found = json.loads(out.read_text())
    assert [(cell["batch"], cell["length"]) for cell in found["cells"]] == [(2, 8)]
    assert list(found["models"]) == [str(dense), str(folder)] and found["threads"] == torch.get_num_threads()
    assert found["models"][str(dense)]["disk_bytes"] == (dense / "model.safetensors").stat().st_size
    for cell in found["cells"]:
        small = cell["models"][str(folder)]
        assert small["times_as_fast"]["per_token"]["low"] <= small["times_as_fast"]["per_token"]["median"]
        assert small["peak_bytes"] > 50e6 and small["device_peak_bytes"] is None
    assert "warning: torch float32 sdpa, 2 x 8" in printed.err and "the machine is busy" in printed.err
    assert "torch float32 sdpa; cpu" in printed.out and "2 x 8" in printed.out and "On disk" in printed.out


def test_a_model_that_cannot_be_opened_is_named(refused: Any, model_folder: Any) -> None:
    folder = model_folder("llama")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    line = refused("bench", folder, "--runtime", "torch", "--dtype", "float32", "--attention", "sdpa", error=DataError)
    assert str(folder) in line


def test_bad_options(refused: Any, model_folder: Any) -> None:
    folder = model_folder("llama")
    for options, said in {
        ("--batch", "0"): "--batch is 0: expected numbers from 1 on",
        ("--length", "a"): "--length is a: expected numbers with commas between them",
        (
            "--runtime",
            "fast",
        ): "--runtime is fast: expected torch, compile, onnx, openvino, llama.cpp, several with commas between them",
        (str(folder),): f"model {folder} is given twice",
    }.items():
        assert said in refused("bench", folder, *options, error=UsageError)
    assert "no such folder" in refused("bench", "nowhere/to/be/found", error=UsageError)


def test_a_compiler_that_is_missing(monkeypatch: Any, refused: Any, model_folder: Any) -> None:
    monkeypatch.setenv("PATH", "")
    line = refused("bench", model_folder("llama"), "--runtime", "compile", error=ResourceError)
    assert "runtime compile is not installed: apt install g++" in line


def test_no_time_is_said(model_folder: Any) -> None:
    plan = Plan(["torch"], ["float32"], ["sdpa"], [1], [8])
    with pytest.raises(ResourceError, match="nothing was measured within --minutes 0: give more"):
        compare([str(model_folder("llama"))], plan, minutes=0.0)


def test_what_is_left_out_is_named() -> None:
    one = {"runtime": "torch", "dtype": "float32", "attention": "eager", "shapes": ["1 x 8"], "why": "--minutes 5"}
    assert speed.left_out({"left_out": [one, one | {"shapes": ["2 x 8"]}]}) == [
        "left out: torch float32 eager: 1 x 8, 2 x 8 (--minutes 5)"
    ]
