"""Which parameters train, at which rate, and what training changes about a model besides its weights.

Parameters fall into four groups by structure, never by name: attention, norms, embeddings (with the output
projection), and the rest, which is the MLP matrices, dense or low-rank.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsekd.errors import ResourceError, UsageError
from sparsekd.models import find_layers, forms, is_attention, is_linear, replace_module
from sparsekd.recipe import LORA_FILLS_ZEROS, Distill, RateScale


@contextmanager
def prepared(student: PreTrainedModel, options: Distill) -> Iterator[None]:
    """The student made ready: what does not train is frozen, dropout is off, adapters and checkpointing are on.

    Undone at the end: adapters are merged into the weights, the rest is as it was. Raises `UsageError` when nothing is
    left to train or adapters would fill a masked model's zeros, `ResourceError` when peft is missing.
    """
    if options.train == "lora" and forms.guard(student) is not None:
        raise UsageError(LORA_FILLS_ZEROS)
    layers = find_layers(student) if options.gradient_checkpointing else []  # adapters would hide the MLPs' shapes
    was_trainable = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    student.eval()  # no dropout: the teacher's distributions were made without, and a resumed run repeats its numbers
    try:
        if options.train == "lora":
            _add_adapters(student, options.lora_rank)
        else:
            _freeze(student, options)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UsageError(
                f"distill.train is {options.train}: the student has nothing of that kind to train; compress it first, "
                "or set distill.train=all"
            )
        with _activation_checkpointing(layers):
            yield
    finally:
        _merge_adapters(student)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(was_trainable[name])


@contextmanager
def _activation_checkpointing(layers: list[nn.Module]) -> Iterator[None]:
    """Each decoder layer keeps its input only. Unlike transformers' own, it works with dropout off."""
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _freeze(student: PreTrainedModel, options: Distill) -> None:
    compressed = {
        id(parameter) for name in forms.trained(student) for parameter in student.get_submodule(name).parameters()
    }
    scales = rate_scales(student, options.lr_scale)
    for name, parameter in student.named_parameters():
        wanted = options.train == "all" or id(parameter) in compressed
        parameter.requires_grad_(wanted and scales[name] > 0)


def rate_scales(student: PreTrainedModel, scale: RateScale) -> dict[str, float]:
    """The learning rate of each parameter, by name, as a multiple of that of the MLP matrices."""
    ends = {id(student.get_input_embeddings()), id(student.get_output_embeddings())}
    scales: dict[str, float] = {}
    for name, _ in student.named_parameters():
        owners = [student.get_submodule(".".join(name.split(".")[:depth])) for depth in range(1, name.count(".") + 1)]
        owner, is_vector = owners[-1], student.get_parameter(name).ndim == 1
        if id(owner) in ends or isinstance(owner, nn.Embedding):
            scales[name] = scale.embeddings
        elif is_vector and not is_linear(owner):
            scales[name] = scale.norms
        else:
            scales[name] = scale.attention if any(is_attention(module) for module in owners) else 1.0
    return scales


def make_optimizer(student: PreTrainedModel, options: Distill) -> torch.optim.AdamW:
    """AdamW over what trains, a group for each learning rate; the group's `scale` multiplies the rate of the step."""
    scales = rate_scales(student, options.lr_scale)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(scales[name], []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "scale": scale} for scale, members in groups.items()],
        options.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=options.weight_decay,
        fused=True,  # one pass over the weights and no temporaries, on a CPU as well
    )


@torch.no_grad()
def allocate(optimizer: torch.optim.Optimizer, *, gradients: bool) -> None:
    """Makes AdamW's moments, and zero gradients where they are to be kept, before the first pass and not in it.

    What lasts as long as the training would otherwise lie between the pieces that the first pass's activations leave
    when they are freed, and the C library could not use these for the next pass's again.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": step, **moments}
        if gradients:
            parameter.grad = torch.zeros_like(parameter)


def schedule(step: int, num_steps: int, options: Distill) -> float:
    """The rate of a step, as a part of the peak: linear warm-up, then half a cosine to a tenth, or a line that is zero
    after the last step (Bergsma et al., arXiv 2502.15938)."""
    warmup = round(num_steps * options.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if options.schedule == "linear":
        return 1 - progress
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _add_adapters(student: PreTrainedModel, rank: int) -> None:
    """Freezes the student and puts LoRA (Hu et al., arXiv 2106.09685) beside every linear layer but the output."""
    try:
        import peft
    except ImportError:
        raise ResourceError('distill.train is lora, which needs peft: pip install "sparsekd[lora]"') from None
    head = student.get_output_embeddings()
    names = [
        name for name, module in student.named_modules() if type(module) in (nn.Linear, Conv1D) and module is not head
    ]
    settings: Any = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)  # of the adapters' start, half of which is random
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")  # GPT-2's layers: peft sees to it
        peft.inject_adapter_in_model(settings, student)


def _merge_adapters(student: PreTrainedModel) -> None:
    for name, module in list(student.named_modules()):
        if hasattr(module, "get_base_layer"):
            adapter: Any = module
            adapter.merge()
            replace_module(student, name, adapter.get_base_layer())
