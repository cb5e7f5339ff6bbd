"""The training loop: it learns, it is deterministic, it resumes to the same bytes, and it stops on bad numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_processes
from launching import run_processes, split_models
from safetensors.torch import load_file
from tiny import sharpened
from training import OPTIONS, data, equal, state
from transformers import PreTrainedModel

import sparsekd
from sparsekd import distillation
from sparsekd import teacher as teacher_stage
from sparsekd.errors import DataError, ResourceError, Stopped, UsageError
from sparsekd.recipe import Distill
from sparsekd.teacher import Cache, Online


def test_training_restores_part_of_what_was_lost(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    options = replace(OPTIONS, alpha=1.0)  # the blocks are noise: there is nothing to learn but the teacher
    history = distillation.train(new_student(), data(blocks, cache, (0, 1, 2, 3)), options)
    assert [step.step for step in history.steps] == [1, 2, 3, 4, 5, 6]
    assert [validation.step for validation in history.validations] == [0, 2, 4, 6]
    assert history.validations[-1].kd < 0.7 * history.validations[0].kd
    assert history.steps[-1].num_tokens == 2 * 12 * 24


def test_same_seed_gives_the_same_bytes(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    students = [new_student() for _ in range(2)]
    for student in students:
        distillation.train(student, data(blocks, cache), OPTIONS)
    assert equal(state(students[0]), state(students[1]))


@pytest.mark.parametrize("stops", [[1], [3], [1, 2, 5]])
def test_a_stopped_and_resumed_training_ends_with_the_same_bytes(
    stops: list[int], new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    straight = new_student()
    expected = distillation.train(straight, data(blocks, cache), OPTIONS)
    folder = tmp_path / "training"
    for stop in stops:
        done: list[int] = []
        with pytest.raises(Stopped) as caught:
            distillation.train(
                new_student(),
                data(blocks, cache),
                OPTIONS,
                folder=folder,
                on_step=lambda step, _, done=done: done.append(step.step),
                stop_signal=lambda done=done, stop=stop: 15 if done[-1] == stop else None,
            )
        assert caught.value.exit_code == 143
        assert done[-1] == stop
    resumed = new_student()
    history = distillation.train(resumed, data(blocks, cache), OPTIONS, folder=folder)
    assert equal(state(resumed), state(straight))
    assert [step.loss for step in history.steps] == [step.loss for step in expected.steps]


def test_best_weights_are_kept_not_the_last(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    student = new_student()
    before = state(student)
    wild = Distill(
        alpha=1.0, batch_size=4, micro_batch_size=4, learning_rate=1.0, epochs=1, validations=3, warmup_ratio=0.0
    )
    history = distillation.train(student, data(blocks, cache), wild)
    assert history.best_step == 0  # every later validation is worse at this learning rate
    assert equal(state(student), before)


def test_micro_batches_do_not_change_the_step(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    first_steps = []
    for micro in (1, 2, 4):
        options = Distill(batch_size=4, micro_batch_size=micro, learning_rate=1e-3, validations=1)
        first_steps.append(distillation.train(new_student(), data(blocks, cache), options).steps[0])
    for step in first_steps[1:]:
        assert step.loss == pytest.approx(first_steps[0].loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(first_steps[0].grad_norm, rel=1e-4)


def test_dense_model_against_its_own_cache_has_almost_no_kd_and_gradient(
    teacher: PreTrainedModel, blocks: torch.Tensor, cache: Cache
) -> None:
    """The control that the paper lacks: KL to one's own distribution teaches nothing at the start."""
    options = Distill(batch_size=4, micro_batch_size=4, alpha=1.0, learning_rate=1e-6, validations=1)
    step = distillation.train(teacher, data(blocks, cache), options).steps[0]
    assert abs(step.kd) < 1e-4  # fp16 rounding of the cache
    assert step.grad_norm < 0.05


