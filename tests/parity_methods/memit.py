"""MEMIT: keys, what is missing and the change at every layer, after one search at the last; and what its kin share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from manyedits.methods.base import EditMethod
from manyedits.methods.memit import Memit
from manyedits.methods.solve import Factored
from parity_methods.edits import EditAdapter, Hparams, Tensors, first_evaluation, without_padding
from parity_methods.stage import Stage, spread_params
from parity_methods.table import CLOSED, FORWARD, GRADIENT, LOOP, Rule


class SpreadAdapter(EditAdapter):
    """A method that spreads a residual over layers with a solve of its own."""

    default: ClassVar[str] = "std"
    closed: ClassVar[float] = CLOSED  # tolerance of the closed form alone

    @abstractmethod
    def right(self, stage: Stage, hparams: Hparams, site: str, keys: Tensor, theirs: Tensors) -> Tensor:
        """The right factor (inner, n) for recorded keys (inner, n) at a site."""

    def rules(self, hparams: Hparams) -> Sequence[Rule]:
        first = hparams["layers"][0]
        later = "|".join(str(layer) for layer in hparams["layers"][1:]) or "none"
        return (
            Rule(rf"layer{first}\.(K|cur_z)|logprob_before", 3, FORWARD, edited=LOOP),
            Rule("losses", 4, FORWARD, edited=LOOP, part=first_evaluation, label="[0]"),
            Rule("grad_step0", 4, GRADIENT, edited=LOOP),
            Rule("delta_steps0|losses|z", 5, LOOP),
            Rule(rf"layer({later})\.(K|cur_z)", 7, LOOP),
            Rule(r"layer\d+\.delta_W|logprob_after|delta_total\..+|logprob_final", 7, LOOP),
        )

    def named(self, recorded: Tensors) -> Tensors:
        ours = {name: tensor for name, tensor in recorded.items() if not name.endswith("delta_W")}
        if "delta_steps" in ours:
            ours["delta_steps0"] = without_padding(ours["delta_steps"][0], ours["losses"][0])
        return ours

    def closed_forms(self, stage: Stage, hparams: Hparams, theirs: Tensors) -> Iterator[tuple[str, Tensor, float]]:
        layers = hparams["layers"]
        for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            if {"z", *(f"layer{layer}.{name}" for name in ("K", "cur_z", "delta_W"))} <= theirs.keys():
                site = stage.model.mlp_out(layer)
                right = self.right(stage, hparams, site, theirs[f"layer{layer}.K"].T, theirs)
                missing = (theirs["z"] - theirs[f"layer{layer}.cur_z"]).double() / left
                yield f"layer{layer}.delta_W", stage.stored(f"{site}.weight", missing.T @ right.T), self.closed


class MemitAdapter(SpreadAdapter):
    method: ClassVar[str] = "memit"

    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        return Memit(Memit.Params(**spread_params(stage, hparams), weight=hparams["mom2_update_weight"]))

    def right(self, stage: Stage, hparams: Hparams, site: str, keys: Tensor, theirs: Tensors) -> Tensor:
        return Factored(stage.golden.moments[site]).spread(keys, hparams["mom2_update_weight"])


ADAPTER = MemitAdapter()
