"""What a recipe file may say: one frozen dataclass for each stage, in the order of the flow. No torch in this folder:
`sparsekd --help` reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from sparsekd.recipe.fields import PASSING, Range
from sparsekd.recipe.methods import method_named, method_names
from sparsekd.recipe.names import EMBEDDED_MODEL
from sparsekd.recipe.prompts import PROMPTS


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to make smaller."""

    name: str = EMBEDDED_MODEL  # a local folder, a Hub id, a .gguf file, or smollm2-135m
    revision: str | None = None  # commit, tag or branch of a Hub id
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: of the teacher's pass and of the evaluation
    trust_remote_code: bool = False  # run Python code that comes with the model


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from: exactly one of `path`, `embedded`, `hub`."""

    path: str | None = field(default=None, metadata=PASSING)  # .txt, .jsonl or .parquet, relative to corpus.root
    embedded: Literal["wikipedia", "python"] | None = None  # text that installed packages carry
    hub: str | None = None  # a Hub data set, read as a stream
    config: str | None = None  # configuration of the Hub data set
    revision: str | None = None  # commit, tag or branch of the Hub data set
    text: str = "text"  # column that holds the text, or a template such as "{question}\n{answer}"
    split: str = r"\n\s*\n"  # .txt: regular expression between two documents; hub: name of the split
    weight: Annotated[float, Range("> 0")] = 1.0  # share of the training blocks, relative to the other sources
    holdout: Annotated[float, Range("[0, 1)")] = (
        0.0  # fraction of the documents, the last ones, kept for evaluation only
    )


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to evaluate on: the held-out part of a corpus source, or a file of its own."""

    holdout_of: str | None = None  # name of a corpus source with a holdout
    path: str | None = field(default=None, metadata=PASSING)  # .txt, .jsonl or .parquet, relative to corpus.root
    text: str = "text"  # as in a source
    rows_joined_by: str | None = None  # .txt: join its lines by this, as is customary for WikiText; none: as it is


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to token blocks."""

    root: str | None = field(
        default=None, metadata=PASSING
    )  # folder that relative paths start from; none: the current one
    sources: dict[str, Source] = field(default_factory=dict)
    seq_len: Annotated[int, Range(">= 8")] = 256  # tokens in a block
    num_blocks: Annotated[int, Range(">= 1")] = 100  # blocks that training sees in one epoch
    num_validation_blocks: Annotated[int, Range(">= 1")] = (
        16  # blocks of other documents, to choose the best weights by
    )
    pack: bool = True  # join documents until a block is full; false: a document a block, cut at seq_len
    document_mask: bool = False  # packed documents do not see each other; positions start again with each
    overlap: Literal["stop", "drop"] = "stop"  # evaluation text in a source: an error, or its documents are left out


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who teaches; by default the dense model, for the whole run."""

    # models of the same vocabulary, with weights, whose mixed distributions are learned; none: the dense model
    models: dict[str, Annotated[float, Range("> 0")]] = field(default_factory=dict)
    # the weighted mean of several teachers' probabilities: arithmetic, or geometric, of their logarithms
    mixture: Literal["arithmetic", "geometric"] = "arithmetic"
    cascade: Annotated[int, Range(">= 0")] = (
        0  # generations of the dense model distilled without pruning, each the teacher of what follows
    )
    recache: bool = False  # each round's result teaches the next round
    anchor: Annotated[float, Range("[0, 1)")] = (
        0.0  # weight of the first teacher beside a generation or round that teaches
    )


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The teacher's next-token distributions."""

    codec: Literal["q16", "q8", "sampled"] = "q16"  # fp16, 8-bit gaps, or tokens drawn without bias
    top_k: Annotated[int, Range("1 to 256")] | None = (
        None  # tokens kept (or drawn) for a position; none: 32, of codec sampled 12
    )
    # blocks in one file; a killed run loses at most two, which were not whole yet
    blocks_per_shard: Annotated[int, Range(">= 1")] = field(default=64, metadata=PASSING)
    batch_size: Annotated[int, Range(">= 1")] = field(
        default=4, metadata=PASSING
    )  # blocks in one forward pass; halved when memory runs out


@dataclass(frozen=True, kw_only=True)
class Compress:
    """The structural step: what all methods have in common, and a section for the options of each."""

    reduction: Annotated[float, Range("(0, 0.95]")] = 0.15  # fraction of the dense model's MLP parameters removed
    method: str = "whitened"  # a file of compression/methods; its own options are in the section of its name
    # tokens of the corpus, if it has so many, that the activation statistics are taken from
    num_tokens: Annotated[int, Range(">= 1")] = 65536
    batch_size: Annotated[int, Range(">= 1")] = 4  # blocks in one forward pass
    # the model stays in host memory; its layers visit the device one at a time
    offload: bool = field(default=False, metadata=PASSING)
    # steps before this one, sections like it; `compress` as a list of sections is its last one with the others as these
    first: list[Compress] = field(default_factory=list)
    of_methods: dict[str, Any] = field(default_factory=dict)  # the sections, by method

    def __post_init__(self) -> None:
        if self.method in method_names() and self.method not in self.of_methods:
            own = {**self.of_methods, self.method: method_named(self.method).Options()}
            object.__setattr__(self, "of_methods", own)

    @property
    def options(self) -> Any:
        """The method's own options."""
        return self.of_methods[self.method]

    @property
    def steps(self) -> list[Compress]:
        """All steps, in order: each removes its reduction of what the one before it left."""
        return [*self.first, replace(self, first=[])]

    @property
    def methods(self) -> str:
        """Those of all steps, as a name."""
        return "+".join(step.method for step in self.steps)

    @property
    def total(self) -> float:
        """The reduction of all steps together."""
        return 1 - math.prod(1 - step.reduction for step in self.steps) if self.first else self.reduction

    def by(self, method: str, **options: Any) -> Compress:
        """The section with another method, and that with its own options as in the section, but for `options`."""
        own = replace(replace(self, method=method).options, **options)
        return replace(self, method=method, of_methods={**self.of_methods, method: own})


