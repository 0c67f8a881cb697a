"""What one step of a value search runs and reads: hidden states from the lookup position on, and where the loss looks.

Rows of one request stand together: its contexts, then its KL row. Text before the lookup position is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from manyedits.data import Request
from manyedits.hooks import select_cache
from manyedits.model import EditableModel
from manyedits.tokens import Located

#: Tokens that one search holds at once; requests are cut into groups by it, so groups depend on the requests alone.
TOKENS_AT_ONCE = 16_384


def groups(model: EditableModel, requests: Sequence[Request], contexts: Sequence[str]) -> Iterator[list[Request]]:
    """Cut requests into groups that hold at most TOKENS_AT_ONCE tokens, never fewer than one request."""
    prefix = sum(len(model.tokenizer(c)["input_ids"]) for c in contexts)
    group: list[Request] = []
    held = 0
    for request in requests:
        own = len(model.tokenizer(f"{request.text} {request.target}")["input_ids"])
        tokens = prefix + own * (len(contexts) + 1)
        if group and held + tokens > TOKENS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(request)
        held += tokens
    if group:
        yield group


@dataclass
class Rows:
    """The part of a batch that a step runs.

    ``owner`` (rows,) is the request's place in the group; ``entry_*`` describe one read logit each: its row, column, token
    and weight.
    """

    hidden: Tensor  # (rows, columns, hidden)
    mask: Tensor  # (rows, cached + columns)
    positions: Tensor  # (rows, columns)
    cache: DynamicCache | None
    owner: Tensor
    entry_row: Tensor
    entry_column: Tensor
    entry_token: Tensor
    entry_weight: Tensor
    kl_row: Tensor  # (requests,)

    def keep(self, alive: Tensor) -> Rows:
        """The rows of some requests; ``alive`` (requests,) is true for those that stay."""
        stay = alive[self.owner]
        rows = stay.nonzero().squeeze(1)
        new_row = torch.cumsum(stay.long(), 0) - 1
        new_owner = torch.cumsum(alive.long(), 0) - 1
        entries = stay[self.entry_row]
        return Rows(
            self.hidden[rows],
            self.mask[rows],
            self.positions[rows],
            None if self.cache is None else select_cache(self.cache, rows),
            new_owner[self.owner[rows]],
            new_row[self.entry_row[entries]],
            self.entry_column[entries],
            self.entry_token[entries],
            self.entry_weight[entries],
            new_row[self.kl_row[alive]],
        )


def interleave(facts: Located, essence: Located, contexts: int) -> Located:
    """One request after another: its context rows, then its KL row."""
    merged = Located([], [], [], [])
    for i in range(len(essence.rows)):
        for source, part in ((facts, slice(i * contexts, (i + 1) * contexts)), (essence, slice(i, i + 1))):
            merged.rows.extend(source.rows[part])
            merged.lookup.extend(source.lookup[part])
            merged.target_ids.extend(source.target_ids[part])
            merged.logits_at.extend(source.logits_at[part])
    return merged


def cut(seen: dict[str, Any], mask: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor, Tensor, DynamicCache | None]:
    """Hidden states from each row's lookup position on, with mask, positions and the cache of what stands before.

    The cache keeps its columns; those at and after a row's own lookup position are masked, a hole between its prefix
    and its suffix.
    """
    hidden = seen["entry"]
    before = int(lookup.max())
    longest = int((mask.sum(dim=1) - lookup).max())
    columns = torch.arange(longest, device=mask.device)
    positions = (lookup[:, None] + columns).clamp(max=mask.shape[1] - 1)
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    real = mask[rows, positions] * (lookup[:, None] + columns < mask.shape[1])
    prefix = (torch.arange(before, device=mask.device) < lookup[:, None]).to(mask.dtype)
    cache = select_cache(seen["cache"], columns=before) if before else None
    return hidden[rows, positions], torch.cat([prefix, real], dim=1), positions, cache


def entries(facts: Located, contexts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column counted from the lookup position, token and weight of every logit that the likelihood reads."""
    listed = [
        (row, column - facts.lookup[row], token, 1.0 / (len(tokens) * contexts))
        for row, tokens in enumerate(facts.target_ids)
        for column, token in zip(facts.logits_at[row], tokens, strict=True)
    ]
    row, column, token, weight = zip(*listed, strict=True)
    at_row, at_column, wanted = (torch.tensor(part, device=device) for part in (row, column, token))
    return at_row, at_column, wanted, torch.tensor(weight, device=device)
