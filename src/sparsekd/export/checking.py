"""Whether a runtime says what PyTorch says of the same model, on a text.

Shape letters: B windows, L positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekd import corpus
from sparsekd.models import logits_of
from sparsekd.records import Record, exponential

Runtime = Callable[[Int[Tensor, "B L"]], Float[Tensor, "B L V"]]  # tokens to logits
_WINDOWS, _LENGTH = 8, 128
_FUNCTIONS = 60  # of Python's library, enough for these


@dataclass(frozen=True)
class Comparison:
    """Of a runtime with PyTorch in float32, on the same tokens."""

    tokens: int
    largest_logit_difference: float
    agreement: float  # share of the positions where both hold the same token likeliest
    perplexity: float  # of the runtime
    reference_perplexity: float  # of PyTorch

    def as_dict(self) -> Record:
        return asdict(self)


@dataclass(frozen=True)
class Tolerance:
    """How far a number format may be from float32."""

    logits: float  # largest difference
    agreement: float  # least
    perplexity: float  # largest relative change

    def problem(self, found: Comparison) -> str | None:
        """What is beyond it; None where nothing is."""
        change = abs(found.perplexity / found.reference_perplexity - 1)
        if not found.largest_logit_difference <= self.logits:
            return f"logits differ by {found.largest_logit_difference:.2g}, at most {self.logits:g} is expected"
        if not found.agreement >= self.agreement:
            return f"the likeliest token agrees at {found.agreement:.1%} of the positions, not {self.agreement:.0%}"
        if not change <= self.perplexity:
            return f"perplexity changes by {change:.2%}, at most {self.perplexity:.2%} is expected"
        return None


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None) -> Int[Tensor, "B L"]:
    """Windows of a text to compare on; None: functions of Python's standard library."""
    if text is None:
        text = "\n\n".join(code for _, code in itertools.islice(corpus.python_functions(), _FUNCTIONS))
    ids = torch.tensor(corpus.encode(tokenizer, text)[: _WINDOWS * _LENGTH])
    length = min(_LENGTH, len(ids))
    return ids[: len(ids) // length * length].view(-1, length)


@torch.inference_mode()
def compare(model: PreTrainedModel, runtime: Runtime, tokens: Int[Tensor, "B L"]) -> Comparison:
    """Runs both on `tokens`."""
    ours, theirs = logits_of(model, input_ids=tokens.to(model.device)).float().cpu(), runtime(tokens).float()
    theirs = theirs[..., : ours.shape[-1]]
    return Comparison(
        tokens=tokens.numel(),
        largest_logit_difference=float((ours - theirs).abs().max()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        perplexity=perplexity(theirs, tokens),
        reference_perplexity=perplexity(ours, tokens),
    )


def perplexity(logits: Float[Tensor, "B L V"], tokens: Int[Tensor, "B L"]) -> float:
    """Of windows, each position but the last predicting the next token."""
    return exponential(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())))
