"""Checkpoints: whole, hashed, two of them, and a damaged one is passed over."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_processes
from safetensors.torch import load_file
from training import OPTIONS, data, equal, state

from sparsekd import distillation
from sparsekd.distillation.checkpoint import Checkpoints, verify
from sparsekd.errors import DataError, Stopped
from sparsekd.teacher import Cache

EVERY_STEP = replace(OPTIONS, checkpoint_minutes=0.0)


def train_until(step: int, student: Any, blocks: torch.Tensor, cache: Cache, folder: Path) -> None:
    done: list[int] = []
    with pytest.raises(Stopped):
        distillation.train(
            student,
            data(blocks, cache),
            EVERY_STEP,
            folder=folder,
            on_step=lambda step, _: done.append(step.step),
            stop_signal=lambda: 15 if done[-1] == step else None,
        )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_two_are_kept_as_plain_safetensors(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    train_until(5, new_student(), blocks, cache, tmp_path)
    folder = tmp_path / "checkpoints"
    checkpoints = sorted(path.name for path in folder.glob("step-*"))
    assert checkpoints == ["step-00000004", "step-00000005"]
    names = {path.name for path in (folder / "step-00000005").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}
    trained = dict(new_student().named_parameters())
    assert load_file(folder / "step-00000005/model.safetensors").keys() == trained.keys()
    assert {"exp_avg", "exp_avg_sq", "step"} == {
        name.rpartition(".")[2] for name in load_file(folder / "step-00000005/optimizer.safetensors")
    }
    assert len(list(folder.glob("best-*"))) == 1  # the last validation was the best: no other is needed


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_damaged_one_falls_back_to_the_one_before(
    name: str, harm: Any, new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    straight = new_student()
    distillation.train(straight, data(blocks, cache), OPTIONS)
    train_until(3, new_student(), blocks, cache, tmp_path)
    harm(tmp_path / "checkpoints/step-00000003" / name)
    said: list[str] = []
    steps: list[int] = []
    resumed = new_student()
    distillation.train(
        resumed,
        data(blocks, cache),
        OPTIONS,
        folder=tmp_path,
        say=said.append,
        on_step=lambda step, _: steps.append(step.step),
    )
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert f"step-00000003/{name}" in said[0]
    assert steps == [3, 4, 5, 6]
    assert equal(state(resumed), state(straight))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=1) + "\n")


def swap(path: Path) -> None:
    """With the other checkpoint's, whole as it is."""
    folder = path.parent
    other = folder.with_name("step-00000002")
    for one, two in ((folder, folder.with_name("aside")), (other, folder), (folder.with_name("aside"), other)):
        one.rename(two)


