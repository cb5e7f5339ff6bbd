"""How the teacher's distributions of a block become bytes: planes of single bytes, rank by rank, which zstd packs well.

    q16      ids, log-probabilities as fp16                                     132 bytes a token at k = 32 before zstd
    q8       ids, the first log-probability as fp16, then 8-bit gaps            101
    sampled  12 ids drawn without bias and their weights as fp16                 48

Ids take 2 bytes in vocabularies up to 65,536 tokens and 3 above. The tail is stored, as log r and log sum p^(1/2):
worked out from rounded probabilities it would be several times less exact. Knows no model code and no files.

Shape letters: N positions, K kept tokens, U drawn tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsekd.errors import UsageError

MAX_VOCAB = 2**24  # what 3 bytes of an id can tell apart


class Targets(NamedTuple):
    """Teacher distributions at temperature 1; `exp(log_probs)` and `exp(log_tail)` sum to one at each position."""

    ids: Int[Tensor, "*N K"]
    log_probs: Float[Tensor, "*N K"]  # descending, over the whole vocabulary
    log_tail: Float[Tensor, "*N"]  # log of the sum of p over the tokens that are not kept
    log_tail_half: Float[Tensor, "*N"]  # log of the sum of p^(1/2) over them


class Samples(NamedTuple):
    """Tokens drawn from the teacher; the expectation of a token's weight is the teacher's probability of it."""

    ids: Int[Tensor, "*N U"]
    log_weights: Float[Tensor, "*N U"]  # weights sum to one; -inf in an unused slot


class Field(NamedTuple):
    """A row-per-rank array of little-endian numbers, of whose bytes the lowest `width` are kept."""

    rows: int
    dtype: str
    width: int


class Codec:
    """Packs the targets of a block into named byte planes and unpacks them."""

    name: ClassVar[str]
    default_top_k: ClassVar[int] = 32

    def __init__(self, top_k: int, vocab_size: int):
        self.top_k, self.vocab_size = top_k, vocab_size
        self._ids = Field(top_k, "<u4", 2 if vocab_size <= 65_536 else 3)

    @property
    def fields(self) -> dict[str, Field]:
        raise NotImplementedError

    @property
    def planes(self) -> list[str]:
        return [f"{name}_{i}" for name, field in self.fields.items() for i in range(field.width)]

    @property
    def bytes_per_token(self) -> int:
        """Before zstd."""
        return sum(field.rows * field.width for field in self.fields.values())

    def encode(self, targets: Targets | Samples) -> dict[str, bytes]:
        """The planes of a block's targets by name."""
        arrays = self._pack(*(column.numpy() for column in targets))
        planes = {}
        for name, field in self.fields.items():
            array = np.ascontiguousarray(arrays[name], field.dtype)
            split = array.view(np.uint8).reshape(*array.shape, array.itemsize)
            planes |= {f"{name}_{i}": np.ascontiguousarray(split[..., i]).tobytes() for i in range(field.width)}
        return planes

    def decode(self, planes: Mapping[str, bytes], num_rows: int) -> Targets | Samples:
        """The targets of a block of `num_rows` positions; raises `ValueError` when a plane has another size."""
        arrays = {}
        for name, field in self.fields.items():
            joined = np.zeros((field.rows, num_rows, np.dtype(field.dtype).itemsize), np.uint8)
            for i in range(field.width):
                joined[..., i] = np.frombuffer(planes[f"{name}_{i}"], np.uint8).reshape(joined.shape[:2])
            arrays[name] = joined.view(field.dtype)[..., 0]
        return self._unpack(arrays)

    def _pack(self, *columns: np.ndarray) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _unpack(self, arrays: dict[str, np.ndarray]) -> Targets | Samples:
        raise NotImplementedError

    def expected_kl(self, targets: Targets | Samples) -> np.ndarray | None:
        """KL that rounding is expected to cost at each position, in nats; None where the codec is unbiased noise."""
        return None


class _TopK(Codec):
    """What q16 and q8 share: an entry of the distribution is a kept token, or all others together."""

    def steps(self, log_probs: np.ndarray) -> np.ndarray:
        """Distance between two neighbouring values that can be stored, at each of the (K, N) log-probabilities."""
        raise NotImplementedError

    def expected_kl(self, targets: Targets | Samples) -> np.ndarray:
        """Second order in independent rounding errors, uniform over a step: 1/2 sum p (1 - p) step^2 / 12."""
        assert isinstance(targets, Targets)
        log_probs, log_tail = targets.log_probs.numpy().T, targets.log_tail.numpy()[None]
        p = np.exp(np.concatenate([log_probs, log_tail]).astype(np.float64))
        steps = np.concatenate([self.steps(log_probs), _half_steps(log_tail)])
        return (p * (1 - p) * steps**2).sum(0) / 24


