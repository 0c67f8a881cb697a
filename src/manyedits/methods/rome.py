"""ROME: one fact as a rank-one change of one layer (Meng et al. 2022, arXiv:2202.05262).

The MLP's way out of layer ``layer`` is read as a linear memory ``W k = v``. With ``k`` (inner,) the key of the subject and
``v`` (hidden,) the vector that makes the model give the new answer, the change that least disturbs what the memory holds
is (eq. 2)

    W += (v - W k) (C^-1 k)^T / ((C^-1 k) . k)

where ``C`` is the uncentred second moment of keys. As the authors' release does it, ``C^-1`` is applied to the mean key
over contexts, while ``k`` and ``W k`` in the division are those of the bare prompt; R-ROME is the variant with one key.

Known deviations of later toolkits, as parameters: ``covariance: false`` (every ROME configuration of EasyEdit, and so of
the paper this project is about) uses the unit matrix for ``C``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from manyedits.changes import LowRank
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
from manyedits.methods.keys import keys_and_outputs
from manyedits.methods.moments import second_moments
from manyedits.methods.solve import Factored, Identity, rank_one
from manyedits.methods.value import find_values
from manyedits.model import EditableModel


class RomeParams(MethodParams):
    """Parameters of ROME; the defaults are those of the authors' release for GPT-2 XL."""

    layer: int = Field(17, ge=0, description="The edited layer, counted from 0. Index.")
    value: ValueParams = Field(default_factory=ValueParams, description="The search for the vector v.")
    contexts: ContextParams = Field(default_factory=ContextParams, description="Texts put before the prompt.")
    moments: MomentParams = Field(default_factory=MomentParams, description="The second moment C of the keys.")
    covariance: bool = Field(True, description="Whether C is used; false puts the unit matrix in its place (EasyEdit).")


class Rome(EditMethod):
    """One rank-one change per request; one request at a time."""

    Params: ClassVar[type[MethodParams]] = RomeParams
    batch: ClassVar[int | None] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUBJECT, Need.ADDITIVE_MLP})

    def requires(self) -> frozenset[Need]:
        return self.needs | {Need.STATISTICS} if self.params.covariance else self.needs

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:
        groups = context_groups(model, self.params.contexts, supplies)
        self.contexts = [context for group in groups for context in group]
        self.memory: Factored | Identity = Identity()
        if self.params.covariance:
            site = model.mlp_out(self.params.layer)
            moment = second_moments(model, [site], self.params.moments, supplies)[site]
            self.memory = Factored(moment.to(model.device), self.params.moments.ridge, site)

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        (request,) = requests
        site = model.mlp_out(self.params.layer)
        which = self.params.value.fact_token
        seen = keys_and_outputs(model, [request], self.contexts, which, {f"{site}": "in"})[site][0]
        direction = self.memory.solve(seen.mean(dim=0)[:, None])[:, 0]
        values = find_values(model, [request], self.params.layer, site, self.contexts, self.params.value, self.recorder)
        left, right = self._factors(direction, seen[0], values.target[0], values.initial[0])
        self._note(seen, values.initial[0], values.target[0], values.losses, left, right)
        change = LowRank(f"{site}.weight", left[:, None].float(), right[:, None].float())
        return Edit((change,), info={"loss": _last_loss(values.losses), "norm": float(left.norm() * right.norm())})

    @staticmethod
    def _factors(direction: Tensor, key: Tensor, target: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Left (hidden,) and right (inner,), the right one of length 1 as in the release."""
        right = direction / direction.norm()
        return rank_one(right, key, target, output), right

    def _note(self, keys: Tensor, output: Tensor, target: Tensor, losses: Tensor, left: Tensor, right: Tensor) -> None:
        named = {"keys_per_template": keys, "cur_input": keys[0], "cur_output": output, "target": target}
        for name, tensor in {**named, "losses": losses[0], "u": right, "v": left}.items():
            self.record(name, tensor)


def _last_loss(losses: Tensor) -> float:
    """The last total loss that was evaluated, mean over requests, in nats."""
    totals = losses[:, :, 0]
    last = (~totals.isnan()).sum(dim=1) - 1
    return float(totals.gather(1, last[:, None]).mean())
