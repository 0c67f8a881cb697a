"""ROME: one rank-one change; keys and outputs of the bare prompt and of all contexts, the search, u, v."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from manyedits.hooks import capture
from manyedits.methods.base import EditMethod
from manyedits.methods.rome import Rome
from manyedits.methods.solve import Factored, Identity, rank_one
from manyedits.tokens import lookup_rows
from parity_methods.edits import EditAdapter, Hparams, Tensors, first_evaluation, without_padding
from parity_methods.stage import Stage, context_params, value_params
from parity_methods.table import CLOSED, CLOSED_FLOAT32, FORWARD, GRADIENT, LOOP, Broken, Case, Rule

LAST = "`last` is the end of the padded batch there, the prompt's last token here"

RULES = (
    Rule("keys_per_template|cur_input", 3, FORWARD),
    Rule("cur_output|logprob_before", 3, FORWARD, edited=LOOP),
    Rule("losses", 4, FORWARD, edited=LOOP, part=first_evaluation, label="[0]"),
    Rule("grad_step0", 4, GRADIENT, edited=LOOP),
    Rule("delta_steps|losses|target", 5, LOOP),
    Rule("u", 7, CLOSED_FLOAT32),
    Rule("v|delta_W|logprob_after|W_final|logprob_final", 7, LOOP),
)


class RomeAdapter(EditAdapter):
    method: ClassVar[str] = "rome"
    default: ClassVar[str] = "cov"
    #: What does not depend on the position of `delta` stays comparable: the loss at delta 0, and the bare prompt's key
    #: and output, which were read without any padding.
    broken: ClassVar[tuple[Broken, ...]] = (
        Broken("last", "grad_step0", frozenset({4}), LAST),
        Broken("last", "losses|delta_steps|target", frozenset({5}), LAST),
        Broken("last", "u|v|delta_W|logprob_after", frozenset({7}), LAST),
    )

    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        (layer,) = hparams["layers"]
        params = Rome.Params(
            layer=layer,
            value=value_params(hparams),
            contexts=context_params([stage.golden.contexts["rome"]]),
            covariance=hparams["mom2_adjustment"],
        )
        return Rome(params)

    def rules(self, hparams: Hparams) -> Sequence[Rule]:
        return RULES

    def named(self, recorded: Tensors) -> Tensors:
        ours = {
            name: tensor[0] if name in ("grad_step0", "delta_steps") else tensor for name, tensor in recorded.items()
        }
        return {**ours, "delta_steps": without_padding(ours["delta_steps"], ours["losses"])}

    def closed_forms(self, stage: Stage, hparams: Hparams, theirs: Tensors) -> Iterator[tuple[str, Tensor, float]]:
        site = stage.model.mlp_out(hparams["layers"][0])
        adjusted = hparams["mom2_adjustment"]
        if {"u", "keys_per_template"} <= theirs.keys():
            memory = Factored(stage.golden.moments[site]) if adjusted else Identity()
            direction = memory.solve(theirs["keys_per_template"].double().mean(0)[:, None])[:, 0]
            yield "u", direction / direction.norm(), CLOSED_FLOAT32 if adjusted else CLOSED
        if {"u", "v", "cur_input", "cur_output", "target"} <= theirs.keys():
            yield "v", rank_one(theirs["u"], theirs["cur_input"], theirs["target"], theirs["cur_output"]), CLOSED
        if {"u", "v", "delta_W"} <= theirs.keys():
            whole = torch.outer(theirs["v"].double(), theirs["u"].double())
            yield "delta_W", stage.stored(f"{site}.weight", whole), CLOSED

    def lookups(self, stage: Stage, hparams: Hparams, case: Case, theirs: Tensors) -> Iterator[tuple[str, int]]:
        """The token whose key is nearest to the recorded one, against the token where we look the fact up."""
        site = stage.model.mlp_out(hparams["layers"][0])
        wanted = {"cur_input": ["{}"], "keys_per_template": stage.golden.contexts["rome"]}
        for name, contexts in wanted.items():
            if name in theirs and not case.earlier:
                recorded = theirs[name].reshape(len(contexts), -1)
                yield f"lookup of {name}", max(self._off(stage, hparams, site, case, contexts, recorded))

    @staticmethod
    def _off(
        stage: Stage, hparams: Hparams, site: str, case: Case, contexts: Sequence[str], recorded: Tensor
    ) -> list[int]:
        (request,) = stage.chosen(case.requests)
        tokenizer = stage.model.tokenizer
        found = []
        for (_, position), context, key in zip(
            lookup_rows(tokenizer, [request], contexts, hparams["fact_token"]), contexts, recorded, strict=True
        ):
            ids = tokenizer(request.template(context)[0], return_tensors="pt")["input_ids"]
            keys = capture(stage.model.hf, {"input_ids": ids}, {site: "in"})[site][0]
            found.append(abs(int((keys - key).norm(dim=1).argmin()) - position))
        return found


ADAPTER = RomeAdapter()
