"""What each process of `test_weights_split_over_processes_come_back` runs: FOLDER STEP. It restores the step before, of
as many processes as there were, makes this one, and saves it; a single process splits nothing."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sparsekd.distillation.checkpoint import Checkpoints, on_host, trained
from sparsekd.distillation.optimizer import allocate

folder, last = Path(sys.argv[1]), int(sys.argv[2])
count = int(os.environ["WORLD_SIZE"])
if count > 1:
    dist.init_process_group("gloo")
is_main = os.environ["RANK"] == "0"


def made(seed: int, is_split: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 5))  # of four processes, the last has none of five rows
    if is_split:
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (count,)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    allocate(optimizer, gradients=False)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(10.0).view(2, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


checkpoints = Checkpoints(folder if is_main or count > 1 else Path("nowhere"), is_main)
model, optimizer = made(seed=0 if last == 1 else 1, is_split=count > 1)
if last > 1:
    state = checkpoints.restore(model, optimizer, print)
    assert state is not None
    assert state["step"] == last - 1
step(model, optimizer)
checkpoints.keep_best(model, last)
checkpoints.save(model, optimizer, {"step": last, "best_step": last})
assert all(isinstance(parameter, DTensor) == (count > 1) for parameter in model.parameters())
straight = made(seed=0, is_split=False)
for _ in range(last):  # equal only if weights and moments came back
    step(*straight)
for name, value in on_host(trained(model)).items():
    torch.testing.assert_close(value, trained(straight[0])[name].detach())
checkpoints.load_best(model, last)
if count > 1:
    dist.destroy_process_group()
