"""The loop over layers that MEMIT and its kin share, given a solver.

Targets are found once, at the last layer. Then, layer by layer, the part of the residual that this layer is to carry is
spread over the keys of the moment, in a model that already has the earlier changes (MEMIT, arXiv:2210.07229, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from manyedits.changes import AnyChange, LowRank
from manyedits.data import Request
from manyedits.methods.base import ContextParams, MethodParams, MomentParams, Recorder, Supplies, ValueParams
from manyedits.methods.keys import mean_keys
from manyedits.methods.moments import second_moments
from manyedits.model import EditableModel
from manyedits.tokens import FactToken

#: From (layer, keys (inner, n)) to the right factor (inner, n) of the layer's change.
Solver = Callable[[int, Tensor], Tensor]


class SpreadParams(MethodParams):
    """Parameters of every method of this kind; the defaults are those of MEMIT's release for GPT-2 XL."""

    layers: tuple[int, ...] = Field((13, 14, 15, 16, 17), min_length=1, description="Edited layers, rising. Indices.")
    value: ValueParams = Field(
        default_factory=lambda: ValueParams(clamp=0.75), description="The search for the vectors z."
    )
    contexts: ContextParams = Field(
        default_factory=lambda: ContextParams(lengths=((10, 5),)), description="Texts put before the prompt."
    )
    moments: MomentParams = Field(default_factory=MomentParams, description="The second moments C of the keys.")


@dataclass(frozen=True)
class Aim:
    """Vectors that are wanted at one place, and the weights that are to bring them about."""

    path: Callable[[int], str]  # the linear module that is changed, by layer
    read: str  # the module whose output is to be ``targets``
    targets: Tensor  # (n, hidden)
    solve: Solver
    share: Callable[[int], float] = float  # what the residual is divided by, given how many layers are left
    name: str = ""  # under which the recorder keeps this aim's tensors, where there are several


def moments_by_layer(
    model: EditableModel, layers: Sequence[int], path: Callable[[int], str], params: MomentParams, supplies: Supplies
) -> dict[int, Tensor]:
    """The second moments (inner, inner) of what enters the modules at ``path``, on the model's device."""
    sites = {layer: path(layer) for layer in layers}
    moments = second_moments(model, list(sites.values()), params, supplies)
    return {layer: moments[site].to(model.device) for layer, site in sites.items()}


def spread_over_layers(
    model: EditableModel,
    requests: Sequence[Request],
    aims: Sequence[Aim],
    layers: Sequence[int],
    contexts: Sequence[Sequence[str]],
    which: FactToken,
    recorder: Recorder | None = None,
) -> tuple[tuple[AnyChange, ...], float]:
    """One low-rank change per layer and aim, and what was still missing at the end: its mean length over requests."""
    changes: list[AnyChange] = []
    missing: dict[str, float] = {}
    with ExitStack() as tried:
        for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            for aim in aims:
                keys, current = mean_keys(model, aim.path(layer), requests, contexts, which, aim.read)
                residual = (aim.targets - current).double()
                right = aim.solve(layer, keys.T)
                change = LowRank(f"{aim.path(layer)}.weight", (residual / aim.share(left)).T.float(), right.float())
                changes.append(change)
                tried.enter_context(model.trying([change]))
                missing[aim.read] = float(residual.norm(dim=1).mean())
                _note(recorder, f"layer{layer}.{aim.name}".rstrip("."), keys, current, change)
    return tuple(changes), sum(missing.values())


def _note(recorder: Recorder | None, place: str, keys: Tensor, current: Tensor, change: LowRank) -> None:
    if recorder is not None:
        recorder.add(f"{place}.K", keys)
        recorder.add(f"{place}.cur_z", current)
        recorder.add(f"{place}.delta_W", change.delta())
