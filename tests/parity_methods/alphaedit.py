"""AlphaEdit: as MEMIT, in a null space and clear of the keys of earlier edits; what it remembers is compared too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from manyedits.methods.alphaedit import AlphaEdit
from manyedits.methods.base import EditMethod
from manyedits.methods.null_space import History, Projector
from parity_methods.edits import Hparams, Tensors
from parity_methods.memit import SpreadAdapter
from parity_methods.stage import Stage, spread_params
from parity_methods.table import CLOSED_FLOAT32, EQUAL, LOOP, Case, Rule, Table


class AlphaEditAdapter(SpreadAdapter):
    method: ClassVar[str] = "alphaedit"
    closed: ClassVar[float] = CLOSED_FLOAT32
    counted: ClassVar[tuple[str, ...]] = (".steps", ".null_rank")

    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        params = AlphaEdit.Params(
            **spread_params(stage, hparams), threshold=hparams["nullspace_threshold"], l2=hparams["L2"]
        )
        return AlphaEdit(params)

    def rules(self, hparams: Hparams) -> Sequence[Rule]:
        return (*super().rules(hparams), Rule("cache_c|logprob_batch1", 7, LOOP))

    def remembered(self, stage: Stage, method: EditMethod, case: Case) -> Tensors:
        state = method.state()
        keys = [state[f"keys.{layer}"].double() for layer in method.params.layers]
        sums = torch.stack([k.T @ k for k in keys])
        earlier = {"logprob_batch1": stage.log_probabilities(case.earlier)} if case.earlier else {}
        return {"cache_c": sums, **earlier}

    def variant(self, stage: Stage, table: Table, variant: str, hparams: Hparams) -> None:
        """The projector before anything else."""
        super().variant(stage, table, variant, hparams)
        case = Case(self.method, variant, "-", f"{variant}.", ())
        found = [self._projector(stage, hparams, stage.model.mlp_out(layer)) for layer in hparams["layers"]]
        ranks = stage.golden.notes(self.method)["scalars"].get(f"{variant}.null_rank", {}).get("value")
        if ranks is not None:
            off = max(abs(p.rank - rank) for p, rank in zip(found, ranks, strict=True))
            table.judge(case, 6, "null_rank", float(off), EQUAL)
        if f"{variant}.P" in table.recorded:
            whole = torch.stack([p(torch.eye(len(p.basis))) for p in found])
            table.compare(case, "P", Rule("P", 6, CLOSED_FLOAT32, label=" (closed form)"), whole)

    @staticmethod
    def _projector(stage: Stage, hparams: Hparams, site: str) -> Projector:
        return Projector.onto_null_space(stage.golden.moments[site], hparams["nullspace_threshold"])

    def right(self, stage: Stage, hparams: Hparams, site: str, keys: Tensor, theirs: Tensors) -> Tensor:
        history = History(self._projector(stage, hparams, site), hparams["L2"])
        if "logprob_batch1" in theirs:
            layer = [stage.model.mlp_out(n) for n in hparams["layers"]].index(site)
            history.add(self._root(stage.golden.tensors(self.method)["std.batch8.cache_c"][layer]))
        return history.spread(keys)

    @staticmethod
    def _root(total: Tensor) -> Tensor:
        """Columns whose products sum up to a recorded (inner, inner) total."""
        values, vectors = torch.linalg.eigh(total.double())
        return vectors * values.clamp(min=0).sqrt()


ADAPTER = AlphaEditAdapter()
