"""R-ROME: as ROME, with the key of the variant in all places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from manyedits.methods.base import EditMethod
from manyedits.methods.r_rome import RRome
from manyedits.methods.solve import Factored, rank_one
from parity_methods.edits import EditAdapter, Hparams, Tensors, first_evaluation, without_padding
from parity_methods.stage import Stage, context_params, value_params
from parity_methods.table import CLOSED, CLOSED_FLOAT32, FORWARD, GRADIENT, LOOP, Rule

RULES = (
    Rule("cur_input", 3, FORWARD),
    Rule("cur_output|logprob_before", 3, FORWARD, edited=LOOP),
    Rule("losses", 4, FORWARD, edited=LOOP, part=first_evaluation, label="[0]"),
    Rule("grad_step0", 4, GRADIENT, edited=LOOP),
    Rule("delta_steps|losses|target", 5, LOOP),
    Rule("u", 7, CLOSED_FLOAT32),
    Rule("v|delta_W|logprob_after|W_final|logprob_final", 7, LOOP),
)


class RRomeAdapter(EditAdapter):
    method: ClassVar[str] = "r_rome"
    default: ClassVar[str] = "prompt_keys"

    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        (layer,) = hparams["layers"]
        params = RRome.Params(
            layer=layer,
            value=value_params(hparams),
            contexts=context_params([stage.golden.contexts["rome"]]),
            covariance=hparams["mom2_adjustment"],
            key="prompt_keys" if hparams["enable_prompt_keys"] else "prefix_keys",
        )
        return RRome(params)

    def rules(self, hparams: Hparams) -> Sequence[Rule]:
        return RULES

    def named(self, recorded: Tensors) -> Tensors:
        ours = {
            name: tensor[0] if name in ("grad_step0", "delta_steps") else tensor for name, tensor in recorded.items()
        }
        return {**ours, "delta_steps": without_padding(ours["delta_steps"], ours["losses"])}

    def closed_forms(self, stage: Stage, hparams: Hparams, theirs: Tensors) -> Iterator[tuple[str, Tensor, float]]:
        """The recorded key is the one in all places, so ``u`` follows from it alone."""
        site = stage.model.mlp_out(hparams["layers"][0])
        if {"u", "cur_input"} <= theirs.keys():
            direction = Factored(stage.golden.moments[site]).solve(theirs["cur_input"][:, None])[:, 0]
            yield "u", direction / direction.norm(), CLOSED_FLOAT32
        if {"u", "v", "cur_input", "cur_output", "target"} <= theirs.keys():
            yield "v", rank_one(theirs["u"], theirs["cur_input"], theirs["target"], theirs["cur_output"]), CLOSED
        if {"u", "v", "delta_W"} <= theirs.keys():
            whole = torch.outer(theirs["v"].double(), theirs["u"].double())
            yield "delta_W", stage.stored(f"{site}.weight", whole), CLOSED


ADAPTER = RRomeAdapter()
