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

from manyedits.data import Request
from manyedits.methods.base import Edit, EditMethod, MethodParams, Need, Supplies
from manyedits.methods.rank_one import RankOneParams, contexts_and_memory, look_up, write
from manyedits.model import EditableModel


class RomeParams(RankOneParams):
    """Parameters of ROME; the defaults are those of the authors' release for GPT-2 XL."""


class Rome(EditMethod):
    """One rank-one change per request; one request at a time."""

    Params: ClassVar[type[MethodParams]] = RomeParams
    batch: ClassVar[int | None] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUBJECT, Need.ADDITIVE_MLP})

    def requires(self) -> frozenset[Need]:
        return self.needs | {Need.STATISTICS} if self.params.covariance else self.needs

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:
        self.contexts, self.memory = contexts_and_memory(model, self.params, supplies)

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        (request,) = requests
        found = look_up(model, request, self.params, self.contexts, self.recorder)
        direction = self.memory.solve(found.keys.mean(dim=0)[:, None])[:, 0]
        return write(found, direction, found.keys[0], found.initial, self.recorder)
