"""EMMET: many facts at once under equality (Gupta et al. 2024, arXiv:2403.14236, "A Unified Framework for Model Editing").

MEMIT asks for ``W k = v`` in the sense of least squares; EMMET, as ROME does for one fact, asks for it exactly while what the
layer holds is disturbed least. With keys ``K`` (inner, n) and residual ``R`` (hidden, n) of a layer,

    W += R / (layers left) * D^-1 K^T C'^-1,    D = K^T C'^-1 K,    C' = weight C + norm_weight I

where ``C`` (inner, inner) is the uncentred second moment of the layer's keys. ``D`` (n, n) loses rank when keys are alike,
so the release adds ``damping`` to its diagonal; an edit of one request stays exact. Solves are in 64 bit: ``C'`` is factored
once, each batch costs an n by n system.

Known deviations of later toolkits, as parameters: ``damp_single: true`` (EasyEdit) adds ``damping`` for one request too.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from manyedits.methods.base import MethodParams, Supplies
from manyedits.methods.layers import SpreadParams
from manyedits.methods.memit import Memit
from manyedits.methods.solve import Factored, equality


class EmmetParams(SpreadParams):
    """Parameters of EMMET; the defaults are those of the authors' release for GPT-2 XL."""

    layers: tuple[int, ...] = Field((17,), min_length=1, description="Edited layers, rising. Indices.")
    weight: float = Field(1000.0, gt=0, description="How many keys C stands for in the solve. Count.")
    norm_weight: float = Field(
        0.0, ge=0, description="Weight of the change's own norm: added to C's diagonal. Absolute."
    )
    damping: float = Field(0.1, ge=0, description="Added to D's diagonal for several requests. Absolute.")
    damp_single: bool = Field(False, description="Whether a single request is damped as well (EasyEdit).")


class Emmet(Memit):
    """One low-rank change per layer, of rank n for n requests."""

    Params: ClassVar[type[MethodParams]] = EmmetParams

    def remember(self, moments: dict[int, Tensor], supplies: Supplies) -> None:
        ridge = self.params.moments.ridge
        self.memory = {n: Factored(self._weighted(c), ridge, f"layer {n}") for n, c in moments.items()}

    def _weighted(self, moment: Tensor) -> Tensor:
        """C' (inner, inner) in 64 bit."""
        width = len(moment)
        unit = torch.eye(width, dtype=torch.float64, device=moment.device)
        return self.params.weight * moment.double() + self.params.norm_weight * unit

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        damped = keys.shape[1] > 1 or self.params.damp_single
        return equality(self.memory[layer], keys, self.params.damping if damped else 0.0)
