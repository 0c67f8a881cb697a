"""Solves inside a null space with a history of edits, in 64 bit and as small as the history.

AlphaEdit's closed form (arXiv:2410.02355) is ``(P (K K^T + H H^T) + L I)^-1 P K`` with a projector ``P`` (inner, inner) and
the keys ``H`` (inner, m) of all edits so far. ``P`` moves through the inverse, and with ``A = P K`` and ``B = P H`` it equals

    (B B^T + A A^T + L I)^-1 A  =  X (I + A^T X)^-1,    X = (A - B (L I + B^T B)^-1 B^T A) / L

so nothing as wide as the MLP is ever solved, and the factor of ``L I + B^T B`` (m, m) grows with each edit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projector:
    """Onto the span of an orthonormal ``basis`` (inner, r), or onto all that is orthogonal to it: whichever is thinner."""

    basis: Tensor
    complement: bool

    @classmethod
    def onto_null_space(cls, moment: Tensor, threshold: float) -> Projector:
        """Onto the eigenvectors of a second moment (inner, inner) whose eigenvalue is below ``threshold``."""
        values, vectors = torch.linalg.eigh(moment.double())
        kept = values < threshold
        complement = bool(kept.sum() > len(kept) // 2)
        return cls(vectors[:, ~kept if complement else kept].contiguous(), complement)

    @property
    def rank(self) -> int:
        """Dimensions of the null space."""
        width, columns = self.basis.shape
        return width - columns if self.complement else columns

    def __call__(self, columns: Tensor) -> Tensor:
        """The projection of columns (inner, n), in 64 bit."""
        columns = columns.double()
        inside = self.basis @ (self.basis.T @ columns)
        return columns - inside if self.complement else inside


class History:
    """Keys of earlier edits inside a null space, and the factor that solves against them.

    The factor depends on the blocks in which keys were added, in the last bits; adding the same blocks gives the same.
    """

    def __init__(self, projector: Projector, l2: float) -> None:
        self.projector, self.l2 = projector, l2
        empty = projector.basis.new_zeros(0, 0)
        self.columns = projector.basis.new_zeros(len(projector.basis), 0)  # B (inner, m)
        self.factor = empty  # lower, (m, m): of L I + B^T B

    def add(self, keys: Tensor) -> None:
        """Append a block of keys (inner, n): new rows of the factor, the old ones stay."""
        block = self.projector(keys)
        cross = torch.linalg.solve_triangular(self.factor, self.columns.T @ block, upper=False)  # (m, n)
        corner = block.T @ block - cross.T @ cross
        corner.diagonal().add_(self.l2)
        upper = torch.cat([self.factor, torch.zeros_like(cross)], dim=1)
        lower = torch.cat([cross.T, torch.linalg.cholesky(corner)], dim=1)
        self.factor = torch.cat([upper, lower])
        self.columns = torch.cat([self.columns, block], dim=1)

    def spread(self, keys: Tensor) -> Tensor:
        """``(P (K K^T + H H^T) + L I)^-1 P K`` for keys (inner, n)."""
        inside = self.projector(keys)
        half = torch.linalg.solve_triangular(self.factor, self.columns.T @ inside, upper=False)
        back = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        solved = (inside - self.columns @ back) / self.l2
        small = torch.eye(keys.shape[1], dtype=solved.dtype, device=solved.device) + inside.T @ solved
        return torch.linalg.solve(small.T, solved.T).T
