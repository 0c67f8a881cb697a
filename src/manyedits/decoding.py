"""Greedy generation of a batch whose rows leave when they are done.

What a row says is what the harness would keep: the text of its tokens up to the first stop string, whichever tokens
that string is spelled with. A row is done when a stop string stands at its end, at the end-of-text token, or at the
limit; a row whose logits are not numbers (a dead model) is done at once, with what it has.

The harness's own class goes on with finished rows until the whole batch is done, and so may keep text after a stop that
is itself a special token; answers here are those that it gives at a batch size of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyedits.cache import Rows, Runner
from manyedits.encoding import Encoder

# Finished rows are carried along until they are this share of the batch: leaving costs a copy of the cache.
SHARE_TO_LEAVE = 0.2

# A stop string may be spelled with more tokens than its own encoding has; the harness looks this much further back.
EXTRA_LOOKBACK = 2


@dataclass(frozen=True)
class Stopping:
    """When a generation ends: stop strings, end-of-text tokens, and a number of tokens."""

    encoder: Encoder
    strings: tuple[str, ...]
    ends: frozenset[int]
    limit: int

    @classmethod
    def of(cls, encoder: Encoder, hf: PreTrainedModel, stops: Sequence[str], limit: int) -> Stopping:
        """The stops that were asked for, and the end of text in each form that the model and its tokenizer know."""
        ends = {encoder.tokenizer.eos_token_id}
        declared = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
        ends.update(declared if isinstance(declared, list) else [declared])
        strings = [s for s in (*stops, encoder.tokenizer.eos_token) if s]
        return cls(encoder, tuple(dict.fromkeys(strings)), frozenset(e for e in ends if e is not None), limit)

    @cached_property
    def lookback(self) -> int:
        """How many tokens at the end are searched for a stop string."""
        encode = self.encoder.tokenizer.encode
        lengths = [len(encode(s, add_special_tokens=False)) for s in self.strings]
        return max(lengths, default=0) + EXTRA_LOOKBACK

    def done(self, generated: Sequence[list[int]]) -> list[bool]:
        """For each row whether it is at its end."""
        texts = self.encoder.tokenizer.batch_decode([tokens[-self.lookback :] for tokens in generated])
        return [
            len(tokens) >= self.limit or tokens[-1] in self.ends or any(s in text for s in self.strings)
            for tokens, text in zip(generated, texts, strict=True)
        ]

    def text(self, tokens: list[int]) -> str:
        """What a row says: its text before the first stop string."""
        text = self.encoder.decoded(tokens)
        for stop in self.strings:
            text = text.split(stop)[0]
        return text


def decode(runner: Runner, rows: Rows, index: Sequence[int], logits: Tensor, stopping: Stopping) -> list[list[int]]:
    """The tokens generated after the rows in ``index``; ``logits`` (rows, vocabulary) follow their last tokens."""
    generated: list[list[int]] = [[] for _ in index]
    cache, lengths = rows.continued(index, stopping.limit)
    there = list(range(len(index)))  # which generation each row of the cache belongs to
    open_ = set(there)
    while True:
        chosen = _chosen(logits)
        _append(generated, there, open_, chosen, stopping)
        if not open_:
            return generated
        if len(open_) <= (1 - SHARE_TO_LEAVE) * len(there):
            stay = [row for row, owner in enumerate(there) if owner in open_]
            ends = torch.full_like(lengths, int(lengths.max()))
            steps = max(len(generated[owner]) for owner in open_)
            cache, lengths = Rows.of(cache, ends, lengths).continued(stay, stopping.limit - steps + 1)
            there, chosen = [there[row] for row in stay], [chosen[row] for row in stay]
        logits = runner.advance(cache, lengths, torch.tensor([c if c is not None else 0 for c in chosen]))
        lengths = lengths + 1


def _chosen(logits: Tensor) -> list[int | None]:
    """The likeliest token of each row; None where there is none."""
    best = logits.max(dim=-1)
    alive = (~best.values.isnan() & (best.values > -torch.inf)).tolist()
    return [token if ok else None for token, ok in zip(best.indices.tolist(), alive, strict=True)]


def _append(
    generated: list[list[int]], there: list[int], open_: set[int], chosen: list[int | None], stopping: Stopping
) -> None:
    """Note the chosen tokens of open rows and close those that are done."""
    going = []
    for owner, token in zip(there, chosen, strict=True):
        if owner not in open_:
            continue
        if token is None:
            open_.discard(owner)
        else:
            generated[owner].append(token)
            going.append(owner)
    if going:
        finished = stopping.done([generated[owner] for owner in going])
        open_.difference_update(owner for owner, done in zip(going, finished, strict=True) if done)