@dataclass(frozen=True, kw_only=True)
class RateScale:
    """Learning rates as multiples of `distill.learning_rate`, which is that of the MLP matrices; 0 freezes."""

    attention: Annotated[float, Range("[0, 100]")] = 1.0
    norms: Annotated[float, Range("[0, 100]")] = 1.0
    embeddings: Annotated[float, Range("[0, 100]")] = 1.0  # of the tokens, and the output projection


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The training that restores what the structural step broke."""

    teacher: Literal["cache", "online"] = "cache"  # online: the dense model answers at every step, nothing is cached
    loss: Literal["bucket", "paper", "exact_t", "sampled", "renorm_full"] = "bucket"  # docs/distill.md compares them
    # weights: the student goes on from its own; fresh: from new ones, as if it had never been trained (Born-Again)
    start: Literal["weights", "fresh"] = "weights"
    # every weight, the low-rank layers or masked matrices, or adapters that are merged at the end
    train: Literal["all", "compressed", "lora"] = "all"
    lora_rank: Annotated[int, Range(">= 1")] = 16
    epochs: Annotated[int, Range(">= 1")] = 1  # passes over the corpus
    # epochs: train them all; converged: the paper's rule, stop at a clear minimum or saturation, or after `epochs`
    stop: Literal["epochs", "converged"] = "epochs"
    patience: Annotated[int, Range(">= 1")] = 3  # converged: validations in a row that decide
    min_improvement: Annotated[float, Range("[0, 1)")] = (
        0.002  # converged: relative change of the validation loss that counts
    )
    learning_rate: Annotated[float, Range("(0, 1]")] = 3e-5
    lr_scale: RateScale = field(default_factory=RateScale)
    alpha: Annotated[float, Range("[0, 1]")] = 0.5  # weight of the KL term; 1 - alpha is the weight of cross-entropy
    # of each position's KL, by the teacher's entropy, by the gap to the student, or by source; none: all count alike
    weighting: Literal["entropy", "gap", "domain"] | None = None
    temperature: Annotated[float, Range("[0.1, 100]")] = 2.0  # softening of the teacher in the probability domain
    batch_size: Annotated[int, Range(">= 1")] = 4  # blocks in one optimizer step, over all processes
    # blocks in one forward and backward pass of a process; halved when memory runs out
    micro_batch_size: Annotated[int, Range(">= 1")] = field(default=4, metadata=PASSING)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the products; auto: bfloat16 on GPUs that know it
    # work activations out again in the backward pass: less memory, more work
    gradient_checkpointing: bool = field(default=False, metadata=PASSING)
    warmup_ratio: Annotated[float, Range("[0, 1]")] = 0.1  # part of the steps in which the learning rate rises
    schedule: Literal["cosine", "linear"] = "cosine"  # how it falls then: to a tenth, or straight to zero
    weight_decay: Annotated[float, Range("[0, 1]")] = 0.0
    max_grad_norm: Annotated[float, Range("> 0")] = 1.0
    validations: Annotated[int, Range(">= 1")] = 4  # times the validation loss is measured, evenly over the steps
    checkpoint_minutes: Annotated[float, Range(">= 0")] = field(
        default=5.0, metadata=PASSING
    )  # time between two checkpoints
    # accelerate's, such as tensorboard; metrics.jsonl is always there
    trackers: list[str] = field(default_factory=list, metadata=PASSING)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Quality of the dense, the compressed and the distilled model."""

    texts: dict[str, Text] = field(default_factory=dict)
    context: Annotated[int, Range(">= 2")] = 512  # tokens in a window
    stride: Annotated[int, Range(">= 1")] = 256  # tokens between the starts of two windows
    max_tokens: Annotated[int, Range(">= 2")] | None = (
        None  # to score of each text, in windows spread evenly over it; none: all
    )
    # windows, or rows of a task, in one forward pass; halved when memory runs out
    batch_size: Annotated[int, Range(">= 1")] = field(default=2, metadata=PASSING)
    agreement: bool = True  # compare with the dense model's distributions; keeps it in memory beside one other
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))  # texts that the models go on from; []: none
    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness; local_...: files under corpus.root
    task_limit: Annotated[int, Range(">= 1")] | None = None  # rows of each task; none: all
    # name a task that is not available here and go on; false: an error
    skip_missing_tasks: bool = field(default=False, metadata=PASSING)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    seed: int = 42
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    model: Model = field(default_factory=Model)
    corpus: Corpus = field(default_factory=Corpus)
    teacher: Teacher = field(default_factory=Teacher)
    cache: Cache = field(default_factory=Cache)
    # rising reductions: each round prunes the round before further and trains it; none: one round, compress.reduction
    rounds: list[float] = field(default_factory=list)
    split_corpus: bool = False  # each round learns from a part of the corpus of its own; false: each from all of it
    compress: Compress = field(default_factory=Compress)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    # at the end perplexity against speed and bytes, of the dense model and each round's, as they are and quantised
    bench: bool = field(default=False, metadata=PASSING)
