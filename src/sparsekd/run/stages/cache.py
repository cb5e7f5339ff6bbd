"""Stage `cache`: the teacher and the blocks to the distributions that are learned."""

from __future__ import annotations

from collections.abc import Iterable

from sparsekd import models, teacher
from sparsekd.corpus import ALL, Corpus, Share
from sparsekd.run.reading import Summary, read_summary
from sparsekd.run.rounds import Round
from sparsekd.run.settings import settings
from sparsekd.run.stage import Stage
from sparsekd.run.work import Work
from sparsekd.teacher import Cache, TeacherModel


def make(work: Work, round_: Round, share: Share = ALL) -> Summary:
    """Stage `cache`: the teacher's distributions of all training and validation blocks, or one `share` of them."""
    options, blocks, processes = work.recipe.cache, work.blocks, work.run.processes
    stage = stage_of(work, round_)
    if work.recipe.distill.teacher == "online":  # an empty stage, so that later ones find its inputs
        return stage.summary or stage.finish({"blocks": 0, "tokens": 0, "top_k": options.top_k, "bytes": 0})
    if stage.summary is not None and teacher.is_cached(stage.folder):  # else a shard was removed: it is made again
        return stage.summary
    together = processes.count > 1
    if together:
        share = Share(processes.rank + 1, processes.count)
        processes.main_first(lambda: teacher.forget_shares(stage.folder))
    by_id = {block_id: block.tokens for block_id, block in enumerate(blocks.blocks)}
    num_tokens = sum(len(tokens) for tokens in by_id.values()) // share.count
    model, tokenizer_hash, vocab_size = open_teacher(work, round_)
    with (
        work.run.console.bar("caching", num_tokens) as bar,
        work.shared(teacher.members(model)),
        work.placement.products(),
    ):
        cache = teacher.fill(
            model,
            stage.folder,
            by_id,
            tokenizer_hash=tokenizer_hash,
            corpus_fingerprint=blocks.fingerprint,
            codec=options.codec,
            top_k=options.top_k,
            vocab_size=vocab_size,
            seed=work.recipe.seed,
            blocks_per_shard=options.blocks_per_shard,
            batch_size=options.batch_size,
            share=share,
            separator=blocks.separator,
            on_tokens=lambda count: bar.advance(count, f"{num_tokens} tokens"),
            say=work.run.console.say,
        )
    if together:
        processes.wait()
        cache = processes.main_first(lambda: teacher.merge_shares(stage.folder, by_id))
    return {"part": str(share)} if cache is None else stage.finish(summary_of(cache, blocks))


def stage_of(work: Work, round_: Round) -> Stage:
    """The round's stage `cache` and what it is made from: who teaches, and unless it answers online what is cached."""
    taught_by = [work.identity(where) | {"weight": weight} for where, weight in round_.teachers.items()]
    asked = settings(work.recipe, round_)[round_.cache]
    return work.run.stage(
        round_.cache, {"teachers": taught_by, "dtype": work.dtype, "corpus": work.blocks.fingerprint} | asked
    )


def summary_of(cache: Cache, blocks: Corpus) -> Summary:
    """What a finished cache comes to: sizes, and the identity that whoever opens it insists on."""
    num_tokens = sum(len(block.tokens) for block in blocks.blocks)
    facts = {"blocks": len(blocks.blocks), "tokens": num_tokens, "top_k": cache.top_k, "bytes": cache.num_bytes}
    return facts | {"identity": cache.identity}


def open_teacher(work: Work, round_: Round) -> tuple[TeacherModel, str, int]:
    """The teacher as one model, mixed where there are several; the hash of its tokenizer; the tokens all know."""
    opened = {where: work.open(where) for where in round_.teachers}
    for where, (_, tokenizer) in opened.items():
        if isinstance(where, str):  # the run's own models have the dense one's
            models.require_same_tokenizer(tokenizer, work.open(work.dense)[1], where, work.dense)
    tokenizer_hash = models.tokenizer_hash(next(iter(opened.values()))[1])
    vocab_size = min(models.real_vocab_size(model, tokenizer) for model, tokenizer in opened.values())
    if len(opened) == 1:
        return next(iter(opened.values()))[0], tokenizer_hash, vocab_size
    weights, mean = list(round_.teachers.values()), work.recipe.teacher.mixture
    mixed = teacher.Mixture([model for model, _ in opened.values()], weights, mean)
    return mixed, tokenizer_hash, vocab_size


def open_cache(work: Work, round_: Round, needed: Iterable[int]) -> Cache:
    """The finished cache of this round and no other, if it covers the blocks that are `needed`."""
    folder = work.run.folder / round_.cache
    summary = read_summary(folder, ("identity",))
    assert summary is not None, "it was made before"
    cache = Cache(folder, summary["identity"])
    cache.require(needed)
    return cache
