"""What a recipe asks of any machine: the sizes of its model, bytes of memory by what they hold, tokens by stage.

Reads the model's config, not its weights. What a machine makes of it is in `dry_run.py` and `device_plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from sparsekd import compression, models
from sparsekd.corpus import Share
from sparsekd.evaluate import continuations
from sparsekd.recipe import Compress, Recipe, method_named
from sparsekd.run.rounds import Round, planned
from sparsekd.teacher import CODECS, codec_for

TRIAL_TOKENS = 65_536  # at most, of a training that tries a learning rate


@dataclass(frozen=True)
class CacheSize:
    """Of one codec, before zstd."""

    bytes_per_token: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """Of the dense model, but for `widest`."""

    parameters: int
    multiplied: int  # parameters that a token is multiplied with: all but the embedding table's look-up
    ends: int  # parameters of the embedding table and the output projection
    hidden: int
    layers: int
    vocab: int
    widest: int  # of what the MLP matrices read and write when they are smaller
    neurons: int  # of the widest MLP

    def layer(self, parameters: int) -> float:
        """Parameters of a layer of a model that has so many in all."""
        return (parameters - self.ends) / self.layers


@dataclass(frozen=True)
class Workload:
    """What the stages of all rounds compute, in tokens but for `solver_flops`."""

    cached: int | float  # read by the teacher for the caches
    calibrated: int | float  # passed through the dense model for statistics and probe
    solver_flops: int | float
    trained: int | float  # by the student, forward and back
    validated: int | float
    asked: int | float  # answered by an online teacher
    evaluated: int | float  # read by the dense model
    evaluated_smaller: int | float  # read by the compressed and the distilled model together


@dataclass(frozen=True)
class Parts:
    """Bytes that a stage holds at its peak, by what they are."""

    weights: int | float
    gradients: int | float = 0
    moments: int | float = 0
    best: int | float = 0  # the best weights so far, which are always on the host
    rounded: int | float = 0  # weights in the products' number format, where they have another
    activations: int | float = 0  # and logits, or the statistics of `compress`
    head: int | float = 0  # a chunk of logits, and the gradient of the output projection

    @property
    def total(self) -> int | float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Costs:
    """What a recipe's rounds ask for."""

    recipe: Recipe
    compression: compression.Plan  # of the largest reduction
    sizes: Sizes
    cache_tokens: int  # of one cache
    cache: dict[str, CacheSize]  # by codec
    work: Workload

    @property
    def remaining(self) -> float:
        """Parameters of the smaller model for one of the dense model's; zeros cost memory and time too."""
        return self.compression.model_parameters_stored / self.compression.model_parameters_before


def costs_of(recipe: Recipe, rounds: Sequence[Round] | None = None, num_trials: int = 0) -> Costs:
    """Of the recipe's own `rounds` by default; `num_trials` of a learning rate come on top of their training."""
    skeleton = models.skeleton(
        recipe.model.name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )
    rounds = planned(recipe) if rounds is None else rounds
    deepest = max((one.compress for one in rounds if one.compress), key=lambda options: options.total)
    structure = compression.plan_for(skeleton, deepest)
    sizes = _sizes(skeleton, structure)
    cached = (recipe.corpus.num_blocks + recipe.corpus.num_validation_blocks) * recipe.corpus.seq_len
    return Costs(
        recipe=recipe,
        compression=structure,
        sizes=sizes,
        cache_tokens=cached,
        cache={name: _cache_size(name, recipe, sizes.vocab, cached) for name in CODECS},
        work=_work(recipe, rounds, num_trials, structure, cached, sizes.layers),
    )


def _cache_size(codec: str, recipe: Recipe, vocab: int, tokens: int) -> CacheSize:
    """A codec that is not the recipe's has its usual number of tokens for a position."""
    top_k = recipe.cache.top_k if codec == recipe.cache.codec else None
    bytes_per_token = codec_for(codec, top_k, vocab).bytes_per_token
    return CacheSize(bytes_per_token, tokens * bytes_per_token)


def _sizes(model: PreTrainedModel, structure: compression.Plan) -> Sizes:
    config = model.config.get_text_config()
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    parameters = models.num_parameters(model)
    tied = embedding is models.output_weight(model)
    return Sizes(
        parameters=parameters,
        multiplied=parameters - (0 if tied else embedding.numel()),
        ends=embedding.numel() + (0 if tied else models.output_weight(model).numel()),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        widest=max(m.neurons or max(m.in_features, m.out_features) for m in structure.matrices),
        neurons=max(models.shape(model.get_submodule(mlp.output))[0] for mlp in models.find_mlps(model)),
    )


