"""Pruning to zeros: the choice against brute force, what a folder says of it, and training that keeps every zero."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_processes
from cutting import section
from hypothesis import given
from hypothesis import strategies as st
from launching import run_processes, split_models
from safetensors.torch import load_file
from tiny import sharpened
from training import OPTIONS, data, equal, state
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsekd
from sparsekd import distillation, models
from sparsekd.compression import plan_for, spectra_of
from sparsekd.compression.calibration import Calibration
from sparsekd.compression.zeros import least_important
from sparsekd.distillation import optimizer as optimization
from sparsekd.errors import DataError, Stopped, UsageError
from sparsekd.models import anatomy
from sparsekd.models.anatomy import find_mlps, linear_weight
from sparsekd.recipe import load_recipe
from sparsekd.run import inspection
from sparsekd.teacher.cache import Cache

ARCHITECTURES = ["llama", "qwen3", "phi3", "gpt2"]
MASK: dict[str, Any] = {"method": "wanda", "format": "mask"}


def matrices(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every MLP matrix, output x input, as it is now."""
    names = [name for mlp in find_mlps(model) for name in mlp.matrices]
    return {name: linear_weight(model.get_submodule(name)).detach().clone() for name in names}


def zeros(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in matrices(model).items()}


@pytest.fixture
def new_masked(teacher: PreTrainedModel, blocks: torch.Tensor) -> Callable[[], PreTrainedModel]:
    student = sparsekd.compress(copy.deepcopy(teacher), blocks, reduction=0.5, **MASK)
    return lambda: copy.deepcopy(student)


# ---- what is pruned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_choice_is_that_of_brute_force(architecture: str, make_model: Any, blocks: torch.Tensor) -> None:
    model = make_model(architecture)
    dense, before = matrices(model), state(model)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in dense}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        for name, seen in inputs.items()
    ]
    with torch.no_grad():
        model(blocks)
    for handle in handles:
        handle.remove()

    assert sparsekd.compress(model, blocks, reduction=0.35, batch_size=3, **MASK) is model
    for name, weight in dense.items():
        norms = inputs[name][0].flatten(0, 1).double().norm(dim=0)
        bias = getattr(model.get_submodule(name), "bias", None)
        count = int(np.ceil(0.35 * (weight.shape[1] + (bias is not None))))
        expected = weight.clone()
        for row in range(len(weight)):
            scores = {column: abs(float(weight[row, column])) * float(norms[column]) for column in range(len(norms))}
            for column in sorted(scores, key=scores.__getitem__)[:count]:
                expected[row, column] = 0
        assert torch.equal(linear_weight(model.get_submodule(name)), expected), name
    pruned = {f"{name}.weight" for name in dense}
    assert all(torch.equal(value, before[name]) for name, value in state(model).items() if name not in pruned)