def test_blocks_of_different_lengths_are_padded_without_effect(
    new_student: Any, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    lengths = [24, 10, 17, 24, 9, 12]
    ragged = [generator.integers(0, 300, length).astype(np.int32) for length in lengths]
    cache = teacher_stage.fill(
        teacher, tmp_path / "ragged", dict(enumerate(ragged)), tokenizer_hash="t", corpus_fingerprint="c", top_k=8
    )
    losses = []
    for micro in (1, 4):
        options = Distill(batch_size=4, micro_batch_size=micro, validations=1)
        ragged_data = distillation.Data(ragged, lambda epoch: np.arange(4), [4, 5], cache)
        losses.append(distillation.train(new_student(), ragged_data, options).steps[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "phi3", "gpt2", "gpt_neox"])
def test_every_architecture_trains(
    architecture: str, make_model: Any, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path
) -> None:
    model = sharpened(make_model(architecture))
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    student = sparsekd.compress(model, blocks, reduction=0.5)
    options = replace(OPTIONS, alpha=1.0, learning_rate=1e-3, epochs=4)
    history = distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    assert history.validations[-1].kd < 0.8 * history.validations[0].kd


def test_a_loss_that_is_not_finite_stops_before_the_step(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    student = new_student()
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        distillation.train(student, data(blocks, cache), OPTIONS)


def test_a_batch_without_a_position_to_predict_is_refused(new_student: Any, teacher: Any, tmp_path: Path) -> None:
    single = [np.array([5], np.int32)] * 3
    empty = distillation.Data(single, lambda epoch: np.arange(2), [2], Online(teacher, 8))
    with pytest.raises(DataError, match="training blocks have no position that predicts"):
        distillation.train(new_student(), empty, OPTIONS)
    mixed = distillation.Data(
        [*single[:2], np.arange(8, dtype=np.int32)], lambda e: np.arange(3), [2], Online(teacher, 8)
    )
    with pytest.raises(DataError, match="no position of blocks 0, 1 predicts a token"):
        distillation.train(new_student(), mixed, replace(OPTIONS, batch_size=2))


def test_a_cache_that_lacks_blocks_is_refused_before_the_first_step(
    new_student: Any, teacher: PreTrainedModel, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path
) -> None:
    short = sparsekd.cache_teacher(teacher, tokenizer, blocks[:10], tmp_path / "short", top_k=8)
    with pytest.raises(DataError, match="lacks 4 of the 14 blocks that are needed, the first is block 10"):
        distillation.train(new_student(), data(blocks, short), OPTIONS)


# ---- when to stop


def test_the_stopping_rule() -> None:
    def reason(*losses: float) -> str:
        return distillation.reason_to_stop(losses, patience=3, min_improvement=0.01) or ""

    assert reason(4.0, 3.0, 2.5) == ""  # too early to say
    assert reason(4.0, 3.0, 2.5, 2.2) == ""  # improving
    assert reason(4.0, 3.0, 2.0, 2.1, 2.2, 2.3).startswith("a clear minimum")
    assert reason(4.0, 3.0, 2.0, 1.999, 1.998, 1.997).startswith("saturation")
    assert reason(4.0, 3.0, 2.0, 2.1, 2.2, 1.9) == ""  # a bump on the way down is no minimum
    assert reason(4.0, 3.0, 2.0, 2.01, 1.99, 2.5).startswith("saturation")


@pytest.mark.parametrize(("rate", "reason"), [(1e-9, "saturation"), (0.3, "a clear minimum")])
def test_training_stops_when_it_has_converged(
    rate: float, reason: str, new_student: Any, blocks: torch.Tensor, cache: Cache
) -> None:
    options = replace(
        OPTIONS, stop="converged", patience=2, epochs=4, validations=12, learning_rate=rate, warmup_ratio=0.0
    )
    history = distillation.train(new_student(), data(blocks, cache), options)
    assert history.stop_reason and history.stop_reason.startswith(reason)
    assert len(history.steps) == 2
    fixed = distillation.train(new_student(), data(blocks, cache), replace(options, stop="epochs"))
    assert fixed.stop_reason == "all 4 epochs are done"
    assert len(fixed.steps) == 12


def test_parity_is_noted_and_does_not_stop(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    history = distillation.train(new_student(), data(blocks, cache), OPTIONS, dense_ce=1e3)
    assert history.parity_step == 0
    assert len(history.steps) == 6
    never = distillation.train(new_student(), data(blocks, cache), OPTIONS, dense_ce=0.0)
    assert never.parity_step is None


# ---- what is measured


def test_the_dense_model_agrees_with_itself_in_every_domain(
    teacher: PreTrainedModel, new_student: Any, blocks: torch.Tensor, cache: Cache
) -> None:
    sources = ["wiki"] * 13 + ["code"]
    by_domain = replace(data(blocks, cache, (10, 11, 12, 13)), sources=sources)
    dense = distillation.measure(teacher, by_domain, OPTIONS)
    assert dense.agreement == 1.0
    assert dense.kd == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        tokens = blocks[10:14]
        logits = teacher(tokens).logits[:, :-1].flatten(0, 1)
        ce = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert dense.ce == pytest.approx(float(ce), rel=1e-5)
    assert dense.perplexity == pytest.approx(float(ce.exp()), rel=1e-4)
    student = distillation.measure(new_student(), by_domain, OPTIONS)
    assert 0 < student.agreement < 1
    assert set(student.domains) == {"wiki", "code"}
    for key in ("loss", "kd", "ce", "agreement"):  # three blocks of one domain, one of the other, all equally long
        weighted = 0.75 * student.domains["wiki"][key] + 0.25 * student.domains["code"][key]
        assert weighted == pytest.approx(getattr(student, key), rel=1e-5)


def test_metrics_have_every_step_once_also_after_a_kill(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill(step: distillation.Step, _: int) -> None:
        if step.step == 4:
            raise Killed

    options = replace(OPTIONS, checkpoint_minutes=0.0)
    with pytest.raises(Killed):
        distillation.train(new_student(), data(blocks, cache), options, folder=tmp_path, on_step=kill)
    path = tmp_path / distillation.METRICS
    path.write_text(path.read_text() + '{"kind": "st')  # a line torn by the kill
    history = distillation.train(new_student(), data(blocks, cache), options, folder=tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["step"] for line in lines if line["kind"] == "step") == [1, 2, 3, 4, 5, 6]
    assert sorted(line["step"] for line in lines if line["kind"] == "validation") == [0, 2, 4, 6]
    assert [line["loss"] for line in lines if line["kind"] == "step"] == [step.loss for step in history.steps]


def test_tensorboard_writes_when_it_is_asked_for(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    distillation.train(new_student(), data(blocks, cache), OPTIONS, folder=tmp_path / "without")
    assert not list((tmp_path / "without").rglob("events.out.tfevents*"))
    options = replace(OPTIONS, trackers=["tensorboard"])
    distillation.train(new_student(), data(blocks, cache), options, folder=tmp_path / "with")
    written = b"".join(path.read_bytes() for path in (tmp_path / "with").rglob("events.out.tfevents*"))
    assert b"step/loss" in written
    assert b"validation/all/agreement" in written
    with pytest.raises(ResourceError, match="nosuch is not installed here"):
        distillation.train(new_student(), data(blocks, cache), replace(OPTIONS, trackers=["nosuch"]))


# ---- out of memory


class Limited(torch.nn.Module):
    """Wraps an embedding so that more than two blocks at once are too many."""

    def __init__(self, inner: torch.nn.Module, most: int):
        super().__init__()
        self.inner, self.most, self.weight = inner, most, inner.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(tokens) > self.most and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(tokens)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    new_student: Any, blocks: torch.Tensor, cache: Cache
) -> None:
    options = replace(OPTIONS, micro_batch_size=4)
    limited, small = new_student(), new_student()
    limited.model.embed_tokens = Limited(limited.model.embed_tokens, 2)
    said: list[str] = []
    history = distillation.train(limited, data(blocks, cache), options, say=said.append)
    expected = distillation.train(small, data(blocks, cache), replace(options, micro_batch_size=2))
    assert said == ["  out of memory: distill.micro_batch_size is 2 from here on, the step stays as it is"]
    assert [step.loss for step in history.steps] == [step.loss for step in expected.steps]
    assert torch.equal(limited.model.layers[0].mlp.up_proj.rest.weight, small.model.layers[0].mlp.up_proj.rest.weight)
    limited.model.embed_tokens.most = 0
    with pytest.raises(ResourceError, match=r"out of memory with distill\.micro_batch_size=1"):
        distillation.train(limited, data(blocks, cache), options)


# ---- the teacher asked at every step


def test_an_online_teacher_gives_the_same_training_as_its_cache(
    teacher: PreTrainedModel, new_student: Any, blocks: torch.Tensor, cache: Cache
) -> None:
    from_cache = distillation.train(new_student(), data(blocks, cache), OPTIONS)
    online = distillation.train(new_student(), replace(data(blocks, cache), teacher=Online(teacher, 8)), OPTIONS)
    for a, b in zip(from_cache.steps, online.steps, strict=True):
        assert a.kd == pytest.approx(b.kd, rel=2e-3)  # the cache is rounded to fp16
        assert a.ce == pytest.approx(b.ce, rel=1e-3)


# ---- several processes


@pytest.mark.parametrize(("count", "is_split"), [(2, False), (4, False), (2, True), (4, True)])
def test_several_processes_train_the_same_weights_as_one(
    count: int,
    is_split: bool,
    new_student: Any,
    tokenizer: Any,
    blocks: torch.Tensor,
    cache: Cache,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """DDP and FSDP2 over gloo. Eleven blocks in steps of four: in the last step, of three, a process gets one block
    less, of four processes none at all. Weights of KD by position or source are the same in all."""
    sparsekd.save(new_student(), tokenizer, tmp_path / "student")
    np.save(tmp_path / "blocks.npy", blocks.numpy())
    for name in ("one", "gap-one", "domain-one"):
        training_processes.train(tmp_path, name)
    if is_split:
        split_models(monkeypatch)
    names = ("several", "stopped", "gap-several", "domain-several")
    run_processes("training_processes.py", str(tmp_path), *names, count=count)
    one, several, stopped = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "several", "stopped"))
    start = new_student().state_dict()
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, rtol=1e-4, atol=1e-5)
        # their checkpoint resumes to the same bytes; more than two may add up in another order, which DDP chooses anew
        torch.testing.assert_close(stopped[name], several[name], rtol=1e-4 * (count > 2), atol=1e-5 * (count > 2))
    assert any(not torch.allclose(one[name], start[name], rtol=1e-3, atol=1e-3) for name in one)
    curves = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "several")]
    assert curves[1]["losses"] == pytest.approx(curves[0]["losses"], rel=1e-5)
    assert curves[1]["validations"] == pytest.approx(curves[0]["validations"], rel=1e-5)
    for weighting in ("gap", "domain"):  # four steps, the last by a second validation; then Adam enlarges rounding
        losses = [
            json.loads((tmp_path / f"{weighting}-{n}.json").read_text())["losses"][:4] for n in ("one", "several")
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_cache_of_other_tokens_is_refused(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    with pytest.raises(DataError, match="other tokens"):
        distillation.train(new_student(), data(blocks.flip(0), cache), OPTIONS)


def test_the_library_call(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    student = new_student()
    before = state(student)
    assert sparsekd.distill(student, blocks, cache, alpha=1.0, learning_rate=1e-3, epochs=2) is student
    assert not equal(state(student), before)
    with pytest.raises(UsageError, match="learning_rte"):
        sparsekd.distill(student, blocks, cache, learning_rte=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_trained_in_float32(
    dtype: torch.dtype, new_student: Any, blocks: Any, cache: Any
) -> None:
    """In bfloat16 a step of 3e-5 is lost on most weights: it is less than half of their last digit."""
    options = {"learning_rate": 3e-5, "epochs": 4, "precision": "float32"}
    before, student = new_student().to(dtype), new_student().to(dtype)
    expected = sparsekd.distill(new_student().to(dtype).float(), blocks, cache, **options).to(dtype)
    assert sparsekd.distill(student, blocks, cache, **options) is student
    pairs = list(zip(student.parameters(), expected.parameters(), before.parameters(), strict=True))
    assert all(found.dtype == dtype and torch.equal(found, wanted) for found, wanted, _ in pairs)
    moved = sum(int((found != start).sum()) for found, _, start in pairs)
    assert moved > 0.3 * sum(found.numel() for found, _, _ in pairs)
