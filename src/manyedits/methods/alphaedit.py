"""AlphaEdit: edits that stay out of the way of what a layer holds (Fang et al. 2025, arXiv:2410.02355).

As MEMIT, but each layer's change is confined to the null space of its usual keys, and remembers earlier edits. With the
projector ``P`` (inner, inner) onto the eigenvectors of the second moment ``C`` whose eigenvalue is below ``threshold``, keys
``K`` (inner, n), residual ``R`` (hidden, n) and the keys ``H`` (inner, m) of all earlier edits,

    W += R / (layers left) * [(P (K K^T + H H^T) + l2 I)^-1 P K]^T

``H`` holds the keys as they are in the model after their own edit, for every layer, as the release gathers them. They are
the method's state: m vectors per layer, in place of the release's (inner, inner) sums. Solves are in 64 bit and as small as
n and m (`null_space.py`); the release solves in 32 bit and as wide as the MLP.

Known deviations of published code, as parameters: the release's ``threshold: 0.02, l2: 10`` are the defaults here. The paper
has the unit matrix (``l2: 1``) and a threshold of 0.01 (from memory, not read again); EasyEdit has ``l2: 1``. EasyEdit keeps
``P`` and ``H`` in globals that the next model or experiment inherits; here they belong to one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from manyedits.data import Request
from manyedits.errors import UserError
from manyedits.methods.base import Edit, MethodParams, Supplies
from manyedits.methods.keys import keys_and_outputs, mean_over_types
from manyedits.methods.layers import SpreadParams
from manyedits.methods.memit import Memit
from manyedits.methods.null_space import History, Projector
from manyedits.model import EditableModel, tensors_digest


class AlphaEditParams(SpreadParams):
    """Parameters of AlphaEdit; the defaults are those of the authors' release for GPT-2 XL."""

    threshold: float = Field(
        0.02, gt=0, description="Eigenvalues of C below this span the null space. Squared activation."
    )
    l2: float = Field(10.0, gt=0, description="Weight of the change's own norm in the solve. Squared activation.")


class AlphaEdit(Memit):
    """One low-rank change per layer, of rank n for n requests; remembers the keys of all of them."""

    Params: ClassVar[type[MethodParams]] = AlphaEditParams

    def __init__(self, params: MethodParams) -> None:
        super().__init__(params)
        self.projectors: dict[int, Projector] = {}
        self.forget()

    def remember(self, moments: dict[int, Tensor], supplies: Supplies) -> None:
        self.projectors = {n: _projector(n, c, self.params.threshold, supplies) for n, c in moments.items()}
        self.forget()

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        return self.histories[layer].spread(keys)

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        edit = super().edit(model, requests)
        with model.trying(edit.changes):
            keys = self._keys(model, requests)
        state = {f"keys.{layer}": keys[layer] for layer in self.params.layers}
        return replace(edit, state={**state, "sizes": torch.tensor([len(requests)])})

    def _keys(self, model: EditableModel, requests: Sequence[Request]) -> dict[int, Tensor]:
        """The requests' keys (n, inner) at every layer, in one pass."""
        sites = {layer: model.mlp_out(layer) for layer in self.params.layers}
        flat = [context for group in self.contexts for context in group]
        which = self.params.value.fact_token
        seen = keys_and_outputs(model, requests, flat, which, dict.fromkeys(sites.values(), "in"))
        return {layer: mean_over_types(seen[site], self.contexts) for layer, site in sites.items()}

    # --- what lasts from edit to edit -------------------------------------------------------------------------------

    def recall(self, edit: Edit) -> None:
        """Add the edit's keys, in the blocks in which they were gathered."""
        if not edit.state:
            return
        sizes = edit.state["sizes"].tolist()
        self.sizes += sizes
        for layer, history in self.histories.items():
            keys = edit.state[f"keys.{layer}"]
            self.keys[layer].append(keys)
            for block in keys.split(sizes):
                history.add(block.T.to(history.columns.device))

    def forget(self) -> None:
        self.sizes: list[int] = []
        self.keys: dict[int, list[Tensor]] = {layer: [] for layer in self.projectors}
        self.histories = {layer: History(p, self.params.l2) for layer, p in self.projectors.items()}

    def state(self) -> Mapping[str, Tensor]:
        if not self.sizes:
            return {}
        kept = {f"keys.{layer}": torch.cat([block.cpu() for block in blocks]) for layer, blocks in self.keys.items()}
        return {**kept, "sizes": torch.tensor(self.sizes)}


def _projector(layer: int, moment: Tensor, threshold: float, supplies: Supplies) -> Projector:
    """The projector of a layer from the store, or from the eigen-decomposition of its second moment (inner, inner)."""

    def decompose(folder: Path) -> dict[str, Tensor]:
        found = Projector.onto_null_space(moment, threshold)
        return {"basis": found.basis.cpu(), "complement": torch.tensor(found.complement)}

    key = {"moment": tensors_digest({"moment": moment}), "threshold": threshold, "form": 1}
    stored = supplies.artifacts.get_or_build("null_space", key, decompose)
    projector = Projector(stored["basis"].to(moment.device), bool(stored["complement"]))
    if not projector.rank:
        raise UserError(
            f"Layer {layer} has no null space: no eigenvalue of its keys' second moment is below {threshold}.",
            "Raise `threshold` in the method's parameters; it is in squared activations, which differ between models.",
        )
    return projector
