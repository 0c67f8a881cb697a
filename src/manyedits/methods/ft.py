"""Fine-tuning of one layer: FT-L (constrained, the baseline of ROME, arXiv:2202.05262) and FT-M (EasyEdit's variant).

The MLP's way out of ``layers`` is trained with Adam on the requests until their loss is small. Per request the loss is the
mean over target tokens of ``-log p``. Two objectives are published:

* ``prompt_last`` (FT-L): every target token is scored at the prompt's last position, so an answer of several tokens is not
  learnt as a sequence. That is the release's, and a plain weakness of it;
* ``target_new`` (FT-M): every target token is scored where it belongs.

``constraint`` keeps every entry of a weight within that distance of where it stood (L-infinity), projected after each step.
The change is dense, so above a size it is not journaled but made again from the last snapshot.

Known deviations of published code, not reproduced: the release hides padding only where padding is the unknown token.
EasyEdit's mask for ``target_new`` expects a batch padded on the left and its index for ``prompt_last`` one padded on the
right, and it gives no position ids, so that padding on the left moves learned positions (GPT-2). Here positions are found in
the text and padding has no influence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from manyedits.changes import Dense
from manyedits.data import Request
from manyedits.hooks import Tail, capture
from manyedits.methods.base import Edit, EditMethod, MethodParams, Need
from manyedits.model import EditableModel
from manyedits.tokens import fact_rows, pad


class FtParams(MethodParams):
    """Parameters of FT-L; the defaults are those of ROME's release for GPT-2 XL."""

    layers: tuple[int, ...] = Field((0,), min_length=1, description="Trained layers. Indices.")
    steps: int = Field(25, ge=1, description="The most passes over the requests. Count.")
    step_size: float = Field(5e-4, gt=0, description="Adam's learning rate. Absolute.")
    weight_decay: float = Field(0.0, ge=0, description="Adam's L2 term. Ratio.")
    constraint: float | None = Field(5e-4, gt=0, description="Largest change of an entry; null for none. Absolute.")
    objective: Literal["prompt_last", "target_new"] = Field(
        "prompt_last",
        description="Where target tokens are scored: at the prompt's last position, or where they belong.",
    )
    chunk: int = Field(64, ge=1, description="Requests per optimiser step. Count.")
    stop_below: float = Field(0.01, ge=0, description="Steps end once the mean loss is below this. Nats.")


class FtMParams(FtParams):
    """Parameters of FT-M; unconstrained, each token scored where it belongs."""

    constraint: float | None = Field(None, gt=0, description="Largest change of an entry; null for none. Absolute.")
    objective: Literal["prompt_last", "target_new"] = Field(
        "target_new", description="Where target tokens are scored: at the prompt's last position, or where they belong."
    )


@dataclass(frozen=True)
class _Chunk:
    """Requests of one optimiser step: hidden states before the first trained layer, and where the loss reads."""

    hidden: Tensor
    mask: Tensor
    row: Tensor  # of each scored token
    column: Tensor
    token: Tensor
    share: Tensor  # 1 / number of the row's target tokens
    count: int


class FtL(EditMethod):
    """Fine-tuning with a bound on every entry."""

    Params: ClassVar[type[MethodParams]] = FtParams
    needs: ClassVar[frozenset[Need]] = frozenset()

    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        first = min(self.params.layers)
        tail = Tail(model.hf, model.arch.blocks, first, model.arch.final_norm, model.returns_tuple())
        chunks = [self._chunk(model, part, first) for part in _parts(requests, self.params.chunk)]
        names = [n for layer in self.params.layers for n in model.parameters_of(model.mlp_out(layer))]
        start = {name: model.weight(name).clone() for name in names}
        trained, loss = self._train(model, tail, chunks, start)
        changes = tuple(Dense(name, trained[name] - start[name]) for name in names)
        return Edit(changes, info={"loss": loss})

    def _train(
        self, model: EditableModel, tail: Tail, chunks: Sequence[_Chunk], start: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], float]:
        weights = {name: value.clone().requires_grad_(True) for name, value in start.items()}
        decay = self.params.weight_decay
        optimiser = torch.optim.Adam(weights.values(), lr=self.params.step_size, weight_decay=decay)
        mean, seen = float("nan"), []
        for _ in range(self.params.steps):
            losses = [self._step(model, tail, chunk, weights, start, optimiser) for chunk in chunks]
            seen += losses
            weighted = sum(loss * chunk.count for loss, chunk in zip(losses, chunks, strict=True))
            mean = weighted / sum(chunk.count for chunk in chunks)
            if mean < self.params.stop_below:
                break
        self.record("losses", torch.tensor(seen))
        return {name: value.detach() for name, value in weights.items()}, mean

    def _step(
        self,
        model: EditableModel,
        tail: Tail,
        chunk: _Chunk,
        weights: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
    ) -> float:
        """One optimiser step, left out where the loss is small already; the loss before it."""
        with torch.enable_grad():
            running = {name: model.stored(name, value) for name, value in weights.items()}
            loss = _loss(tail, chunk, running)
            value = float(loss.detach())
            if value >= self.params.stop_below:
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        if self.params.constraint is not None:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.clamp_(start[name] - self.params.constraint, start[name] + self.params.constraint)
        return value

    def _chunk(self, model: EditableModel, requests: Sequence[Request], first: int) -> _Chunk:
        located = fact_rows(model.tokenizer, requests, ["{}"], "last")
        batch = pad(located.rows, model.tokenizer)
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs().items()}
        path = model.block(first)
        hidden = capture(model.hf, inputs, {path: "in"})[path]
        scored = [
            (row, located.lookup[row] if self.params.objective == "prompt_last" else column, token, 1 / len(tokens))
            for row, tokens in enumerate(located.target_ids)
            for column, token in zip(located.logits_at[row], tokens, strict=True)
        ]
        row, column, token, share = (torch.tensor(part, device=model.device) for part in zip(*scored, strict=True))
        return _Chunk(hidden, inputs["attention_mask"], row, column, token, share, len(requests))


class FtM(FtL):
    """Fine-tuning without a bound, on whole answers."""

    Params: ClassVar[type[MethodParams]] = FtMParams


def _parts(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _loss(tail: Tail, chunk: _Chunk, weights: Mapping[str, Tensor]) -> Tensor:
    """Mean over requests of the mean over target tokens of -log p, in nats."""
    positions = torch.arange(chunk.hidden.shape[1], device=chunk.hidden.device).expand(len(chunk.hidden), -1)
    logits = tail(chunk.hidden, chunk.mask, positions, None, chunk.row, chunk.column, weights)
    scores = torch.log_softmax(logits.float(), dim=1)
    chosen = scores[torch.arange(len(chunk.token), device=scores.device), chunk.token]
    return -(chosen * chunk.share).sum() / chunk.count