@pytest.mark.parametrize("harm", [functools.partial(edit, step=5), functools.partial(edit, best_step=1), swap])
def test_a_state_that_was_not_written_so_skips_no_step(
    harm: Any, new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    straight = new_student()
    distillation.train(straight, data(blocks, cache), OPTIONS)
    train_until(3, new_student(), blocks, cache, tmp_path)
    harm(tmp_path / "checkpoints/step-00000003/state.json")
    said: list[str] = []
    resumed = new_student()
    try:
        distillation.train(resumed, data(blocks, cache), OPTIONS, folder=tmp_path, say=said.append)
    except DataError:
        assert harm is swap  # then both of them are not what they should be
    else:
        assert equal(state(resumed), state(straight))
    assert "step-00000003/state.json is " in said[0]


def test_best_weights_that_are_damaged_lead_back_to_a_checkpoint_that_does_not_need_them(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    train_until(4, new_student(), blocks, cache, tmp_path)
    folder = tmp_path / "checkpoints"
    best = [json.loads((folder / f"step-0000000{n}/state.json").read_text())["best_step"] for n in (3, 4)]
    assert best == [0, 4]
    flip(folder / "best-00000004/model.safetensors")
    said: list[str] = []
    steps: list[int] = []
    distillation.train(
        new_student(),
        data(blocks, cache),
        OPTIONS,
        folder=tmp_path,
        say=said.append,
        on_step=lambda step, _: steps.append(step.step),
    )
    assert "best-00000004/model.safetensors is damaged" in said[0]
    assert steps == [4, 5, 6]


def test_when_all_are_damaged_the_training_is_not_started_again_in_silence(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    train_until(3, new_student(), blocks, cache, tmp_path)
    for path in (tmp_path / "checkpoints").glob("step-*/model.safetensors"):
        flip(path)
    way_out = f"no whole checkpoint is left; remove {tmp_path / 'checkpoints'} to start this training again"
    with pytest.raises(DataError, match=rf"step-00000002/model\.safetensors is damaged.*{way_out}$"):
        distillation.train(new_student(), data(blocks, cache), OPTIONS, folder=tmp_path)


def test_damaged_best_weights_are_noticed(new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path) -> None:
    train_until(3, new_student(), blocks, cache, tmp_path)
    for path in (tmp_path / "checkpoints").glob("best-*/model.safetensors"):
        flip(path)
    way_out = f"remove {tmp_path / 'checkpoints'} to start this training again"
    with pytest.raises(DataError, match=rf"best-0000000\d/model\.safetensors is damaged.*{way_out}$"):
        distillation.train(new_student(), data(blocks, cache), OPTIONS, folder=tmp_path)


@pytest.mark.parametrize("where", ["micro batch", "after the step"])
def test_killed_at_any_place_it_ends_with_the_same_bytes(
    where: str, new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    """What SIGKILL leaves: in the middle of an accumulation, the gradients of half a step are simply lost."""
    straight = new_student()
    distillation.train(straight, data(blocks, cache), OPTIONS)

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    killed = new_student()
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if where == "micro batch" and passes == 2 * 3:  # the second micro batch of the third step
            die()

    killed.model.embed_tokens.register_forward_hook(count)
    with pytest.raises(Killed):
        distillation.train(
            killed,
            data(blocks, cache),
            EVERY_STEP,
            folder=tmp_path,
            on_step=lambda step, n: die() if step.step == 3 else None,
        )
    resumed, steps = new_student(), []
    distillation.train(
        resumed, data(blocks, cache), OPTIONS, folder=tmp_path, on_step=lambda step, _: steps.append(step.step)
    )
    assert steps == [3, 4, 5, 6]
    assert equal(state(resumed), state(straight))


def test_a_signal_inside_an_accumulation_is_answered_after_the_step(
    new_student: Any, blocks: torch.Tensor, cache: Cache, tmp_path: Path
) -> None:
    """A step is short, its gradients as large as the model: the step is finished, nothing of it is written."""
    straight = new_student()
    distillation.train(straight, data(blocks, cache), OPTIONS)
    signalled, received, passes = new_student(), [], 0

    def send(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == 3:  # the first of two micro batches of the second step
            received.append(15)

    signalled.model.embed_tokens.register_forward_hook(send)
    with pytest.raises(Stopped, match="stopped by signal 15 after step 2 of 6"):
        distillation.train(
            signalled,
            data(blocks, cache),
            OPTIONS,
            folder=tmp_path,
            stop_signal=lambda: received[0] if received else None,
        )
    assert passes == 4
    resumed = new_student()
    distillation.train(resumed, data(blocks, cache), OPTIONS, folder=tmp_path)
    assert equal(state(resumed), state(straight))


def test_weights_split_over_processes_come_back(tmp_path: Path) -> None:
    """FSDP's parts of parameters and moments, on two gloo processes, then four, one and two: each writes its own, and
    any number reads them."""
    for number, count in enumerate((2, 4, 1, 2), start=1):
        run_processes("sharded_checkpoint.py", str(tmp_path), str(number), count=count)
        files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(f"step-{number:08}/**/*.safetensors")]
        assert len(files) == (2 if count == 1 else 2 * count), files
    verify(tmp_path)
    with pytest.raises(DataError, match=r"step-00000004/model is of another model: weight is missing there and"):
        other = torch.nn.Linear(3, 2)
        Checkpoints(tmp_path).restore(other, torch.optim.AdamW(other.parameters()), print)
    flip(next((tmp_path / "step-00000004/optimizer").iterdir()))
    with pytest.raises(DataError, match=r"step-00000004/optimizer/shard-0000\d.*safetensors is damaged or missing"):
        verify(tmp_path)


def test_processes_need_no_shared_folder(tmp_path: Path) -> None:
    """As on two machines: what the main process reads, or that it is damaged, is known to the other as well."""
    run_processes("separate_folders.py", str(tmp_path), count=2)


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_copies_to_the_host(is_main: bool, tmp_path: Path, monkeypatch: Any) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    copies: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or tensor)
    checkpoints = Checkpoints(tmp_path, is_main)
    checkpoints.keep_best(model, 0)
    checkpoints.save(model, optimizer, {"step": 1, "best_step": 0})
    assert len(copies) == is_main * (2 + 2 + 2 * 3)  # weights twice, and three moments of each
    assert bool(list(tmp_path.iterdir())) == is_main
