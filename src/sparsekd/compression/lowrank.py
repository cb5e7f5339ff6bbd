"""The best matrix of a given rank, for all ranks at once: solvers without an inverse or a Cholesky factor.

For activations with `C = E[x x^T]` the rank-r matrix closest to W in `E|Wx - W'x|^2` is the projection
`W' = U_r U_r^T W` on the top eigenvectors U of `K = W C W^T = E[y y^T]`, and its error is the sum of the eigenvalues
left out (SVD-LLM's optimum, arXiv 2403.07378, in the inverse-free form of Swift-SVD). Nothing is inverted, so rank
deficient statistics need no damping. With C = 1 it is the plain truncated SVD.

Shape letters: O output features, I input features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_RELATIVE_FLOOR = 1e-12  # eigenvalues below this share of the largest are rounding noise of float64 products


@dataclass(frozen=True)
class Projection:
    """Orthonormal output directions of one matrix, most important first, and the output energy that each carries."""

    basis: Float[Tensor, "O K"]  # float64
    energy: Float[Tensor, "K"]  # float64, descending

    def factors(self, weight: Float[Tensor, "O I"], rank: int) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
        """`up`, `down` of the rank-R approximation `U_r (U_r^T W)`, balanced so that `|up_k| = |down_k|`."""
        up = self.basis[:, :rank]
        down = up.T @ weight.double()
        # up has unit columns; equal norms give both factors equal gradients, which Adam and weight decay assume
        scale = down.norm(dim=1).clamp_min(1e-30).sqrt()
        return (up * scale).to(weight.dtype), (down / scale[:, None]).to(weight.dtype)

    def relative_error(self, rank: int) -> float:
        """Share of the output energy that a truncation to `rank` loses: `sum_{k>r} energy / sum energy`."""
        total = float(self.energy.sum())
        return float(self.energy[rank:].sum()) / total if total > 0 else 0.0


def from_output_gram(gram: Float[Tensor, "O O"]) -> Projection:
    """For a matrix whose outputs were seen: eigenvectors of `K = E[y y^T]`."""
    energy, basis = torch.linalg.eigh(gram.double())
    return Projection(basis.flip(1), energy.flip(0).clamp_min(0))


def from_input_gram(weight: Float[Tensor, "O I"], gram: Float[Tensor, "I I"] | None) -> Projection:
    """For a matrix whose inputs were seen: the same directions, from the smaller side. `gram` None means identity.

    With `C = S S^T` and `S^T W^T W S = V L V^T`, the top eigenvectors of `W C W^T` are `U = W S V L^-1/2`; columns
    whose eigenvalue is numerically zero are left out, so K may be smaller than min(O, I).
    """
    root = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device) if gram is None else _root(gram)
    weighted = weight.double() @ root  # W S
    if weighted.shape[0] < weighted.shape[1]:
        return from_output_gram(weighted @ weighted.T)
    energy, vectors = torch.linalg.eigh(weighted.T @ weighted)
    energy, vectors = energy.flip(0), vectors.flip(1)
    kept = max(1, int((energy > _RELATIVE_FLOOR * energy[0]).sum()))
    # the quotient loses orthogonality for small eigenvalues; a QR restores it without mixing earlier columns
    basis, _ = torch.linalg.qr(weighted @ vectors[:, :kept])
    return Projection(basis, energy[:kept].clamp_min(0))


def _root(gram: Float[Tensor, "I I"]) -> Float[Tensor, "I I"]:
    """S with `gram = S S^T`, from the eigenvectors: exists for every positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0).sqrt()
