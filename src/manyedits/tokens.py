"""Positions of subjects and targets in token sequences, and padded batches; the only file that knows.

Everything is found from character offsets of one tokenisation of the whole text, so leading spaces, a BOS in front and
merges across words are right by construction: no text is cut into pieces and tokenised piecewise. Positions are returned
together with the padded batch they belong to, so the two cannot disagree. Batches are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manyedits.data import Request
from manyedits.errors import UserError

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]

Span = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Token ids and mask, (rows, tokens), padded on the right, and the character span of every token."""

    ids: Tensor
    mask: Tensor
    offsets: list[list[Span]]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (rows,)."""
        return self.mask.sum(dim=1)

    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
    """Ids and character spans of each text, with whatever the tokenizer itself puts around a text."""
    coded = tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=True)
    spans = [[(int(a), int(b)) for a, b in row] for row in coded["offset_mapping"]]
    return list(zip(coded["input_ids"], spans, strict=True))


def pad(rows: Sequence[tuple[list[int], list[Span]]], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """One right-padded batch of encoded rows; what stands in the padding is masked and never read."""
    longest = max(len(ids) for ids, _ in rows)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = torch.tensor([list(row) + [filler] * (longest - len(row)) for row, _ in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows], dtype=torch.long)
    return Batch(ids, mask, [list(spans) for _, spans in rows])


def join(text: str, target: str) -> str:
    """A prompt and its continuation, with exactly one space between them unless the prompt ends in white space."""
    return text + target if not text or text[-1].isspace() else f"{text} {target}"


def locate(spans: Sequence[Span], subject: Span, prompt_end: int, which: FactToken) -> int:
    """The token at which a fact is looked up.

    ``subject`` is the subject's character span and ``prompt_end`` the length of the prompt, both in the text that
    ``spans`` cover. ``subject_last`` is the last token that holds a character of the subject, ``subject_first`` the first,
    ``subject_first_after_last`` the one after the last (the last itself where the prompt ends with the subject), ``last``
    the prompt's last token.
    """
    inside = [i for i, (a, b) in enumerate(spans) if b > a and a < prompt_end]
    held = [i for i in inside if spans[i][0] < subject[1] and spans[i][1] > subject[0]]
    if not held or subject[0] >= subject[1]:
        raise UserError("The subject has no token of its own in the prompt.", "Is it empty, or only white space?")
    if which == "subject_first":
        return held[0]
    if which == "last":
        return inside[-1]
    if which == "subject_first_after_last":
        return min(held[-1] + 1, inside[-1])
    return held[-1]


def target_columns(spans: Sequence[Span], prompt_end: int) -> list[int]:
    """The tokens of a continuation: those that end after the prompt does."""
    return [i for i, (a, b) in enumerate(spans) if b > max(prompt_end, a)]


@dataclass(frozen=True)
class Located:
    """Rows of text, the lookup position of each, and which columns' logits predict which target tokens."""

    rows: list[tuple[list[int], list[Span]]]
    lookup: list[int]
    target_ids: list[list[int]]  # empty where a row has no target
    logits_at: list[list[int]]  # the column before each target token


def lookup_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], contexts: Sequence[str], which: FactToken
) -> list[tuple[list[int], int]]:
    """For each request and, inside it, each context: ids up to the lookup position, and that position.

    A causal model's activations at a position do not depend on what follows, so the rest of the text is left away.
    """
    texts = [request.template(context) for request in requests for context in contexts]
    coded = encode(tokenizer, [text for text, _ in texts])
    rows = []
    for (text, subject), (ids, spans) in zip(texts, coded, strict=True):
        position = locate(spans, subject, len(text), which)
        rows.append((ids[: position + 1], position))
    return rows


def fact_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], contexts: Sequence[str], which: FactToken
) -> Located:
    """For each request and, inside it, each context: the prompt and its target but for the target's last token.

    The last token is predicted and never read, so no row carries it.
    """
    texts = [request.template(context) for request in requests for context in contexts]
    owners = [request for request in requests for _ in contexts]
    coded = encode(tokenizer, [join(text, owner.target) for (text, _), owner in zip(texts, owners, strict=True)])
    located = Located([], [], [], [])
    for (text, subject), (ids, spans) in zip(texts, coded, strict=True):
        columns = target_columns(spans, len(text))
        located.rows.append((ids[: columns[-1]], spans[: columns[-1]]))
        located.lookup.append(locate(spans, subject, len(text), which))
        located.target_ids.append([ids[c] for c in columns])
        located.logits_at.append([c - 1 for c in columns])
    return located


def subject_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], template: str, which: FactToken
) -> Located:
    """A template about each request's subject ("{} is a"), and the lookup position in it."""
    start = template.index("{}")
    texts = [template.replace("{}", request.subject, 1) for request in requests]
    coded = encode(tokenizer, texts)
    lookup = [
        locate(spans, (start, start + len(request.subject)), len(text), which)
        for request, text, (_, spans) in zip(requests, texts, coded, strict=True)
    ]
    return Located(coded, lookup, [[] for _ in requests], [[] for _ in requests])