def parts_of(costs: Costs, itemsize: int, products: int, micro_batch_size: int, on_gpu: bool) -> dict[str, Parts]:
    """Bytes by stage. `itemsize` is that of the weights of teacher and evaluated models, `products` that of what the
    training multiplies, whose weights are float32; `micro_batch_size` blocks go through it at once. On a GPU larger
    chunks of logits are held, and with `compress.offload` one layer of the model at a time, the sums on the host."""
    recipe, sizes, stored = costs.recipe, costs.sizes, costs.compression.model_parameters_stored
    distill, evaluate = recipe.distill, recipe.evaluate
    cached, read = recipe.cache.batch_size * recipe.corpus.seq_len, evaluate.batch_size * evaluate.context
    visits = on_gpu and recipe.compress.offload
    taught = itemsize * sizes.parameters if distill.teacher == "online" else 0
    copy = 0 if products == 4 else products  # of a float32 number for the products
    rows = 2048 if on_gpu else 256  # of the logits
    together = 2 * int(evaluate.agreement)  # models beside the dense one, which are compared with it
    return {
        "cache": Parts(
            weights=itemsize * sizes.parameters,
            activations=_of_a_layer(sizes, itemsize) * cached + 2 * 4 * sizes.vocab * cached,
        ),
        "compress": Parts(
            weights=4 * (sizes.ends + sizes.layer(sizes.parameters) if visits else sizes.parameters),
            activations=_statistics(costs, visits),
        ),
        "distill": Parts(
            weights=4 * stored + taught,
            gradients=4 * stored,
            moments=8 * stored,
            best=0 if on_gpu else 4 * stored,
            rounded=copy * (sizes.layer(stored) if distill.gradient_checkpointing else stored),
            activations=_activations(recipe, sizes, products) * micro_batch_size * recipe.corpus.seq_len,
            head=rows * sizes.vocab * (4 + copy) + sizes.vocab * sizes.hidden * (2 * 4 + copy),
        ),
        "evaluate": Parts(
            weights=itemsize * (sizes.parameters + together * stored),
            activations=_of_a_layer(sizes, itemsize) * read + (2 + together) * 4 * sizes.vocab * read,
        ),
    }


def _of_a_layer(sizes: Sizes, products: int) -> int:
    """Bytes for each token. Four values of the hidden size are float32 in any case, those of the residual stream and
    the norms; the others are what products read and write."""
    return 4 * 4 * sizes.hidden + products * (10 * sizes.hidden + 5 * sizes.widest)


def _activations(recipe: Recipe, sizes: Sizes, products: int) -> int:
    """Bytes for each token of all layers; where they are worked out again, of one layer and the inputs of all."""
    layer = _of_a_layer(sizes, products)
    saves = recipe.distill.gradient_checkpointing
    return layer + sizes.layers * 4 * sizes.hidden if saves else sizes.layers * layer


def _statistics(costs: Costs, visits: bool) -> int | float:
    """Three hidden-size sums a layer, directions and gradients of every matrix, unless layers `visit` the device; of
    other methods the hidden states that are kept and one layer's second moments."""
    recipe, sizes = costs.recipe, costs.sizes
    directions = sum(4 * m.out_features * m.max_rank for m in costs.compression.matrices if m.rank is not None)

    def of_step(step: Compress) -> int | float:
        needs = method_named(step.method).needs(step.options)
        seen = min(step.num_tokens, recipe.corpus.num_blocks * recipe.corpus.seq_len)
        streams = needs.streams * seen + sizes.layers * needs.left_out_tokens
        kept = streams * 4 * sizes.hidden + needs.neuron_grams * 8 * sizes.neurons**2
        gradients = 4 * costs.compression.mlp_parameters_before if needs.weight_gradients else 0
        return kept if visits else sizes.layers * 3 * 8 * sizes.hidden**2 + directions + gradients + kept

    return max(of_step(step) for step in recipe.compress.steps)


def trial_tokens(epoch: int | float) -> int | float:
    """What a learning rate is tried on, of an epoch of so many tokens."""
    return min(epoch / 4, TRIAL_TOKENS)


def _work(
    recipe: Recipe, rounds: Sequence[Round], num_trials: int, structure: compression.Plan, cached: int, layers: int
) -> Workload:
    corpus, distill, evaluate = recipe.corpus, recipe.distill, recipe.evaluate
    epoch, held_out = corpus.num_blocks * corpus.seq_len, corpus.num_validation_blocks * corpus.seq_len
    # of all rounds; a trial is validated before and after
    epochs = sum(one.distill.epochs / one.share.count for one in rounds)
    in_a_trial = sum(trial_tokens(epoch / one.share.count) for one in rounds) / len(rounds)
    trained = epoch * epochs + num_trials * in_a_trial
    validated = held_out * ((distill.validations + 1) * len(rounds) + 2 * num_trials)
    scored = len(evaluate.texts) * (evaluate.max_tokens or 250_000) * evaluate.context / evaluate.stride
    said = len(evaluate.prompts) * continuations.NUM_TOKENS  # in batches: a token costs what it does in a text

    def calibrated(options: Compress, share: Share) -> tuple[float, float]:
        needs = method_named(options.method).needs(options.options)
        probed = len(structure.matrices) * 0.65 * needs.probe_tokens  # from the model's middle on, on average
        gone = sum(not m.parameters_after for m in structure.matrices) * layers // len(structure.matrices)
        # half of the layers that are left, on average, and the output projection
        left_out = 0.55 * sum(layers - number for number in range(gone)) * needs.left_out_tokens
        seen = min(options.num_tokens, epoch / share.count)
        solver = needs.solver_flops * sum(min(m.in_features, m.out_features) ** 3 for m in structure.matrices)
        return needs.passes * seen + probed + left_out, solver

    is_online = distill.teacher == "online"
    pruned = {one.compressed: (one.compress.steps, one.share) for one in rounds if one.compress is not None}
    statistics = [calibrated(step, share) for steps, share in pruned.values() for step in steps]
    return Workload(
        cached=0 if is_online else cached * len({one.cache for one in rounds}),
        calibrated=sum(tokens for tokens, _ in statistics),
        solver_flops=sum(flops for _, flops in statistics),
        trained=trained,
        validated=validated,
        asked=trained + validated if is_online else 0,
        evaluated=scored * len(rounds) + said,
        evaluated_smaller=2 * (scored + said) * len(rounds),
    )
