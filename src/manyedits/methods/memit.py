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
from manyedits.methods.base import (
    ContextParams,
    Edit,
    EditMethod,
    MethodParams,
    MomentParams,
    Need,
    Supplies,
    ValueParams,
)
from manyedits.methods.contexts import context_groups
from manyedits.methods.layers import spread_over_layers
from manyedits.methods.moments import second_moments
from manyedits.methods.solve import Factored
from manyedits.methods.value import find_values
from manyedits.model import EditableModel


class MemitParams(MethodParams):
    """Parameters of MEMIT; the defaults are those of the authors' release for GPT-2 XL."""

    layers: tuple[int, ...] = Field((13, 14, 15, 16, 17), min_length=1, description="Edited layers, rising. Indices.")
    value: ValueParams = Field(
        default_factory=lambda: ValueParams(clamp=0.75), description="The search for the vectors z."
    )
    contexts: ContextParams = Field(
        default_factory=lambda: ContextParams(lengths=((10, 5),)), description="Texts put before the prompt."
    )
    moments: MomentParams = Field(default_factory=MomentParams, description="The second moments C of the keys.")
    weight: float = Field(20_000.0, gt=0, description="How many keys C stands for in the solve. Count.")


class Memit(EditMethod):
    """One low-rank change per layer, of rank n for n requests."""

    Params: ClassVar[type[MethodParams]] = MemitParams
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUBJECT, Need.ADDITIVE_MLP, Need.STATISTICS})

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:
        self.contexts = context_groups(model, self.params.contexts, supplies)
        sites = {layer: model.mlp_out(layer) for layer in self.params.layers}
        moments = second_moments(model, list(sites.values()), self.params.moments, supplies)
        ridge = self.params.moments.ridge
        self.memory = {n: Factored(moments[site].to(model.device), ridge, site) for n, site in sites.items()}

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        layers, value = self.params.layers, self.params.value
        flat = [context for group in self.contexts for context in group]
        found = find_values(model, requests, layers[-1], model.block(layers[-1]), flat, value, self.recorder)
        changes, missing = spread_over_layers(
            model, requests, found.target, layers, self.contexts, value.fact_token, self.solve, self.recorder
        )
        self.record("z", found.target)
        self.record("losses", found.losses)
        return Edit(changes, info={"residual": float(missing.norm(dim=1).mean())})

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """The right factor (inner, n) of a layer's change; what EMMET and AlphaEdit replace."""
        return self.memory[layer].spread(keys, self.params.weight)
