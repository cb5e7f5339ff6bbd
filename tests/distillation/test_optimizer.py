"""What trains and at which rate; adapters and checkpointing leave no trace."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import sharpened
from training import OPTIONS, data, equal, state

import sparsekd
from sparsekd import distillation
from sparsekd.distillation import optimizer as optimization
from sparsekd.errors import ResourceError, UsageError
from sparsekd.models.forms.lowrank import CompressedLinear
from sparsekd.recipe import RateScale
from sparsekd.teacher import Cache


def changed(student: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}


def low_rank(student: Any) -> set[str]:
    layers = {name for name, module in student.named_modules() if isinstance(module, CompressedLinear)}
    return {name for name, _ in student.named_parameters() if any(name.startswith(f"{layer}.") for layer in layers)}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_every_parameter_has_its_group(architecture: str, make_model: Any) -> None:
    model = make_model(architecture)
    scales = optimization.rate_scales(model, RateScale(attention=2.0, norms=3.0, embeddings=4.0))
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, scale in scales.items():
        words = {
            4.0: ("embed", "wte", "wpe", "lm_head"),
            3.0: ("norm", "ln_"),
            2.0: ("attn", "attention"),
            1.0: ("mlp",),
        }
        assert any(word in name for word in words[scale]), name


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_state_made_first_changes_no_byte(
    micro_batch_size: int, new_student: Any, blocks: torch.Tensor, cache: Cache, monkeypatch: Any
) -> None:
    """AdamW makes the same moments itself in its first step; and no gradient stays after the training."""
    options = replace(OPTIONS, batch_size=4, micro_batch_size=micro_batch_size)
    first, lazy = new_student(), new_student()
    distillation.train(first, data(blocks, cache), options)
    monkeypatch.setattr("sparsekd.distillation.loop.allocate", lambda optimizer, gradients: None)
    distillation.train(lazy, data(blocks, cache), options)
    assert equal(state(first), state(lazy))
    assert all(parameter.grad is None for parameter in first.parameters())


def test_rates_are_scaled_by_group(new_student: Any, blocks: torch.Tensor, cache: Cache) -> None:
    """AdamW's first step moves a weight by its learning rate, whatever the gradient."""
    student = new_student()
    before = state(student)
    rate = 1e-3
    options = replace(
        OPTIONS,
        learning_rate=rate,
        epochs=1,
        batch_size=12,
        validations=1,
        warmup_ratio=0.0,
        lr_scale=RateScale(attention=0.5, norms=0.1, embeddings=0.0),
        alpha=0.0,
    )
    noise = replace(data(blocks, cache), validation_ids=list(range(12)))  # what it learns is what it validates on
    history = distillation.train(student, noise, options)
    assert history.best_step == 1
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in student.named_parameters()}
    assert moved["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.5 * rate, rel=0.01)
    assert moved["model.norm.weight"] == pytest.approx(0.1 * rate, rel=0.01)
    assert moved["model.layers.0.mlp.up_proj.rest.weight"] == pytest.approx(rate, rel=0.01)
    assert moved["model.embed_tokens.weight"] == 0


def test_the_rate_rises_and_falls_as_it_is_asked_to() -> None:
    cosine, linear = (
        [optimization.schedule(step, 20, replace(OPTIONS, schedule=name)) for step in range(20)]
        for name in ("cosine", "linear")
    )
    assert cosine[:4] == linear[:4] == [0.2, 0.4, 0.6, 0.8] and cosine[4] == linear[4] == 1.0
    assert linear[4:] == pytest.approx([1 - step / 16 for step in range(16)])  # the next one would be zero
    assert cosine[12] == pytest.approx(0.55) and cosine == sorted(cosine[:5]) + sorted(cosine[5:], reverse=True)
    assert 0.1 < cosine[-1] < 0.12


def test_compressed_trains_the_low_rank_layers_only(
    new_student: Any, teacher: Any, blocks: torch.Tensor, cache: Cache
) -> None:
    student = new_student()
    before = state(student)
    options = replace(OPTIONS, train="compressed", alpha=1.0)
    history = distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    assert history.validations[-1].kd < 0.9 * history.validations[0].kd
    assert changed(student, before) == low_rank(student) != set()
    assert all(parameter.requires_grad for parameter in student.parameters())  # as it was before
    with pytest.raises(UsageError, match=r"distill\.train is compressed: the student has nothing of that kind"):
        distillation.train(teacher, data(blocks, cache), options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_is_merged_and_leaves_no_adapters(
    architecture: str, make_model: Any, tokenizer: Any, blocks: torch.Tensor, tmp_path: Any
) -> None:
    model = sharpened(make_model(architecture))
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    student = sparsekd.compress(model, blocks, reduction=0.5)
    before = state(student)
    options = replace(OPTIONS, train="lora", alpha=1.0, lora_rank=4, learning_rate=1e-2, epochs=4)
    history = distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    assert history.validations[-1].kd < 0.9 * history.validations[0].kd
    assert state(student).keys() == before.keys()
    assert not any("lora" in name for name, _ in student.named_modules())
    embedding = student.get_input_embeddings().weight
    name = next(name for name, value in student.named_parameters() if value is embedding)
    moved = changed(student, before)
    assert name not in moved and moved >= {key for key in low_rank(student) if key.endswith("weight")}
    # what is there now is what was measured
    again = distillation.measure(student, data(blocks, cache, (0, 1, 2, 3)), options)
    best = next(validation for validation in history.validations if validation.step == history.best_step)
    assert again.loss == pytest.approx(best.loss, rel=1e-4)


def test_lora_resumes_to_the_same_bytes(new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Any) -> None:
    options = replace(OPTIONS, train="lora", lora_rank=4)
    straight, resumed = new_student(), new_student()
    distillation.train(straight, data(blocks, cache), options)
    with pytest.raises(sparsekd.SparseKDError, match="state saved"):
        distillation.train(new_student(), data(blocks, cache), options, folder=tmp_path, stop_signal=lambda: 15)
    distillation.train(resumed, data(blocks, cache), options, folder=tmp_path)
    assert equal(state(resumed), state(straight))


def test_lora_without_peft_says_what_to_install(
    new_student: Any, blocks: torch.Tensor, cache: Cache, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ResourceError, match=r'needs peft: pip install "sparsekd\[lora\]"'):
        distillation.train(new_student(), data(blocks, cache), replace(OPTIONS, train="lora"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activation_checkpointing_changes_memory_not_numbers(
    architecture: str, make_model: Any, tokenizer: Any, blocks: torch.Tensor, tmp_path: Any
) -> None:
    model = sharpened(make_model(architecture))
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    plain, student = model, make_model(architecture)
    student.load_state_dict(model.state_dict())
    expected = distillation.train(plain, data(blocks, cache), replace(OPTIONS, epochs=1))

    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    attention = next(module for module in student.modules() if hasattr(module, "head_dim"))
    handle = attention.register_forward_hook(count)
    history = distillation.train(
        student, data(blocks, cache), replace(OPTIONS, epochs=1, gradient_checkpointing=True, validations=1)
    )
    assert [step.loss for step in history.steps] == [step.loss for step in expected.steps]
    assert calls == 2 + 2 * 1 + 2 * 6  # two looks for the head, two validations, and six micro batches twice
    handle.remove()
    assert not any("forward" in vars(module) for module in student.modules())


def test_activation_checkpointing_goes_with_adapters_on_dense_matrices(
    teacher: Any, blocks: torch.Tensor, cache: Cache
) -> None:
    """Adapters change what a layer's MLP looks like."""
    options = replace(OPTIONS, train="lora", alpha=0.0, epochs=1, validations=1, gradient_checkpointing=True)
    before = state(teacher)
    distillation.train(teacher, data(blocks, cache), options)
    assert changed(teacher, before)
