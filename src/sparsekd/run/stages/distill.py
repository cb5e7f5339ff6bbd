"""Stage `distill`: the smaller model and the teacher to the trained model and its curves."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import numpy as np
import torch

from sparsekd import distillation, files, models, teacher
from sparsekd.distillation import Teacher
from sparsekd.run.reading import Inputs, Summary, read_inputs
from sparsekd.run.rounds import Round
from sparsekd.run.settings import settings
from sparsekd.run.signals import stop_signals
from sparsekd.run.stages.cache import open_cache, open_teacher
from sparsekd.run.work import Loaded, Work


def make(work: Work, round_: Round) -> Summary:
    """Stage `distill`: the round's student trained to match its teacher, in `distilled/model`."""
    blocks, run = work.blocks, work.run
    stage = run.stage(str(round_.distilled), inputs_of(work, round_))
    if stage.summary is not None:
        return stage.summary
    data = data_of(work, round_, functools.partial(blocks.order, round_.seed, share=round_.share))
    dense_ce = distillation.measure(work.open(work.dense)[0], data, round_.distill).ce
    work.release()  # room for the student; the evaluation reads it again
    student, tokenizer = student_of(work, round_)
    num_tokens = sum(len(tokens) for tokens in blocks.tokens(data.order(0).tolist())) * round_.distill.epochs
    with run.console.bar("training", num_tokens) as bar, stop_signals() as received:
        trained = 0

        def on_step(step: distillation.Step, num_steps: int) -> None:
            nonlocal trained
            speed = (step.num_tokens - trained) / max(step.seconds, 1e-9) if trained else 0.0
            note = f"step {step.step}/{num_steps}  loss {step.loss:.3f}  " + (f"{speed:.0f} tokens/s" if speed else "")
            bar.advance(step.num_tokens - trained, note)
            trained = step.num_tokens

        history = distillation.train(
            student,
            data,
            round_.distill,
            folder=stage.folder,
            dense_ce=dense_ce,
            on_step=on_step,
            on_validation=lambda v: run.console.say(
                f"  validation after step {v.step}: loss {v.loss:.3f}, KD {v.kd:.3f}, cross-entropy {v.ce:.3f}, "
                f"agreement {v.agreement:.1%}"
            ),
            say=run.console.say,
            stop_signal=lambda: received[0] if received else None,
        )
    run.console.say(f"  {history.stop_reason}; weights after step {history.best_step} kept")
    work.save(work.gathered(student, round_.student), tokenizer, stage)
    if run.processes.is_main:
        files.remove(stage.folder / "checkpoints")
    return stage.finish(history.as_dict())


def inputs_of(work: Work, round_: Round) -> Inputs:
    """What a round's training is made from."""
    return settings(work.recipe, round_)[str(round_.distilled)] | {
        "start": work.identity(round_.student),
        "teacher": read_inputs(work.run.folder / round_.cache),
    }


def student_of(work: Work, round_: Round) -> Loaded:
    """The round's student before its training; fresh weights are others in each generation and round."""
    student, tokenizer = work.take(round_.student, torch.float32)
    if round_.distill.start == "fresh":
        models.initialise(student, zlib.crc32(f"{round_.seed} {round_.name}".encode()))
    return student, tokenizer


def data_of(work: Work, round_: Round, order: Callable[[int], np.ndarray]) -> distillation.Data:
    """What a round trains on, in the order that is given, and who teaches it."""
    blocks = work.blocks
    return distillation.Data(
        [block.tokens for block in blocks.blocks],
        order,
        blocks.validation_ids.tolist(),
        _teacher(work, round_),
        [block.source for block in blocks.blocks],
        blocks.separator,
    )


def _teacher(work: Work, round_: Round) -> Teacher:
    blocks = work.blocks
    if work.recipe.distill.teacher == "cache":
        return open_cache(work, round_, {*blocks.train_ids.tolist(), *blocks.validation_ids.tolist()})
    model, _, vocab_size = open_teacher(work, round_)
    return teacher.Online(model, work.recipe.cache.top_k, vocab_size, blocks.separator)
