"""R-ROME: ROME with one and the same key everywhere (Gupta et al. 2024, arXiv:2403.07175).

ROME's change (arXiv:2202.05262, eq. 2)

    W += (v - W k) (C^-1 k)^T / ((C^-1 k) . k)

has the key ``k`` (inner,) four times. ROME's release puts the mean over contexts into ``C^-1 k`` and the bare prompt's key
into the other places, and the authors of R-ROME trace the edits that disable a model to that. Here ``key`` says which
one stands in all of them:

* ``prefix_keys``, the release's default: the mean over all contexts, the bare prompt among them, with the mean output;
* ``prompt_keys``: the bare prompt's key, with its output ``W k`` (hidden,).

The search for ``v`` is ROME's, contexts included, and ``v`` is the bare prompt's output plus what was found, in both.

Known deviations of later toolkits, as parameters: ``covariance: false`` puts the unit matrix in the place of ``C``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from manyedits.data import Request
from manyedits.methods.base import Edit, EditMethod, MethodParams, Need, Supplies
from manyedits.methods.keys import output_for
from manyedits.methods.rank_one import Found, RankOneParams, contexts_and_memory, look_up, write
from manyedits.model import EditableModel


class RRomeParams(RankOneParams):
    """Parameters of R-ROME; the defaults are those of the authors' release for GPT-2 XL."""

    key: Literal["prompt_keys", "prefix_keys"] = Field(
        "prefix_keys", description="The key in all places: the bare prompt's, or the mean over contexts."
    )


class RRome(EditMethod):
    """One rank-one change per request; one request at a time."""

    Params: ClassVar[type[MethodParams]] = RRomeParams
    batch: ClassVar[int | None] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SUBJECT, Need.ADDITIVE_MLP})

    def requires(self) -> frozenset[Need]:
        return self.needs | {Need.STATISTICS} if self.params.covariance else self.needs

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:
        self.contexts, self.memory = contexts_and_memory(model, self.params, supplies)

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        (request,) = requests
        found = look_up(model, request, self.params, self.contexts, self.recorder)
        key, output = self._key_and_output(model, found)
        direction = self.memory.solve(key[:, None])[:, 0]
        return write(found, direction, key, output, self.recorder)

    def _key_and_output(self, model: EditableModel, found: Found) -> tuple[Tensor, Tensor]:
        """(inner,) and (hidden,) that stand for the subject."""
        if self.params.key == "prompt_keys":
            return found.keys[0], found.initial
        key = found.keys.mean(dim=0)
        return key, output_for(model, found.site, key)
