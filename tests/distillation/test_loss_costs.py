"""What a loss holds and works out, and models that it is fused with."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import D, N, V, case, cut, relative, targets_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from sparsekd.distillation.fused import linear_kd_loss
from sparsekd.distillation.losses import Mode, kd_loss

# ---- what is held and worked out


class Watched(TorchDispatchMode):
    """The shapes of all results while it is on, with the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.append((func.overloadpacket.__name__, tuple(result.shape)))
        return result


@pytest.mark.parametrize(("mode", "temperature"), [("bucket", 2.0), ("paper", 2.0), ("exact_t", 2.0), ("sampled", 1.0)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_more_than_a_chunk_of_logits_and_one_exponential(
    mode: Mode, temperature: float, softcap: float | None
) -> None:
    hidden, weight, labels, teacher = case()
    targets, h = targets_for(mode, teacher), hidden.requires_grad_()
    buffers = 1 + (mode == "exact_t") + (softcap is not None)
    with Watched() as watched:
        linear_kd_loss(
            h,
            weight,
            labels,
            targets,
            mode=mode,
            alpha=0.5,
            temperature=temperature,
            denominator=N,
            softcap=softcap,
            chunk_size=6 * buffers,
        )
    wide = [(name, shape) for name, shape in watched.seen if shape[-1:] == (V,) and shape[0] != D]  # not the weight
    assert {shape for _, shape in wide} == {(6, V), (4, V)}
    num_chunks = math.ceil(N / 6)
    assert sum(name.startswith("exp") for name, _ in wide) == num_chunks
    made = [name for name, _ in wide if not name.endswith("_")]  # all others work in place
    assert len(made) == num_chunks * buffers
    assert (V, D) not in [shape for name, shape in watched.seen if name not in {"slice", "detach", "t", "_to_copy"}]


def test_no_gradient_is_worked_out_where_none_is_asked_for() -> None:
    hidden, weight, labels, teacher = case()
    w = weight.requires_grad_()
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": N}
    targets = cut(teacher)
    expected = linear_kd_loss(hidden, w, labels, targets, **options).total.item()
    for without in (torch.no_grad(), torch.inference_mode()):
        with without, Watched() as watched:
            loss = linear_kd_loss(hidden, w, labels, targets, **options)
        assert loss.total.item() == expected
        assert not loss.total.requires_grad
        assert (V, D) not in [shape for name, shape in watched.seen if name in {"zeros_like", "addmm_"}]


def test_backward_multiplies_by_the_incoming_gradient_and_runs_once() -> None:
    hidden, weight, labels, teacher = case()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    targets = cut(teacher)
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": N}
    plain = torch.autograd.grad(linear_kd_loss(h, w, labels, targets, **options).total, (h, w))
    loss = linear_kd_loss(h, w, labels, targets, **options).total
    found = torch.autograd.grad(3 * loss, (h, w), retain_graph=True)
    for a, b in zip(found, plain, strict=True):
        assert torch.allclose(a, 3 * b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, (h, w))


# ---- models


def test_tied_and_frozen_embeddings(make_model: Callable[..., PreTrainedModel]) -> None:
    """The output weight's gradient joins the input embeddings'; a frozen one gets none."""
    model = make_model("llama", tie_word_embeddings=True)
    tokens = torch.arange(1, 31)[None]
    weight, labels = model.get_output_embeddings().weight, tokens[0, 1:]
    teacher = model(tokens).logits[0, :-1].detach() + torch.randn(29, len(weight), generator=torch.manual_seed(0))
    targets = cut(teacher)
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": 29}

    def gradients(fused: bool) -> dict[str, Tensor]:
        model.zero_grad()
        if fused:
            hidden = model.get_decoder()(tokens).last_hidden_state[0, :-1]
            linear_kd_loss(hidden, weight, labels, targets, **options).total.backward()
        else:
            kd_loss(model(tokens).logits[0, :-1], labels, targets, **options).total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for trains in (True, False):
        weight.requires_grad_(trains)
        ours, expected = gradients(True), gradients(False)
        assert ours.keys() == expected.keys()
        assert ("model.embed_tokens.weight" in ours) == trains
        assert all(relative(ours[name], expected[name].double()) < 1e-5 for name in ours)


def test_a_model_that_caps_its_logits(tokenizer: Any) -> None:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    tokens = torch.arange(1, 31)[None]
    logits = model(tokens).logits[0, :-1]
    assert float(logits.detach().abs().max()) > 1.5
    targets = cut(logits.flip(0))
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "denominator": 29}
    hidden = model.get_decoder()(tokens).last_hidden_state[0, :-1]
    fused = linear_kd_loss(hidden, model.lm_head.weight, tokens[0, 1:], targets, softcap=2.0, **options)
    reference = kd_loss(logits, tokens[0, 1:], targets, **options)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(loss.total, parameters) for loss in (fused, reference)), strict=True):
        assert relative(a, b.double()) < 1e-4