@given(
    st.integers(1, 6), st.integers(1, 12), st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_every_row_loses_its_lowest_scores(rows: int, columns: int, draws: st.DataObject, dtype: torch.dtype) -> None:
    few = st.integers(-3, 3)  # many ties, many zeros
    values = draws.draw(st.lists(few, min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(values).reshape(rows, columns).to(dtype)
    norms = torch.tensor(draws.draw(st.lists(st.integers(0, 3), min_size=columns, max_size=columns))).double()
    count = draws.draw(st.integers(0, columns))
    chosen = least_important(weight, weight.abs() * norms, count)
    assert (chosen.sum(1) == count).all()
    scores = weight.float().abs() * norms.float()
    for row, pruned in zip(scores, chosen, strict=True):
        if 0 < count < columns:
            assert row[pruned].max() <= row[~pruned].min()
    left = weight.masked_fill(chosen, 0)
    more = least_important(left, left.abs() * norms, draws.draw(st.integers(count, columns)))
    assert (more | ~chosen).all()  # pruned again, nothing comes back and nothing counts twice


def test_the_same_weights_are_pruned_whatever_the_batches(make_model: Any, blocks: torch.Tensor) -> None:
    found = []
    for batches in (blocks, blocks.split(1), [blocks[:9], blocks[9:]]):
        found.append(zeros(sparsekd.compress(make_model("llama"), batches, reduction=0.35, **MASK)))
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduction", [0.15, 0.35, 0.65])
def test_the_plan_counts_what_is_kept_and_what_is_stored(
    architecture: str, reduction: float, make_model: Any, blocks: torch.Tensor
) -> None:
    model = make_model(architecture)
    options = section(reduction=reduction, **MASK)
    with torch.device("meta"):
        dry = plan_for(AutoModelForCausalLM.from_config(model.config), options)
    size = models.num_parameters(model)
    sparsekd.compress(model, blocks, reduction=reduction, **MASK)
    assert {matrix.name: matrix.zeros for matrix in dry.matrices} == {
        name: int(zero.sum()) for name, zero in zeros(model).items()
    }
    assert reduction <= dry.mlp_reduction < reduction + 0.04  # rows of 32 weights: a weight is 3 % of them
    assert dry.model_parameters_after == size - sum(int(zero.sum()) for zero in zeros(model).values())
    assert dry.model_parameters_stored == dry.as_dict()["model_parameters_stored"] == size
    assert models.num_parameters(model) == size


def test_a_masked_model_is_pruned_further(new_masked: Any, blocks: torch.Tensor) -> None:
    model = new_masked()
    before = zeros(model)
    sparsekd.compress(model, blocks, reduction=0.75, **MASK)
    after = zeros(model)
    assert all((after[name] | ~zero).all() for name, zero in before.items())
    assert all((zero.sum(1) == zero.shape[1] * 3 // 4).all() for zero in after.values())
    with pytest.raises(UsageError, match=r"reduction is 0\.75, but 75\.0% of the MLP parameters are zero already"):
        sparsekd.compress(model, blocks, reduction=0.75, **MASK)


def test_low_rank_and_masked_models_meet(new_masked: Any, new_student: Any, blocks: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate_proj is lowrank already: prune the dense model"):
        sparsekd.compress(new_student(), blocks, reduction=0.75, **MASK)
    masked = new_masked()
    with pytest.raises(UsageError, match="not compressed: there is no format"):
        sparsekd.convert(masked, "lowrank")
    with pytest.raises(UsageError, match="wanda, which has no directions"):
        spectra_of(masked, Calibration(masked, []), section(**MASK))
    sparsekd.compress(masked, blocks, reduction=0.5)
    assert masked.config.sparsekd["form"] == "lowrank"


def test_bad_text_leaves_the_model_as_it_was(make_model: Any, blocks: torch.Tensor) -> None:
    model = make_model("llama")
    with pytest.raises(UsageError, match="weighs inputs by text: no blocks were given"):
        sparsekd.compress(model, None, **MASK)
    with torch.no_grad():
        model.model.embed_tokens.weight[310] = torch.inf
    blocks[3, 0] = 310
    before = state(model)
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.down_proj.* not finite in blocks 2 to 3"):
        sparsekd.compress(model, blocks, batch_size=2, **MASK)
    assert equal(state(model), before)
    assert not hasattr(model.config, "sparsekd")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "mask"}, "whitened.format is 'mask': expected one of pivot, lowrank"),
        (
            {**MASK, "rank_multiple": 8},
            "rank_multiple is 8, which is an option of svd, two-sided, whitened, not of wanda",
        ),
        ({**MASK, "ranks_from": "stage.json"}, "compress.ranks_from is 'stage.json', which is an option of svd"),
    ],
)
def test_options_that_do_not_go_together(settings: dict[str, Any], message: str, make_model: Any) -> None:
    with pytest.raises(UsageError, match=message):
        sparsekd.compress(make_model("llama"), None, **settings)


# ---- the folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_opens_the_folder(
    architecture: str, dtype: torch.dtype, make_model: Any, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path
) -> None:
    model = sparsekd.compress(make_model(architecture), blocks, reduction=0.35, **MASK)
    pruned = zeros(model)
    sparsekd.save(model, tokenizer, tmp_path / "masked", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "masked").eval()
    ours, _ = sparsekd.load(str(tmp_path / "masked"))
    assert type(plain) is type(ours) is type(make_model(architecture))
    assert ours.dtype == plain.dtype == dtype
    assert ours.config.sparsekd == model.config.sparsekd
    assert equal(zeros(ours), pruned)
    assert equal(zeros(plain), pruned)
    with torch.no_grad():
        assert torch.equal(ours(blocks).logits, plain(blocks).logits)
    facts = inspection.describe(tmp_path / "masked")
    assert facts["format"] == "mask"
    assert facts["compressed"] == f"wanda, {sum(int(zero.sum()) for zero in pruned.values())} zeros in dense matrices"


def test_zeros_that_other_training_filled_are_named(new_masked: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = new_masked()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    message = r"layers\.1\.mlp\.up_proj has 0 zeros, pruning left 1024: other training filled them"
    with pytest.raises(DataError, match=message):
        sparsekd.save(model, tokenizer, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    with pytest.raises(DataError, match=message):
        sparsekd.load(str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("mask", "expected version, form .* method, reduction, dense and layers"),
        (
            {"format": "mask", "method": "wanda", "reduction": 0.5},
            "expected version, form .* method, reduction, dense and layers",
        ),
        (
            {"format": "mask", "method": "wanda", "reduction": 0.5, "zeros": {"lm_head": 3}},
            "zeros to lm_head, which is no matrix of an MLP",
        ),
    ],
)
def test_a_damaged_description_is_refused(
    damage: Any, message: str, new_masked: Any, tokenizer: Any, tmp_path: Path
) -> None:
    sparsekd.save(new_masked(), tokenizer, tmp_path / "masked")
    (tmp_path / "masked" / "sparsekd.json").unlink()  # or its hashes would tell
    path = tmp_path / "masked" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sparsekd": damage}))
    with pytest.raises(DataError, match=message):
        sparsekd.load(str(tmp_path / "masked"))


# ---- training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("train", ["all", "compressed"])
def test_training_keeps_every_zero_and_moves_the_rest(
    architecture: str, train: Any, make_model: Any, tokenizer: Any, blocks: torch.Tensor, tmp_path: Path
) -> None:
    model = sharpened(make_model(architecture))
    cache = sparsekd.cache_teacher(model, tokenizer, blocks, tmp_path / "cache", top_k=8)
    student = sparsekd.compress(model, blocks, reduction=0.5, **MASK)
    with torch.no_grad():  # zeros by chance, in a matrix that nothing pruned
        attention = next(module for module in student.modules() if anatomy.is_attention(module))
        chance: Any = next(child for child in attention.children() if anatomy.is_linear(child)).weight
        chance[:3] = 0
    pruned, before = zeros(student), state(student)
    options = replace(OPTIONS, train=train, alpha=1.0, weight_decay=0.1, learning_rate=1e-3, epochs=4)
    history = distillation.train(student, data(blocks, cache, (0, 1, 2, 3)), options)
    assert history.best_step == len(history.steps) == 12
    assert history.validations[-1].kd < 0.8 * history.validations[0].kd
    assert equal(zeros(student), pruned)
    for name, weight in matrices(student).items():
        moved = linear_weight(student.get_submodule(name)) != linear_weight_of(before, name, student)
        assert torch.equal(moved, ~pruned[name]), name
        assert not weight[pruned[name]].signbit().any()  # not minus zero either: the bytes stay
    assert bool((chance[:3] != 0).all()) == (train == "all")
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    masked = {name for name in before if name.rpartition(".")[0] in pruned}
    assert changed == masked if train == "compressed" else changed > masked


def linear_weight_of(saved: dict[str, torch.Tensor], name: str, model: PreTrainedModel) -> torch.Tensor:
    """The saved matrix as output x input."""
    weight = saved[f"{name}.weight"]
    return weight if isinstance(model.get_submodule(name), torch.nn.Linear) else weight.T


def test_the_gradient_norm_is_that_of_the_kept_weights(new_masked: Any, blocks: torch.Tensor, cache: Cache) -> None:
    student = new_masked()
    pruned = zeros(student)
    options = replace(OPTIONS, micro_batch_size=4, epochs=1, validations=1)
    everything = data(blocks, cache)
    objective = distillation.Objective(copy.deepcopy(student), options, cache.vocab_size)
    ids = everything.order(0)[:4].tolist()
    batch = distillation.make_batch(everything, ids, objective.vocab_size)
    objective(batch, everything.num_positions(ids)).total.backward()
    total = 0.0
    for name, parameter in objective.student.named_parameters():
        zero, gradient = pruned.get(name.rpartition(".")[0]), parameter.grad
        assert gradient is not None
        total += float((gradient if zero is None else gradient[~zero]).square().sum())
    history = distillation.train(student, everything, options)
    assert history.steps[0].grad_norm == pytest.approx(total**0.5, rel=1e-4)


def test_moments_from_elsewhere_revive_no_zero(new_masked: Any) -> None:
    student = new_masked()
    pruned = models.forms.guard(student)
    before = zeros(student)
    optimizer = optimization.make_optimizer(student, OPTIONS)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # with the gradients of pruned weights in it
    assert not any(zero.any() for zero in zeros(student).values())
    pruned.restore()
    assert equal(zeros(student), before)


def test_a_resumed_training_gives_the_same_bytes(
    new_masked: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    straight, resumed = new_masked(), new_masked()
    pruned = zeros(straight)
    options = replace(OPTIONS, alpha=1.0, weight_decay=0.1, learning_rate=1e-3)
    history = distillation.train(straight, data(blocks, cache, (0, 1, 2, 3)), options)
    assert history.best_step == 6
    done: list[int] = []
    with pytest.raises(Stopped):
        distillation.train(
            new_masked(),
            data(blocks, cache, (0, 1, 2, 3)),
            options,
            folder=tmp_path,
            on_step=lambda step, _: done.append(step.step),
            stop_signal=lambda: 15 if done[-1] == 3 else None,
        )
    saved = load_file(tmp_path / "checkpoints/step-00000003/model.safetensors")
    moments = load_file(tmp_path / "checkpoints/step-00000003/optimizer.safetensors")
    for name, zero in pruned.items():
        assert torch.equal(saved[f"{name}.weight"] == 0, zero)
        assert torch.equal(moments[f"{name}.weight.exp_avg_sq"] == 0, zero)
    distillation.train(resumed, data(blocks, cache, (0, 1, 2, 3)), options, folder=tmp_path)
    assert equal(state(resumed), state(straight))


@pytest.mark.parametrize("is_split", [False, True])
def test_two_processes_keep_the_zeros(
    is_split: bool,
    new_masked: Any,
    tokenizer: Any,
    blocks: torch.Tensor,
    cache: Cache,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """DDP and FSDP2 over gloo, and a checkpoint of it resumed."""
    student = sparsekd.compress(new_masked(), blocks, reduction=0.9, **MASK)
    sparsekd.save(student, tokenizer, tmp_path / "student")
    np.save(tmp_path / "blocks.npy", blocks.numpy())
    training_processes.train(tmp_path, "one")
    if is_split:
        split_models(monkeypatch)
    run_processes("training_processes.py", str(tmp_path), "two", "stopped", count=2)
    one, two, stopped = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two", "stopped"))
    assert equal(two, stopped)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    start = student.state_dict()
    for name, zero in zeros(student).items():
        assert torch.equal(two[f"{name}.weight"] == 0, zero)
        assert not torch.equal(two[f"{name}.weight"], start[f"{name}.weight"])


def test_lora_is_refused(new_masked: Any, blocks: torch.Tensor, cache: Cache, tiny_recipe: Path) -> None:
    with pytest.raises(UsageError, match="lora: merged adapters would fill the zeros"):
        distillation.train(new_masked(), data(blocks, cache), replace(OPTIONS, train="lora"))
    masked = ("compress.method=wanda", "compress.format=mask")
    with pytest.raises(UsageError, match="lora: merged adapters would fill the zeros"):
        load_recipe(str(tiny_recipe), (*masked, "distill.train=lora"))
    load_recipe(str(tiny_recipe), masked)


def test_the_demo_takes_wanda() -> None:
    assert load_recipe("demo", ("compress.method=wanda",)).compress.method == "wanda"


def test_the_library_calls(teacher: PreTrainedModel, blocks: torch.Tensor, cache: Cache) -> None:
    student = sparsekd.compress(copy.deepcopy(teacher), blocks, reduction=0.5, method="wanda", format="mask")
    pruned, before = zeros(student), state(student)
    assert sparsekd.distill(student, blocks, cache, alpha=1.0, learning_rate=1e-3, epochs=2) is student
    assert not equal(state(student), before)
    assert equal(zeros(student), pruned)
