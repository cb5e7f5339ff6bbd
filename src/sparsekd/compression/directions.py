"""The best matrix of a given rank, for all ranks at once: solvers without a Cholesky factor that could fail.

For activations with `C = E[x x^T]` the rank-r matrix closest to W in `E|Wx - W'x|^2` is the projection
`W' = U_r U_r^T W` on the top eigenvectors U of `K = W C W^T = E[y y^T]`, and its error is the sum of the eigenvalues
left out (SVD-LLM's optimum, arXiv 2403.07378, in the inverse-free form of Swift-SVD). Nothing is inverted, so rank
deficient statistics need no damping. With C = 1 it is the plain truncated SVD.

Two-sided: with the curvature `G = T T^T` of the loss at the outputs, the error that counts is `tr(G dW C dW^T)`. The
optimum is the same projection in the metric of G, `W' = T^-T U_r U_r^T T^T W` with U from `T^T W`; T is the symmetric
root of a regularised G, so its inverse is harmless.

Shape letters: O output features, I input features, R rank, K directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsekd.device import in_float64

_RELATIVE_FLOOR = 1e-12  # eigenvalues below this share of the largest are rounding noise of float64 products


# Sampled gradients are few and heavy-tailed: some isotropic curvature keeps their noise out of the directions.
_ISOTROPIC_SHARE = 0.1


@dataclass(frozen=True)
class Projection:
    """Output directions of one matrix, most important first, and what each carries: `W' = left_r (G left_r)^T W`.

    `left^T G left = 1` in the metric G, which is the identity, a diagonal or a matrix.
    """

    left: Float[Tensor, "O K"]  # float32, half the memory; everything before and after is float64
    metric: Float[Tensor, " O"] | Float[Tensor, "O O"] | None  # G; None: identity
    energy: Float[Tensor, " K"]  # float64, descending: what leaving out a direction costs

    def factors(self, weight: Float[Tensor, "O I"], rank: int) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        """`up`, `down` of the approximation of rank R <= K, balanced so that `|up_k| = |down_k|`."""
        up = in_float64(self.left[:, :rank])
        right = up if self.metric is None else _times(self.metric, up)
        down = right.T @ in_float64(weight)
        # equal norms give both factors equal gradients, which Adam and weight decay assume
        scale = (down.norm(dim=1).clamp_min(1e-30) / up.norm(dim=0).clamp_min(1e-30)).sqrt()
        return (up * scale).to(weight), (down / scale[:, None]).to(weight)

    def lost(self) -> Float[Tensor, " M"]:
        """Energy that a truncation to rank 0, 1, ..., K loses, M = K + 1 values: `sum_{k>r} energy_k`."""
        return torch.cat([self.energy, self.energy.new_zeros(1)]).flip(0).cumsum(0).flip(0)

    def relative_error(self, rank: int) -> float:
        """Share of the energy that a truncation to `rank` loses."""
        lost = self.lost()
        return float(lost[rank] / lost[0]) if float(lost[0]) > 0 else 0.0


def from_output_gram(gram: Float[Tensor, "O O"], curvature: Float[Tensor, "O O"] | None = None) -> Projection:
    """For a matrix whose outputs were seen: eigenvectors of `K = E[y y^T]`, or of `T K T` with `T^2 = curvature`."""
    if curvature is None:
        energy, basis = torch.linalg.eigh(in_float64(gram))
        return Projection(basis.flip(1).float(), None, energy.flip(0).clamp_min(0))
    metric = regularised(in_float64(curvature))
    values, vectors = torch.linalg.eigh(metric)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    energy, basis = torch.linalg.eigh(root @ in_float64(gram) @ root)
    return Projection((inverse @ basis.flip(1)).float(), metric, energy.flip(0).clamp_min(0))


def from_input_gram(
    weight: Float[Tensor, "O I"],
    gram: Float[Tensor, "I I"] | None,
    curvature: Float[Tensor, " O"] | None = None,
) -> Projection:
    """For a matrix whose inputs were seen: the same directions, from the smaller side. `gram` None means identity.

    With `C = S S^T` and `S^T W^T W S = V L V^T`, the top eigenvectors of `W C W^T` are `U = W S V L^-1/2`; columns
    whose eigenvalue is numerically zero are left out, so K may be smaller than min(O, I). `curvature` is the diagonal
    of G: its rows are weighted by its root before and unweighted after.
    """
    exact = in_float64(weight)
    root = torch.eye(weight.shape[1], dtype=torch.float64, device=exact.device) if gram is None else _root(gram)
    weighted = exact @ root  # W S
    if curvature is None:
        return _directions(weighted)
    metric = regularised(in_float64(curvature))
    rows = metric.sqrt()[:, None]
    found = _directions(rows * weighted)
    return Projection((found.left / rows).float(), metric, found.energy)


def _times(metric: Tensor, columns: Tensor) -> Tensor:
    return metric[:, None] * columns if metric.ndim == 1 else metric @ columns


def _directions(weighted: Float[Tensor, "O I"]) -> Projection:
    if weighted.shape[0] < weighted.shape[1]:
        return from_output_gram(weighted @ weighted.T)
    energy, vectors = torch.linalg.eigh(weighted.T @ weighted)
    energy, vectors = energy.flip(0), vectors.flip(1)
    kept = max(1, int((energy > _RELATIVE_FLOOR * energy[0]).sum()))
    # the quotient loses orthogonality for small eigenvalues; a QR restores it without mixing earlier columns
    basis, _ = torch.linalg.qr(weighted @ vectors[:, :kept])
    return Projection(basis.float(), None, energy[:kept].clamp_min(0))


def regularised(curvature: Tensor) -> Tensor:
    """A matrix or a diagonal, mixed with a multiple of the identity that has the same mean diagonal."""
    diagonal = curvature.diagonal() if curvature.ndim == 2 else curvature
    mean = diagonal.mean().clamp_min(1e-30)  # of outputs that the loss ignores; its root has an inverse in float32
    identity = torch.eye(len(diagonal), dtype=curvature.dtype, device=curvature.device)
    isotropic = mean * (identity if curvature.ndim == 2 else torch.ones_like(curvature))
    return (1 - _ISOTROPIC_SHARE) * curvature + _ISOTROPIC_SHARE * isotropic


def _root(gram: Float[Tensor, "I I"]) -> Float[Tensor, "I I"]:
    """S with `gram = S S^T`, from the eigenvectors: exists for every positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(in_float64(gram))
    return vectors * values.clamp_min(0).sqrt()
