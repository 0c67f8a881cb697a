"""MEMIT: many facts at once, spread over several layers (Meng et al. 2023, arXiv:2210.07229).

For n requests the vectors wanted after the last of ``layers`` are found first. Then each layer, from the lowest, carries its
share of what is still missing (eq. 20, algorithm 1): with keys ``K`` (inner, n) of the moment and residual ``R`` (hidden, n),

    W += R / (layers left) * K^T (weight C + K K^T)^-1        (eq. 14)

``C`` is the uncentred second moment of the layer's keys and ``weight`` says how many keys it stands for. The solve is in 64
bit and in Woodbury form: an n by n system per layer and batch.

Known deviations of published code: the paper this project is about runs MEMIT with one request per batch; that is
``batch: 1`` of an experiment here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from manyedits.data import Request
from manyedits.methods.base import Edit, EditMethod, MethodParams, Need, Supplies
from manyedits.methods.contexts import context_groups
from manyedits.methods.layers import Aim, SpreadParams, moments_by_layer, spread_over_layers
from manyedits.methods.solve import Factored
from manyedits.methods.value import find_values
from manyedits.model import EditableModel


class MemitParams(SpreadParams):
    """Parameters of MEMIT; the defaults are those of the authors' release for GPT-2 XL."""

    weight: float = Field(20_000.0, gt=0, description="How many keys C stands for in the solve. Count.")


class Memit(EditMethod):
    """One low-rank change per layer, of rank n for n requests. EMMET and AlphaEdit replace ``remember`` and ``solve``."""

    Params: ClassVar[type[MethodParams]] = MemitParams
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUBJECT, Need.ADDITIVE_MLP, Need.STATISTICS})

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:
        self.contexts = context_groups(model, self.params.contexts, supplies)
        moments = moments_by_layer(model, self.params.layers, model.mlp_out, self.params.moments, supplies)
        self.remember(moments, supplies)

    def remember(self, moments: dict[int, Tensor], supplies: Supplies) -> None:
        """Keep of the second moments (inner, inner), by layer, what ``solve`` needs."""
        self.memory = {n: Factored(c, self.params.moments.ridge, f"layer {n}") for n, c in moments.items()}

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        layers, value = self.params.layers, self.params.value
        block = model.block(layers[-1])
        flat = [context for group in self.contexts for context in group]
        found = find_values(model, requests, layers[-1], block, flat, value, self.recorder)
        aims = [Aim(model.mlp_out, block, found.target, self.solve)]
        changes, missing = spread_over_layers(
            model, requests, aims, layers, self.contexts, value.fact_token, self.recorder
        )
        self.record("z", found.target)
        self.record("losses", found.losses)
        return Edit(changes, info={"residual": missing})

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """The right factor (inner, n) of a layer's change, for keys (inner, n)."""
        return self.memory[layer].spread(keys, self.params.weight)
