"""The loop over layers that MEMIT and its kin share, given a solver.

Targets are found once, at the last layer. Then, layer by layer, the part of the residual that this layer is to carry is
spread over the keys of the moment, in a model that already has the earlier layers' changes (MEMIT, arXiv:2210.07229,
algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor

from manyedits.changes import AnyChange, LowRank
from manyedits.data import Request
from manyedits.methods.base import Recorder
from manyedits.methods.keys import mean_keys
from manyedits.model import EditableModel
from manyedits.tokens import FactToken

#: From (layer, keys (inner, n)) to the right factor (inner, n) of the layer's change.
Solver = Callable[[int, Tensor], Tensor]


def spread_over_layers(
    model: EditableModel,
    requests: Sequence[Request],
    targets: Tensor,
    layers: Sequence[int],
    contexts: Sequence[Sequence[str]],
    which: FactToken,
    solve: Solver,
    recorder: Recorder | None = None,
) -> tuple[tuple[AnyChange, ...], Tensor]:
    """One low-rank change per layer, and what was still missing at the last one, (n, hidden).

    ``targets`` (n, hidden) are the vectors wanted after the last layer's block.
    """
    changes: list[AnyChange] = []
    residual = targets
    with ExitStack() as tried:
        for remaining, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            keys, current = mean_keys(model, layer, requests, contexts, which, model.block(layers[-1]))
            residual = (targets - current).double()
            right = solve(layer, keys.T)
            change = LowRank(f"{model.mlp_out(layer)}.weight", (residual / remaining).T.float(), right.float())
            changes.append(change)
            tried.enter_context(model.trying([change]))
            _note(recorder, layer, keys, current, change)
    return tuple(changes), residual.float()


def _note(recorder: Recorder | None, layer: int, keys: Tensor, current: Tensor, change: LowRank) -> None:
    if recorder is not None:
        recorder.add(f"layer{layer}.K", keys)
        recorder.add(f"layer{layer}.cur_z", current)
        recorder.add(f"layer{layer}.delta_W", change.delta())
