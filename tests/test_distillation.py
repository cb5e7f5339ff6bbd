"""The training loop: it learns, it is deterministic, it resumes to the same bytes, and it stops on bad numbers."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import sparsekd
from sparsekd import distillation
from sparsekd import teacher as teacher_stage
from sparsekd.cache import Cache
from sparsekd.errors import DataError, Stopped, UsageError
from sparsekd.models import find_mlps
from sparsekd.recipe import Distill

OPTIONS = Distill(batch_size=4, micro_batch_size=2, learning_rate=3e-3, epochs=2, validations=3, warmup_ratio=0.2)


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randint(0, 300, (14, 24), generator=torch.Generator().manual_seed(1))


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """A random model made sure of itself, with MLPs that matter, so that there is something to lose and to restore."""
    with torch.no_grad():
        for mlp in find_mlps(model):
            for name in mlp.matrices:
                model.get_submodule(name).weight.mul_(5)
        model.get_output_embeddings().weight.mul_(10)
    return model


@pytest.fixture
def teacher(make_model: Any) -> PreTrainedModel:
    return sharpened(make_model("llama"))


@pytest.fixture
def cache(teacher: PreTrainedModel, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path) -> Cache:
    return sparsekd.cache_teacher(teacher, tokenizer, blocks, tmp_path / "cache", top_k=8)


@pytest.fixture
def new_student(teacher: PreTrainedModel, blocks: torch.Tensor) -> Callable[[], PreTrainedModel]:
    student = sparsekd.compress(copy.deepcopy(teacher), blocks, reduction=0.5)
    return lambda: copy.deepcopy(student)


def data(blocks: torch.Tensor, cache: Cache, validation_ids: tuple[int, ...] = (12, 13)) -> distillation.Data:
    def order(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[7, epoch])).permutation(12)

    return distillation.Data(list(blocks.numpy()), order, validation_ids, cache)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


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
        teacher, tmp_path / "ragged", dict(enumerate(ragged)), tokenizer="t", corpus_fingerprint="c", top_k=8
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


def test_capped_logits_take_the_way_of_full_logits(tokenizer: Any, blocks: torch.Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=len(tokenizer), **sizes, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    history = distillation.train(model, data(blocks, cache), Distill(alpha=1.0, learning_rate=1e-6, validations=1))
    assert abs(history.validations[0].kd) < 1e-4  # the loss saw the capped logits, as the cache did


def test_checkpoints_are_plain_safetensors(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        distillation.train(new_student(), data(blocks, cache), OPTIONS, folder=tmp_path, stop_signal=lambda: 2)
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"model.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"}
    assert (
        load_file(tmp_path / "checkpoint" / "model.safetensors").keys() == dict(new_student().named_parameters()).keys()
    )


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(
    name: str, new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        distillation.train(new_student(), data(blocks, cache), OPTIONS, folder=tmp_path, stop_signal=lambda: 2)
    path = tmp_path / "checkpoint" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        distillation.train(new_student(), data(blocks, cache), OPTIONS, folder=tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_step(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    student = new_student()
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        distillation.train(student, data(blocks, cache), OPTIONS)


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
