"""Stage `compress`: the round's start to a smaller model and the plan of what was removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparsekd import compression, corpus, files
from sparsekd.compression import widths
from sparsekd.corpus import Corpus
from sparsekd.device import exact_products
from sparsekd.recipe import Compress, method_named
from sparsekd.run.reading import Summary, read_inputs
from sparsekd.run.rounds import Round
from sparsekd.run.settings import settings
from sparsekd.run.stages.cache import open_cache
from sparsekd.run.work import Work


def make(work: Work, round_: Round) -> Summary:
    """Stage `compress`: the round's start made smaller, in `compressed/model`."""
    options = round_.compress
    assert options is not None
    needs = [method_named(step.method).needs(step.options) for step in options.steps]
    is_probed = any(one.probe_tokens for one in needs)
    reads = next((one.reads for one in needs if one.reads), None)
    inputs = settings(work.recipe, round_)[str(round_.compressed)] | {
        "model": work.identity(round_.start),
        "corpus": work.blocks.fingerprint,
        "ranks": files.file_sha256(Path(reads)) if reads else None,
        "probed": read_inputs(work.run.folder / round_.cache) if is_probed else None,
    }
    stage = work.run.stage(str(round_.compressed), inputs)
    if stage.summary is not None:
        return stage.summary
    student, tokenizer = work.take(round_.start, torch.float32)  # what is solved from rounded weights is rounded twice
    # the probe asks what a cut does to the model as it is: its own distributions, cached if it is its own teacher
    has_top_k = work.recipe.distill.teacher == "cache" and work.recipe.cache.codec != "sampled"
    is_cached = has_top_k and list(round_.teachers) == [round_.start] and not options.first
    if options.offload:
        torch.nn.Module.to(student, "cpu")
    teacher = open_cache(work, round_, work.blocks.train_ids.tolist()) if is_probed and is_cached else None

    def calibration_for(step: Compress) -> compression.Calibration:
        return compression.Calibration(
            student,
            calibration_batches(work.blocks, step, round_.seed, round_.share),
            seed=round_.seed,
            device=work.placement.device,
            separator=work.blocks.separator,
            teacher=teacher,
            warn=work.run.console.warn,
        )

    with exact_products(work.recipe.model.dtype == "float32"):
        plan = compression.apply(student, calibration_for, options)
    work.save(student, tokenizer, stage)
    share = f"{plan.mlp_reduction:.1%} of the MLP parameters"
    removed = f"removed {share}, {plan.model_reduction:.1%} of the whole model"
    work.run.console.say(f"  set {share} to zero" if any(matrix.zeros for matrix in plan.matrices) else f"  {removed}")
    found = plan.as_dict()
    if plan.predicted_kl_by_allocation is not None:
        work.run.console.say(f"  {widths.compared(found, options.method, options.options.allocation)}")
    return stage.finish(found)


def calibration_batches(
    blocks: Corpus, options: Compress, seed: int, share: corpus.Share = corpus.ALL
) -> list[compression.Batch]:
    """Batches of equally long training blocks of the share, in the first epoch's order, enough for statistics and
    probe."""
    batches: list[list[int]] = [[]]
    total, wanted = 0, options.num_tokens + method_named(options.method).needs(options.options).probe_tokens
    for block_id in blocks.order(seed, 0, share).tolist():
        batch, length = batches[-1], len(blocks.blocks[block_id].tokens)
        if batch and (len(batch) == options.batch_size or length != len(blocks.blocks[batch[0]].tokens)):
            batches.append([])
        batches[-1].append(block_id)
        total += length
        if total >= wanted:
            break
    stacked = [np.stack(blocks.tokens(ids)).astype(np.int64) for ids in batches]
    return [compression.Batch(ids, torch.from_numpy(tokens)) for ids, tokens in zip(batches, stacked, strict=True)]
