"""Models in bfloat16 predict what their hidden states and a float32 product say, wherever logits are used."""

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from training import data
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from sparsekd import teacher as teacher_stage
from sparsekd.compression import batches_of, statistics
from sparsekd.compression.probe import Probe
from sparsekd.distillation import objective
from sparsekd.distillation.objective import make_batch
from sparsekd.evaluate.windows import predictions, split
from sparsekd.models.layerwise import Layers
from sparsekd.models.logits import logits_of, project
from sparsekd.recipe import Distill
from sparsekd.teacher import Online

CLOSE = {"rtol": 0, "atol": 1e-5}  # bfloat16's logits are wrong by 1e-2


@pytest.fixture
def low(teacher: PreTrainedModel) -> PreTrainedModel:
    return teacher.bfloat16()


def exact(model: PreTrainedModel, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of the model's own hidden states, with a float32 product."""
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
    return hidden.float() @ model.get_output_embeddings().weight.float().T


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    """A head that the fused loss does not know."""
    old: Any = model.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features, dtype=model.dtype)
    head.weight = old.weight
    torch.nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    return model


@torch.no_grad()
def test_the_teacher_caches_what_float32_products_say(low: PreTrainedModel, blocks: torch.Tensor) -> None:
    expected = exact(low, blocks)[:, :-1].log_softmax(-1)
    for found, log_p in zip(teacher_stage.distributions(low, blocks, top_k=8), expected, strict=True):
        assert torch.equal(found.ids[:, 0], log_p.argmax(-1))
        torch.testing.assert_close(found.log_probs, log_p.gather(-1, found.ids), **CLOSE)


def test_evaluation_sees_float32_logits(low: PreTrainedModel, blocks: torch.Tensor) -> None:
    ids = blocks.flatten()
    with torch.inference_mode():
        for window, log_probs, likeliest, _ in predictions(low, ids, split(len(ids), 64, 32), 2, 400):
            expected = exact(low, ids[None, window.start : window.end])[0, :-1]
            torch.testing.assert_close(log_probs, expected.log_softmax(-1), **CLOSE)
            assert torch.equal(likeliest, expected.argmax(-1))


def test_the_probe_finds_no_damage_in_a_whole_model(low: PreTrainedModel, blocks: torch.Tensor) -> None:
    """The teacher's distributions are exact, so noise of the model's own logits would count as damage."""

    class Exact:
        @torch.no_grad()
        def read(self, block_id: int, tokens: Any) -> Any:
            block = torch.from_numpy(tokens.astype("int64"))[None]
            return teacher_stage.top_k_distribution(exact(low, block)[0, :-1], 32)

    assert abs(Probe(low, batches_of(blocks[:4], 2), Exact()).of_all()) < 1e-6


