"""PMET: attention and MLP optimised together, the MLP edited (Li et al. 2024, arXiv:2308.08742).

MEMIT looks for one vector after the last of ``layers``. PMET looks for two at once, one added to the output of attention's
projection and one to the output of the MLP's way out, at the subject's token of that layer, so that what belongs to
attention is not pressed into the MLP. Each has its own decay and clamp in the loss (`value.py`). As published only the MLP's
vector is then written, layer by layer from the lowest: with keys ``K`` (inner, n) and residual ``R`` (hidden, n) of the
MLP's output at the last layer,

    W += R / sqrt(layers left) * K^T (weight C + K K^T)^-1

``attn_and_mlp: true`` writes attention's vector in the same way, before the MLP's in each layer. The solve is MEMIT's.

A request's search eases off once its target is the likeliest answer in all contexts: the likelihood then weighs
``sure_weight`` of what it did, and the request is finished when its KL term is at most ``sure_kl``. The release tests that
by comparing two mean probabilities for equality; here the target's tokens are compared with the likeliest ones.

Known deviations of published code, not reproduced: the release guesses a weight's orientation from its shape, so on GPT-2
attention's change is added transposed. The code of the paper this project is about trains PMET on a stray start token and on
positions that left padding has moved (Llama, GPT-2). On GPT-J the release reads the keys of both modules before it changes
either; there the two stand side by side, so nothing depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from manyedits.data import Request
from manyedits.methods.base import Edit, EditMethod, MethodParams, Need, Supplies, ValueParams
from manyedits.methods.contexts import context_groups
from manyedits.methods.layers import Aim, SpreadParams, spread_over_layers
from manyedits.methods.moments import second_moments
from manyedits.methods.solve import Factored
from manyedits.methods.value import Easing, Place, Values, find_values_at
from manyedits.model import EditableModel


class PmetValueParams(ValueParams):
    """The search for two vectors; the defaults are those of the authors' release for GPT-J."""

    steps: int = Field(30, ge=1, description="Evaluations of the loss; one optimiser step fewer is made. Count.")
    step_size: float = Field(0.2, gt=0, description="Adam's learning rate, in the units `step_unit` names.")
    clamp: float = Field(0.75, gt=0, description="Largest |delta| as a multiple of its initial vector's norm. Ratio.")
    kl_weight: float = Field(1.0, ge=0, description="Weight of the KL term that keeps the subject's essence. Ratio.")
    sure_weight: float = Field(
        0.1, ge=0, description="Weight of the likelihood while the target is the likeliest in all contexts. Ratio."
    )
    sure_kl: float = Field(
        0.01, ge=0, description="Such a request is finished once its weighted KL term is at most this. Nats."
    )


class PmetParams(SpreadParams):
    """Parameters of PMET; the defaults are those of the authors' release for GPT-J."""

    layers: tuple[int, ...] = Field((3, 4, 5, 6, 7, 8), min_length=1, description="Edited layers, rising. Indices.")
    value: PmetValueParams = Field(default_factory=PmetValueParams, description="The search for the two vectors.")
    weight: float = Field(6000.0, gt=0, description="How many keys C stands for in the solve. Count.")
    attn_and_mlp: bool = Field(False, description="Whether attention's projection is edited as well as the MLP.")


class Pmet(EditMethod):
    """One low-rank change per layer and edited module, of rank n for n requests."""

    Params: ClassVar[type[MethodParams]] = PmetParams
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUBJECT, Need.ADDITIVE_MLP, Need.STATISTICS})

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:
        self.contexts = context_groups(model, self.params.contexts, supplies)
        paths = self._paths(model)
        sites = {(name, layer): path(layer) for name, path in paths.items() for layer in self.params.layers}
        moments = second_moments(model, list(sites.values()), self.params.moments, supplies)
        ridge = self.params.moments.ridge
        self.memory = {at: Factored(moments[site].to(model.device), ridge, site) for at, site in sites.items()}

    def _paths(self, model: EditableModel) -> Mapping[str, Callable[[int], str]]:
        """The edited modules by layer, in the order in which they are edited."""
        return {"attn": model.attn_out, "mlp": model.mlp_out} if self.params.attn_and_mlp else {"mlp": model.mlp_out}

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        found = self._find(model, requests)
        mlp, attention = found.target.chunk(2, dim=1)
        wanted, last = {"mlp": mlp, "attn": attention}, self.params.layers[-1]
        aims = [
            Aim(path, path(last), wanted[name], partial(self._solve, name), math.sqrt, name)
            for name, path in self._paths(model).items()
        ]
        changes, missing = spread_over_layers(
            model, requests, aims, self.params.layers, self.contexts, self.params.value.fact_token, self.recorder
        )
        for name, tensor in {"z_mlp": mlp, "z_attn": attention, "losses": found.losses}.items():
            self.record(name, tensor)
        return Edit(changes, info={"residual": missing})

    def _find(self, model: EditableModel, requests: Sequence[Request]) -> Values:
        """Both vectors of every request at the last layer, the MLP's first."""
        value, last = self.params.value, self.params.layers[-1]
        place = Place(last, (model.mlp_out(last), model.attn_out(last)), inside=True)
        flat = [context for group in self.contexts for context in group]
        easing = Easing(value.sure_weight, value.sure_kl)
        return find_values_at(model, requests, place, flat, value, easing, self.recorder)

    def _solve(self, name: str, layer: int, keys: Tensor) -> Tensor:
        """The right factor (inner, n) of a layer's change, for keys (inner, n) of a module."""
        return self.memory[name, layer].spread(keys, self.params.weight)