class Q16(_TopK):
    """Log-probabilities as fp16."""

    name = "q16"

    @property
    def fields(self) -> dict[str, Field]:
        return {"ids": self._ids, "log_probs": Field(self.top_k, "<f2", 2), "tails": Field(2, "<f2", 2)}

    def _pack(self, *columns: np.ndarray) -> dict[str, np.ndarray]:
        ids, log_probs, *tails = columns
        return {"ids": ids.T, "log_probs": log_probs.T, "tails": np.stack(tails)}

    def _unpack(self, arrays: dict[str, np.ndarray]) -> Targets:
        return Targets(_ids(arrays), _floats(arrays["log_probs"].T), *map(_floats, arrays["tails"]))

    def steps(self, log_probs: np.ndarray) -> np.ndarray:
        return _half_steps(log_probs)


class Q8(_TopK):
    """The first log-probability as fp16, then the drop to each next one in 8 bits on a logarithmic scale.

    A drop is measured from the value that the decoder will have, so errors do not add up from rank to rank. A larger
    drop than e^-32 is stored as that, and the next one makes up for it.
    """

    name = "q8"
    _LARGEST = 32.0
    _FINE = 0.2  # drops below this are stored in even steps, those above in steps that grow with them
    _SCALE = np.log1p(_LARGEST / _FINE) / 255

    @property
    def fields(self) -> dict[str, Field]:
        return {"ids": self._ids, "gaps": Field(self.top_k - 1, "u1", 1), "tails": Field(3, "<f2", 2)}

    def _pack(self, *columns: np.ndarray) -> dict[str, np.ndarray]:
        ids, log_probs, *tails = columns
        first = log_probs[:, 0].astype("<f2")
        value = first.astype(np.float32)
        gaps = np.empty((self.top_k - 1, len(first)), np.uint8)
        for rank in range(1, self.top_k):
            drop = np.clip(value - log_probs[:, rank], 0, self._LARGEST)
            gaps[rank - 1] = np.rint(np.log1p(drop / self._FINE) / self._SCALE)
            value = value - self._drops[gaps[rank - 1]]
        return {"ids": ids.T, "gaps": gaps, "tails": np.stack([first, *tails])}

    def _unpack(self, arrays: dict[str, np.ndarray]) -> Targets:
        first, *tails = arrays["tails"]
        drops = np.concatenate([-first[None].astype(np.float32), self._drops[arrays["gaps"]]])
        return Targets(_ids(arrays), _floats(-drops.cumsum(0).T), *map(_floats, tails))

    _drops = (_FINE * np.expm1(_SCALE * np.arange(256))).astype(np.float32)

    def steps(self, log_probs: np.ndarray) -> np.ndarray:
        drops = -np.diff(log_probs, axis=0)
        return np.concatenate([_half_steps(log_probs[:1]), self._SCALE * (self._FINE + drops)])


class Sampled(Codec):
    """Drawn tokens: those that are certain to be drawn first, then the others, which share one weight."""

    name = "sampled"
    default_top_k = 12

    @property
    def fields(self) -> dict[str, Field]:
        return {"ids": self._ids, "log_weights": Field(self.top_k, "<f2", 2)}

    def _pack(self, *columns: np.ndarray) -> dict[str, np.ndarray]:
        ids, log_weights = columns
        return {"ids": ids.T, "log_weights": log_weights.T}

    def _unpack(self, arrays: dict[str, np.ndarray]) -> Samples:
        log_weights = arrays["log_weights"].astype(np.float32)
        log_weights -= np.log(np.exp(log_weights).sum(0))  # rounded, they summed to almost one
        return Samples(_ids(arrays), _floats(log_weights.T))


CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Q16, Q8, Sampled)}


def codec_for(name: str, top_k: int | None, vocab_size: int) -> Codec:
    """The codec of a recipe: `top_k` None is its usual number of tokens, and never all of the vocabulary.

    Raises `UsageError` for a vocabulary larger than ids can name.
    """
    if vocab_size > MAX_VOCAB:
        raise UsageError(f"the vocabulary has {vocab_size:,} tokens: the teacher cache holds at most {MAX_VOCAB:,}")
    kind = CODECS[name]
    return kind(min(top_k or kind.default_top_k, vocab_size - 1), vocab_size)


def _ids(arrays: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(arrays["ids"].T, np.int64))


def _floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _half_steps(values: np.ndarray) -> np.ndarray:
    return np.abs(np.spacing(values.astype(np.float16)).astype(np.float64))
