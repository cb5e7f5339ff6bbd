"""Seconds and peak memory of the fused loss with its gradients, against autograd on full and on checkpointed logits.

    python benchmarks/loss_speed.py

The loss and the gradients for hidden states and output weight of 2,048 tokens, D 576, V 49,152, k 32, T 2 (the sizes
of SmolLM2-135M), in turns. `full` is how the field writes it: KL and `F.cross_entropy`, each of all logits, the tail as
1 - Q; `lean` is the least that autograd can do, one log-softmax for both; `reference` is `kd_loss`, which sums the tail
itself, as the fused loss does; `checkpointed` is `lean` by chunks of 256 whose logits are made again in the backward
pass, as TRL does; `fused_64` is the fused loss in chunks of 64 positions instead of its 256. Memory is the peak above
the inputs, a process for each. Seconds of the clock and of the processor: the second are less disturbed by what else
runs. Bars: at least 1.3 times as fast, with at most 1/15 of the memory.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _record import record, summary
from torch.utils.checkpoint import checkpoint

from sparsekd.distillation.fused import linear_kd_loss
from sparsekd.distillation.losses import kd_loss
from sparsekd.teacher import Targets

ROUNDS, N, D, V, K, CHUNK, ALPHA, TEMPERATURE = 3, 2048, 576, 49_152, 32, 256, 0.5, 2.0
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Targets]


def inputs(vocab_size: int = V) -> Inputs:
    """Made without anything as large as the logits, which the peak would show."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, D, generator=generator).mul_(0.05).requires_grad_()
    labels = torch.randint(0, vocab_size, (N,), generator=generator)
    ids = (labels[:, None] + 1 + 997 * torch.arange(K)) % vocab_size
    log_p = torch.randn(N, K + 1, generator=generator).log_softmax(-1)
    return hidden, weight, labels, Targets(ids, log_p[:, :K].clone(), log_p[:, K].clone(), torch.full((N,), 4.0))


def kd_sum(log_q: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The formula of mode `bucket`, written down directly."""
    log_q_kept = log_q.gather(-1, targets.ids)
    log_head, student_head = targets.log_probs.logsumexp(-1), log_q_kept.exp().sum(-1).clamp(max=1 - 1e-6)
    tail = targets.log_tail.exp() * (targets.log_tail - torch.log1p(-student_head))
    between = log_head.exp() * (log_head - student_head.log()) + tail
    soft_p = F.log_softmax(targets.log_probs / TEMPERATURE, -1)
    soft_q = F.log_softmax(log_q_kept / TEMPERATURE, -1)
    inside = log_head.exp() * TEMPERATURE**2 * (soft_p.exp() * (soft_p - soft_q)).sum(-1)
    return (between + inside).sum()


def full(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
    logits = hidden @ weight.T
    kd = kd_sum(F.log_softmax(logits, -1), targets) / N
    return ALPHA * kd + (1 - ALPHA) * F.cross_entropy(logits, labels)


def lean(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
    log_q = F.log_softmax(hidden @ weight.T, -1)
    return (ALPHA * kd_sum(log_q, targets) + (1 - ALPHA) * F.nll_loss(log_q, labels, reduction="sum")) / N


def checkpointed(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
    def of(rows: slice) -> torch.Tensor:
        some = Targets(*(value[rows] for value in targets))
        return lean(hidden[rows], weight, labels[rows], some)

    parts = [checkpoint(of, slice(start, start + CHUNK), use_reentrant=False) for start in range(0, N, CHUNK)]
    return torch.stack(parts).sum()  # each is divided by the tokens of all chunks


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
    return kd_loss(hidden @ weight.T, labels, targets, alpha=ALPHA, temperature=TEMPERATURE, denominator=N).total


def fused(*given: Any, chunk_size: int = CHUNK) -> torch.Tensor:
    settings = {"alpha": ALPHA, "temperature": TEMPERATURE, "denominator": N, "chunk_size": chunk_size}
    return linear_kd_loss(*given, **settings).total


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "fused": fused,
    "fused_64": functools.partial(fused, chunk_size=64),
    "full": full,
    "lean": lean,
    "reference": reference,
    "checkpointed": checkpointed,
}


def gradients(name: str, given: Inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(LOSSES[name](*given), given[:2])


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_peak(name: str) -> None:
    gradients(name, inputs(vocab_size=K * 4))  # loads what torch imports at first use
    given = inputs()
    before = status_mib("VmRSS")
    gradients(name, given)
    print(status_mib("VmHWM") - before)


def main() -> None:
    peaks = {}
    for name in LOSSES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        peaks[name] = float(done.stdout)
    given = inputs()
    for name in LOSSES:
        gradients(name, given)  # first calls are slower
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    taken: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in LOSSES} for clock in clocks}
    for _ in range(ROUNDS):
        for name in LOSSES:
            start = {clock: read() for clock, read in clocks.items()}
            gradients(name, given)
            for clock, read in clocks.items():
                taken[clock][name].append(read() - start[clock])
    ratios = {
        f"{name}_over_fused_{clock}": summary([a / b for a, b in zip(values, of["fused"], strict=True)])
        for clock, of in taken.items()
        for name, values in of.items()
        if name != "fused"
    }
    record(
        "loss_speed",
        {f"{name}_{clock}": summary(values) for clock, of in taken.items() for name, values in of.items()}
        | ratios
        | {f"{name}_peak_mib": round(peak, 1) for name, peak in peaks.items()}
        | {f"{name}_over_fused_memory": peaks[name] / peaks["fused"] for name in peaks if name != "fused"}
        | {"tokens": N, "rounds": ROUNDS},
    )


if __name__ == "__main__":
    print_peak(sys.argv[1]) if len(sys.argv) > 1 else main()
