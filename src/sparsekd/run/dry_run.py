"""What a run will do before it does it: parameters, bytes, memory, time. Reads the model's config, not its weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedModel

from sparsekd import compression, models
from sparsekd.corpus import Share
from sparsekd.device import measured_flops, place
from sparsekd.evaluate import continuations
from sparsekd.recipe import Compress, Recipe, as_dict, method_named
from sparsekd.records import Record
from sparsekd.run.rounds import Round, planned
from sparsekd.teacher import CODECS, codec_for

# Shares of the speed of a large matrix product, from SmolLM2-135M on 2 cores; elsewhere the estimate is coarser.
_FORWARD_EFFICIENCY = 0.75
_SOLVER_EFFICIENCY = 0.06
_RUNTIME_BYTES = 0.7e9  # Python, torch and the other libraries


@dataclass(frozen=True)
class _Sizes:
    parameters: int
    multiplied: int  # parameters that a token is multiplied with: all but the embedding table's look-up
    hidden: int
    layers: int
    vocab: int
    widest: int
    neurons: int  # of the widest MLP


@dataclass(frozen=True)
class CacheSize:
    """Of one codec, before zstd."""

    bytes_per_token: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a recipe's rounds will come to."""

    recipe: Recipe
    device: str
    dtype: str
    compression: compression.Plan  # of the largest reduction
    cache_tokens: int  # of one cache
    cache: dict[str, CacheSize]  # by codec
    model_bytes: int
    peak_memory_bytes: float
    seconds: dict[str, float]  # by stage, of all rounds together
    seconds_per_token: float  # of the dense model's forward pass

    def as_dict(self) -> Record:
        """Plain values for JSON, in the order of the fields."""
        cache = {codec: asdict(size) for codec, size in self.cache.items()}
        plain = {"recipe": as_dict(self.recipe), "compression": self.compression.as_dict(), "cache": cache}
        return vars(self) | plain


def estimate(recipe: Recipe, rounds: Sequence[Round] | None = None, num_trials: int = 0) -> Estimate:
    """Parameters of each matrix before and after the largest reduction, bytes of one cache, peak memory, and seconds a
    stage of all rounds together.

    `rounds` are by default those of the recipe's run; `num_trials` of a learning rate come on top of their training.
    """
    skeleton = models.skeleton(
        recipe.model.name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )
    placement = place(recipe.device, recipe.model.dtype)
    rounds = planned(recipe) if rounds is None else rounds
    deepest = max((one.compress for one in rounds if one.compress), key=lambda options: options.reduction)
    structure = compression.plan_for(skeleton, deepest)
    sizes = _sizes(skeleton, structure)
    blocks = recipe.corpus.num_blocks + recipe.corpus.num_validation_blocks
    cached = blocks * recipe.corpus.seq_len
    flops = measured_flops(placement)
    forward = 2 * sizes.multiplied / (flops * _FORWARD_EFFICIENCY)
    return Estimate(
        recipe=recipe,
        device=str(placement.device),
        dtype=str(placement.dtype).removeprefix("torch."),
        compression=structure,
        cache_tokens=cached,
        cache={name: _cache_size(name, recipe, sizes.vocab, cached) for name in CODECS},
        model_bytes=sizes.parameters * placement.dtype.itemsize,
        peak_memory_bytes=_memory(recipe, sizes, structure, placement.dtype.itemsize),
        seconds=_seconds(recipe, rounds, num_trials, structure, cached, flops, forward),
        seconds_per_token=forward,
    )


def _cache_size(codec: str, recipe: Recipe, vocab: int, tokens: int) -> CacheSize:
    """A codec that is not the recipe's has its usual number of tokens for a position."""
    top_k = recipe.cache.top_k if codec == recipe.cache.codec else None
    bytes_per_token = codec_for(codec, top_k, vocab).bytes_per_token
    return CacheSize(bytes_per_token, tokens * bytes_per_token)


def _sizes(model: PreTrainedModel, structure: compression.Plan) -> _Sizes:
    config = model.config.get_text_config()
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    parameters = models.num_parameters(model)
    tied = embedding is models.output_weight(model)
    return _Sizes(
        parameters=parameters,
        multiplied=parameters - (0 if tied else embedding.numel()),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        widest=max(max(m.in_features, m.out_features) for m in structure.matrices),
        neurons=max(models.shape(model.get_submodule(mlp.output))[0] for mlp in models.find_mlps(model)),
    )


