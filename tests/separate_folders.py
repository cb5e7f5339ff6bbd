"""What each process of `test_processes_need_no_shared_folder` runs: FOLDER, which the second one is not told of."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sparsekd.distillation.checkpoint import Checkpoints
from sparsekd.distillation.optimizer import allocate
from sparsekd.errors import DataError

dist.init_process_group("gloo")
is_main = dist.get_rank() == 0
folder = Path(sys.argv[1]) if is_main else Path("nowhere")


def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    allocate(optimizer, gradients=False)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.weight.detach().clone()


def harm(number: int) -> None:
    """Done by the main process, while the others wait at the next collective."""
    if is_main:
        (folder / f"step-{number:08d}/optimizer.safetensors").unlink()


def refused(message: str) -> None:
    try:
        checkpoints.restore(*made(seed=8), say=said.append)
    except DataError as error:
        assert message in str(error), error
    else:
        raise AssertionError("damage went unnoticed")


checkpoints, said = Checkpoints(folder, is_main), []
model, optimizer = made(seed=0)
assert checkpoints.restore(model, optimizer, said.append) is None
checkpoints.keep_best(model, 0)
best = model.weight.detach().clone()
weights = []
for number in (1, 2):
    weights.append(step(model, optimizer))
    checkpoints.save(model, optimizer, {"step": number, "best_step": 0})

other, other_optimizer = made(seed=dist.get_rank() + 1)
assert checkpoints.restore(other, other_optimizer, said.append)["step"] == 2
assert torch.equal(other.weight, weights[1])
assert torch.equal(step(other, other_optimizer), step(model, optimizer))  # only if the moments are equal
checkpoints.load_best(other, 0)
assert torch.equal(other.weight, best)

harm(2)
assert checkpoints.restore(other, other_optimizer, said.append)["step"] == 1
assert torch.equal(other.weight, weights[0])
assert len(said) == is_main
harm(1)
refused("no whole checkpoint is left")
if is_main:
    (folder / "best-00000000/model.safetensors").unlink()
try:
    checkpoints.load_best(other, 0)
except DataError as error:
    assert "best-00000000/model.safetensors is damaged or missing" in str(error)
else:
    raise AssertionError("damage went unnoticed")
dist.destroy_process_group()
