"""The closed forms, in 64 bit: factor once, then solve small.

A covariance is fixed while a model is edited, so it is factored once per layer (Cholesky). A batch of n edits then costs
an n by n system by the Woodbury identity instead of one as wide as the MLP:

    (w C + K K^T)^-1 K  =  X (I + K^T X)^-1   with   X = (w C)^-1 K
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyedits.errors import UserError


class Factored:
    """A covariance (inner, inner) with a ridge on its diagonal, factored in 64 bit.

    ``ridge`` is a share of the diagonal's mean. Raises ``UserError`` when the matrix is not positive definite.
    """

    def __init__(self, covariance: Tensor, ridge: float = 0.0, name: str = "the layer") -> None:
        matrix = covariance.double().clone()
        if ridge:
            matrix.diagonal().add_(ridge * matrix.diagonal().mean())
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            raise UserError(
                f"The second moment of the keys at {name} is singular in 64 bit: some neurons never fire.",
                "Set `moments: {ridge: 0.01}` in the method's parameters, or gather the statistics over more text.",
            )

    def solve(self, right: Tensor) -> Tensor:
        """``C^-1 right`` for (inner, n)."""
        # cholesky_solve copies the factor at every call; these two read it where it is.
        half = torch.linalg.solve_triangular(self.factor, right.double(), upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, half, upper=True)

    def spread(self, keys: Tensor, weight: float) -> Tensor:
        """``(weight C + K K^T)^-1 K`` for keys (inner, n), through an n by n system."""
        keys = keys.double()
        solved = self.solve(keys) / weight
        small = torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device) + keys.T @ solved
        return torch.linalg.solve(small.T, solved.T).T


def equality(memory: Factored, keys: Tensor, damping: float) -> Tensor:
    """``C^-1 K (K^T C^-1 K + damping I)^-1`` for keys (inner, n): with damping 0, what maps each key onto its own unit.

    Raises ``UserError`` when keys are so alike that no change can tell them apart.
    """
    keys = keys.double()
    solved = memory.solve(keys)
    small = keys.T @ solved
    small.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(small)
    if bool(failed):
        raise UserError(
            f"The keys of these {keys.shape[1]} requests are too much alike to be told apart in 64 bit.",
            "Set `damping` in the method's parameters, or take requests about different subjects into a batch.",
        )
    return torch.cholesky_solve(solved.T, factor).T


class Identity:
    """The unit matrix in place of a covariance: what "ROME without covariance" amounts to."""

    def solve(self, right: Tensor) -> Tensor:
        """``right`` itself, in 64 bit."""
        return right.double()


def rank_one(direction: Tensor, key: Tensor, target: Tensor, output: Tensor) -> Tensor:
    """The left vector of ROME's change (arXiv:2202.05262, eq. 2): ``(target - output) / (key . direction)``.

    ``direction`` (inner,) is ``C^-1 k``, of any length; with it as the right vector the edited layer maps ``key``
    (inner,) from ``output`` to ``target`` (hidden,).
    """
    return (target.double() - output.double()) / (key.double() @ direction.double())
