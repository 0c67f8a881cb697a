"""EMMET: as MEMIT, with equality in the place of least squares."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from manyedits.methods.base import EditMethod
from manyedits.methods.emmet import Emmet
from manyedits.methods.solve import Factored, equality
from parity_methods.edits import Hparams, Tensors
from parity_methods.memit import SpreadAdapter
from parity_methods.stage import Stage, spread_params


class EmmetAdapter(SpreadAdapter):
    method: ClassVar[str] = "emmet"

    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        params = Emmet.Params(
            **spread_params(stage, hparams),
            weight=hparams["mom2_update_weight"],
            norm_weight=hparams["update_norm_lambda"],
            damping=hparams["emmet_lambda"],
        )
        return Emmet(params)

    def right(self, stage: Stage, hparams: Hparams, site: str, keys: Tensor, theirs: Tensors) -> Tensor:
        weighted = hparams["mom2_update_weight"] * stage.golden.moments[site].double()
        weighted += hparams["update_norm_lambda"] * torch.eye(len(weighted), dtype=torch.float64)
        damping = hparams["emmet_lambda"] if keys.shape[1] > 1 else 0.0
        return equality(Factored(weighted), keys, damping)


ADAPTER = EmmetAdapter()
