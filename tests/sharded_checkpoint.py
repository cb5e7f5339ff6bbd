"""What each process of `test_weights_split_over_processes_come_back` runs: FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sparsekd.distillation.checkpoint import Checkpoints, on_host, trained

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 5))
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), 1e-2, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(10.0).view(2, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


is_main = dist.get_rank() == 0
checkpoints = Checkpoints(Path(sys.argv[1]) if is_main else Path("nowhere"), is_main)
model, optimizer = sharded(seed=0)
step(model, optimizer)
checkpoints.keep_best(model, 0)
checkpoints.save(model, optimizer, {"step": 1, "best_step": 0})
dist.barrier()
other, other_optimizer = sharded(seed=1)
state = checkpoints.restore(other, other_optimizer, print)
assert state is not None
assert state["step"] == 1
assert all(isinstance(parameter, DTensor) for parameter in other.parameters())
for pair in ((model, optimizer), (other, other_optimizer)):
    step(*pair)  # the second step is equal only if weights and moments are
expected = on_host(trained(model))
assert all(torch.equal(value, expected[name]) for name, value in on_host(trained(other)).items())
dist.destroy_process_group()
