"""What ROME and R-ROME share: the memory, the keys of one request, the search, and the change of rank one.

They differ in a single choice: which key and which output stand in the division (`write`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from manyedits.changes import LowRank
from manyedits.data import Request
from manyedits.methods.base import ContextParams, Edit, MethodParams, MomentParams, Recorder, Supplies, ValueParams
from manyedits.methods.contexts import context_groups
from manyedits.methods.keys import keys_and_outputs
from manyedits.methods.moments import second_moments
from manyedits.methods.solve import Factored, Identity, rank_one
from manyedits.methods.value import find_values
from manyedits.model import EditableModel


class RankOneParams(MethodParams):
    """Parameters of both; the defaults are those of ROME's release for GPT-2 XL."""

    layer: int = Field(17, ge=0, description="The edited layer, counted from 0. Index.")
    value: ValueParams = Field(default_factory=ValueParams, description="The search for the vector v.")
    contexts: ContextParams = Field(default_factory=ContextParams, description="Texts put before the prompt.")
    moments: MomentParams = Field(default_factory=MomentParams, description="The second moment C of the keys.")
    covariance: bool = Field(True, description="Whether C is used; false puts the unit matrix in its place (EasyEdit).")


@dataclass(frozen=True)
class Found:
    """What is known of one request before anything is solved."""

    site: str
    keys: Tensor  # (contexts, inner), the bare prompt's first
    initial: Tensor  # (hidden,): the module's output on the bare prompt
    target: Tensor  # (hidden,): what it should be there
    losses: Tensor  # (steps, 4)


def contexts_and_memory(
    model: EditableModel, params: RankOneParams, supplies: Supplies
) -> tuple[list[str], Factored | Identity]:
    """The contexts, the bare "{}" first, and what solves against the second moment of the edited layer's keys."""
    contexts = [context for group in context_groups(model, params.contexts, supplies) for context in group]
    if not params.covariance:
        return contexts, Identity()
    site = model.mlp_out(params.layer)
    moment = second_moments(model, [site], params.moments, supplies)[site]
    return contexts, Factored(moment.to(model.device), params.moments.ridge, site)


def look_up(
    model: EditableModel, request: Request, params: RankOneParams, contexts: list[str], recorder: Recorder | None
) -> Found:
    """Read a request's keys and search its target vector."""
    site = model.mlp_out(params.layer)
    keys = keys_and_outputs(model, [request], contexts, params.value.fact_token, {site: "in"})[site][0]
    values = find_values(model, [request], params.layer, site, contexts, params.value, recorder)
    return Found(site, keys, values.initial[0], values.target[0], values.losses[0])


def write(found: Found, direction: Tensor, key: Tensor, output: Tensor, recorder: Recorder | None) -> Edit:
    """The change after which ``key`` (inner,) gives the target where it gave ``output`` (hidden,).

    ``direction`` (inner,) is ``C^-1 k``; the right factor is of length 1, as in the releases.
    """
    right = direction / direction.norm()
    left = rank_one(right, key, found.target, output)
    if recorder is not None:
        named = {"keys_per_template": found.keys, "cur_input": key, "cur_output": output, "target": found.target}
        for name, tensor in {**named, "losses": found.losses, "u": right, "v": left}.items():
            recorder.add(name, tensor)
    change = LowRank(f"{found.site}.weight", left[:, None].float(), right[:, None].float())
    return Edit((change,), info={"loss": _last_loss(found.losses), "norm": float(left.norm() * right.norm())})


def _last_loss(losses: Tensor) -> float:
    """The last total loss that was evaluated, in nats."""
    totals = losses[:, 0]
    return float(totals[~totals.isnan()][-1])