def _memory(recipe: Recipe, sizes: _Sizes, structure: compression.Plan, itemsize: int) -> float:
    """The largest of training (weights, gradients, two moments, the best copy, activations), evaluation and
    truncation (weights, three hidden-size sums a layer, the directions of every matrix; of `neurons` the hidden states
    of all tokens and one layer's second moments)."""
    tokens = recipe.distill.micro_batch_size * recipe.corpus.seq_len
    activations = tokens * sizes.layers * (14 * sizes.hidden + 5 * sizes.widest) * 4
    head = 256 * sizes.vocab * 4 + 2 * sizes.vocab * sizes.hidden * 4
    training = 5 * 4 * structure.model_parameters_stored + activations + head
    logits = recipe.evaluate.batch_size * recipe.evaluate.context * sizes.vocab * 4
    together = int(recipe.evaluate.agreement)  # models beside the dense one
    evaluation = itemsize * (sizes.parameters + together * structure.model_parameters_stored) + (2 + together) * logits
    directions = sum(4 * m.out_features * m.max_rank for m in structure.matrices if m.rank is not None)
    needs = method_named(recipe.compress.method).needs(recipe.compress.options)
    seen = min(recipe.compress.num_tokens, recipe.corpus.num_blocks * recipe.corpus.seq_len)
    kept = directions + needs.streams * seen * 4 * sizes.hidden + needs.neuron_grams * 8 * sizes.neurons**2
    truncation = 4 * sizes.parameters + sizes.layers * 3 * 8 * sizes.hidden**2 + kept
    return _RUNTIME_BYTES + max(training, evaluation, truncation)


def _seconds(
    recipe: Recipe,
    rounds: Sequence[Round],
    num_trials: int,
    structure: compression.Plan,
    cached: int,
    flops: float,
    forward: float,
) -> dict[str, float]:
    smaller = forward * structure.model_parameters_stored / structure.model_parameters_before  # zeros cost time too
    corpus, distill, evaluate = recipe.corpus, recipe.distill, recipe.evaluate
    scored = len(evaluate.texts) * (evaluate.max_tokens or 250_000) * evaluate.context / evaluate.stride
    said = len(evaluate.prompts) * continuations.NUM_TOKENS  # in batches: a token costs what it does in a text
    epoch, held_out = corpus.num_blocks * corpus.seq_len, corpus.num_validation_blocks * corpus.seq_len
    # of all rounds; a trial is a quarter of an epoch, validated before and after
    epochs = sum(one.distill.epochs / one.share.count for one in rounds)
    in_trials = sum(1 / one.share.count for one in rounds) / len(rounds) * num_trials / 4
    trained = epoch * (epochs + in_trials)
    validated = held_out * ((distill.validations + 1) * len(rounds) + 2 * num_trials)

    def truncation(options: Compress, share: Share) -> float:
        needs = method_named(options.method).needs(options.options)
        probed = len(structure.matrices) * 0.65 * needs.probe_tokens  # from the model's middle on, on average
        seen = min(options.num_tokens, epoch / share.count)
        solver = needs.solver_flops * sum(min(m.in_features, m.out_features) ** 3 for m in structure.matrices)
        return forward * (needs.passes * seen + probed) + solver / (flops * _SOLVER_EFFICIENCY)

    pruned = {one.compressed: (one.compress, one.share) for one in rounds if one.compress is not None}
    caches = 0 if distill.teacher == "online" else len({one.cache for one in rounds})
    asked = trained + validated if distill.teacher == "online" else 0  # tokens for which an online teacher answers
    return {
        "cache": forward * cached * caches,
        "compress": sum(itertools.starmap(truncation, pruned.values())),
        "distill": smaller * (3 * trained + validated) + forward * asked,
        "evaluate": ((1 + evaluate.agreement) * forward + 2 * smaller) * scored * len(rounds)
        + (forward + 2 * smaller * len(rounds)) * said,
    }
