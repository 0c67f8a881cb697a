"""Our implementation on a recorded model: requests, statistics and probabilities in the recordings' own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden import Golden
from manyedits.arch import is_transposed
from manyedits.data import Request
from manyedits.methods.base import ContextParams, Supplies, ValueParams
from manyedits.model import EditableModel
from manyedits.tokens import fact_rows


class RecordedStatistics:
    """In place of the store of slow things: hands out the recorded second moments; whatever else is wanted is made."""

    def __init__(self, moments: Mapping[str, Tensor]) -> None:
        self.moments = moments

    def get_or_build(self, kind: str, key: Mapping[str, Any], build: Callable[..., Any]) -> dict[str, Tensor]:
        if kind != "second_moments":
            return dict(build(Path()))
        return {path: self.moments[path] for path in key["paths"]}


class NoText:
    """In place of a corpus, where the statistics are given."""

    digest = "recorded"

    def texts(self) -> list[str]:
        return []


@dataclass
class Stage:
    """A recorded model under our code. `tokenizer` is the folder's subfolder that holds the tokenizer."""

    golden: Golden
    tokenizer: str = "."
    supplies: Supplies = field(init=False)

    def __post_init__(self) -> None:
        self.supplies = Supplies(
            artifacts=RecordedStatistics(self.golden.moments),  # type: ignore[arg-type]
            corpus=NoText(),  # type: ignore[arg-type]
        )

    @cached_property
    def model(self) -> EditableModel:
        return EditableModel.wrap(*self.golden.load(self.tokenizer))

    @cached_property
    def requests(self) -> list[Request]:
        """The recorded requests as ours, the old target in place."""
        return [
            Request(
                id=str(record["case_id"]),
                subject=record["subject"],
                prompt=record["prompt"],
                target=record["target_new"]["str"],
                old_target=record["target_true"]["str"],
            )
            for record in self.golden.requests
        ]

    def chosen(self, indices: Sequence[int]) -> list[Request]:
        return [self.requests[index] for index in indices]

    def stored(self, weight: str, value: Tensor) -> Tensor:
        """A weight or change, (out, in), in the orientation in which the parameter is stored and recorded."""
        module = self.model.hf.get_submodule(weight.rpartition(".")[0])
        return value.T if value.dim() == 2 and is_transposed(module) else value

    @torch.no_grad()
    def mean_log_probability(self, request: Request) -> float:
        """Mean log-probability per token of a request's target after its bare prompt."""
        facts = fact_rows(self.model.tokenizer, [request], ("{}",), "last")
        ids = torch.tensor([facts.rows[0][0]])
        scores = torch.log_softmax(self.model.hf(input_ids=ids, use_cache=False).logits[0], -1)
        return float(scores[facts.logits_at[0], facts.target_ids[0]].mean())

    def log_probabilities(self, indices: Sequence[int]) -> Tensor:
        """(requests, 2): of the new target and of the true one."""
        rows = []
        for request in self.chosen(indices):
            assert request.old_target is not None
            both = (request, replace(request, target=request.old_target))
            rows.append([self.mean_log_probability(one) for one in both])
        return torch.tensor(rows)


def value_params(hparams: Mapping[str, Any]) -> ValueParams:
    """The search for the target vector, from the reference's names."""
    return ValueParams(
        fact_token=hparams["fact_token"],
        steps=hparams["v_num_grad_steps"],
        step_size=hparams["v_lr"],
        weight_decay=hparams["v_weight_decay"],
        clamp=hparams["clamp_norm_factor"],
        kl_weight=hparams["kl_factor"],
    )


def context_params(groups: Sequence[Sequence[str]]) -> ContextParams:
    """Fixed contexts, by type."""
    return ContextParams(texts=tuple(tuple(group) for group in groups))


def spread_params(stage: Stage, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """What all methods that spread a residual over layers take, from the reference's names."""
    return {
        "layers": tuple(hparams["layers"]),
        "value": value_params(hparams),
        "contexts": context_params(stage.golden.contexts["memit"]),
    }