def test_statistics_draw_labels_and_take_gradients_of_float32_logits(
    low: PreTrainedModel, blocks: torch.Tensor, monkeypatch: Any
) -> None:
    layers, inputs = Layers(low), {"input_ids": blocks[:1]}
    labels = statistics._drawn_with(3)(0, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    top = layers.record(lambda: low.get_decoder()(**inputs, use_cache=False))[-1]
    drawn = statistics._drawn

    def watched(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.extend([logits.softmax(-1), drawn(logits, generator)])
        return seen[-1]

    monkeypatch.setattr(statistics, "_drawn", watched)
    found = statistics._output_gradient(low, layers, inputs, top.clone(), 2, labels)[0].float()
    monkeypatch.undo()
    torch.testing.assert_close(seen[0], exact(low, blocks[:1])[0].softmax(-1), **CLOSE)
    leaf = top[0].float().requires_grad_()
    norm: Any = low.get_submodule("model.norm")
    logits = copy.deepcopy(norm).float()(leaf) @ low.get_output_embeddings().weight.float().T
    torch.nn.functional.cross_entropy(logits, seen[1], reduction="sum").backward()
    assert float((found - leaf.grad).norm() / leaf.grad.norm()) < 0.005  # it is rounded to bfloat16


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_the_loss_is_that_of_float32_logits(fused: bool, low: PreTrainedModel, blocks: torch.Tensor) -> None:
    model = low if fused else with_bias(low)
    bias = 0 if fused else model.get_output_embeddings().bias
    options = Distill(alpha=0.0, teacher="online", temperature=1.0)
    online = data(blocks, Online(model, 8))
    batch = make_batch(online, [0, 1], 400)
    measured = objective.Objective(model, options, 400)
    assert measured._head.fused == fused
    outcome = measured(batch, 2 * 23)
    expected = torch.nn.functional.cross_entropy(
        (exact(model, blocks[:2]) + bias)[:, :-1].flatten(0, 1), blocks[:2, 1:].flatten()
    )
    assert float(outcome.ce) == pytest.approx(float(expected), abs=2e-6)
    assert abs(float(outcome.kd)) < 1e-6
    assert int(outcome.agreeing) == 2 * 23


def test_labels_are_drawn_from_the_distribution_itself() -> None:
    """A token without probability never, the others as often as it says."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    labels = statistics._drawn(p.log().expand(20_000, -1), torch.Generator().manual_seed(0))
    found = torch.bincount(labels, minlength=6) / len(labels)
    assert found[[0, 2, 5]].tolist() == [0, 0, 0]
    torch.testing.assert_close(found, p, rtol=0, atol=0.015)  # four standard errors


@pytest.mark.usefixtures("processor_with_bfloat16")
def test_training_with_bfloat16_products_has_float32_logits(teacher: PreTrainedModel, blocks: torch.Tensor) -> None:
    """The weights are float32, autocast makes the factors bfloat16; the head has a bias, so logits are taken whole."""
    model = with_bias(teacher)
    batch = make_batch(data(blocks, Online(model, 8)), [0, 1], 400)
    outcome = objective.Objective(model, Distill(alpha=0.0), 400, bfloat16=True)(batch, 2 * 23)
    outcome.total.backward()
    head: Any = model.get_output_embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.get_decoder()(input_ids=blocks[:2], use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    leaf = hidden.detach().bfloat16().float()
    weight = head.weight.detach().bfloat16().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf @ weight.T + head.bias.detach(), blocks[:2, 1:].flatten())
    expected.backward()
    # without AMX oneDNN does not round the head's factors; bfloat16 logits would be 1e-3 off
    assert float(outcome.ce) == pytest.approx(expected.item(), abs=1e-4)
    # hidden states are rounded in the product only, not in the gradient
    assert float((head.weight.grad - weight.grad).norm() / weight.grad.norm()) < 0.005


def test_products_of_any_format_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden, matrix = torch.randn(7, 96), torch.randn(9000, 96)  # more rows than are made float32 at once
    for dtype in (torch.float32, torch.bfloat16):
        h, m = hidden.to(dtype, copy=True).requires_grad_(), matrix.to(dtype, copy=True).requires_grad_()
        found, expected_logits = project(h, m), (h.float() @ m.float().T).detach()
        torch.testing.assert_close(found, expected_logits, rtol=0, atol=1e-4)
        found.square().sum().backward()
        for leaf, other, upstream in ((h, m, 2 * expected_logits), (m, h, 2 * expected_logits.T)):
            expected = upstream @ other.float()
            error = (leaf.grad.float() - expected).norm() / expected.norm()
            assert leaf.grad.dtype == dtype and error < 3 * torch.finfo(dtype).eps


def test_a_float32_model_is_left_alone(teacher: PreTrainedModel, blocks: torch.Tensor) -> None:
    head: Any = teacher.get_output_embeddings()
    seen = []
    head.register_forward_hook(lambda module, *_: seen.append("forward" in module.__dict__))
    assert torch.equal(logits_of(teacher, input_ids=blocks), teacher(blocks, use_cache=False).logits)
    assert seen == [False, False]


@torch.no_grad()
def test_the_models_own_cap_is_in_float32(blocks: torch.Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=400, **sizes, num_key_value_heads=2, head_dim=16, final_logit_softcapping=5.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.get_output_embeddings().weight.mul_(20)
    model.bfloat16()
    torch.testing.assert_close(logits_of(model, input_ids=blocks), 5 * (exact(model, blocks) / 5).tanh(), **CLOSE)
    assert objective.find_head(model).fused


@torch.no_grad()
def test_an_offloading_hook_still_brings_the_weights(low: PreTrainedModel, blocks: torch.Tensor) -> None:
    expected = exact(low, blocks)
    head: Any = low.get_output_embeddings()
    weights = {"weight": head.weight.data}
    add_hook_to_module(head, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
    assert head.weight.device.type == "meta"
    for _ in range(2):
        torch.testing.assert_close(logits_of(low, input_ids=blocks), expected, **CLOSE)
    assert head.weight.device.type == "meta" and "_old_forward" in head.__dict__
