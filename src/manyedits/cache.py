"""Keys and values of a batch of rows that differ in length, and forward passes that continue them.

Rows of a batch are padded on the right, so their tokens need no special care in any family. What is continued later is
moved so that all rows end in the same column, with the gap on the left, hidden by the attention mask: then the distance
between two tokens is the same in columns as in positions, which is what sliding windows are measured in. Position ids
are always given; the cache is always a full one, and sliding windows are the mask's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from manyedits.hooks import narrowed_head
from manyedits.prefix import Tokens


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in buffers with room for what comes: a token more is no copy of all before it."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.buffers = (keys, values)
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, in place."""
        before = self.keys.shape[2]
        after = before + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:after] = new
        self.keys, self.values = (buffer[:, :, :after] for buffer in self.buffers)
        return self.keys, self.values


@dataclass
class Rows:
    """The cache of a batch: per layer keys and values (rows, heads, columns, size), and which columns are a row's own.

    Row i's tokens stand in the columns ``ends[i] - lengths[i]`` to ``ends[i]``.
    """

    layers: list[tuple[Tensor, Tensor]]
    ends: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, cache: DynamicCache, ends: Tensor, lengths: Tensor) -> Rows:
        """What a forward pass left in a cache."""
        return cls([(layer.keys, layer.values) for layer in cache.layers], ends, lengths)

    def continued(self, index: Sequence[int], room: int) -> tuple[DynamicCache, Tensor]:
        """A cache of the rows in ``index`` (repeats allowed), ending in one column, with room; and their lengths."""
        lengths, ends = self.lengths[index], self.ends[index]
        width = int(lengths.max())
        places = list(zip(index, lengths.tolist(), ends.tolist(), strict=True))
        cache = DynamicCache()
        cache.layers = [
            RoomyLayer(_moved(keys, places, width, room), _moved(values, places, width, room), width)
            for keys, values in self.layers
        ]
        return cache, lengths


def _moved(tensor: Tensor, places: Sequence[tuple[int, int, int]], width: int, room: int) -> Tensor:
    """Keys or values of rows, each given by (row, length, end), moved to end in column ``width``; zeros before them."""
    _, heads, _, size = tensor.shape
    buffer = tensor.new_empty((len(places), heads, width + room, size))
    for into, (row, length, end) in zip(buffer, places, strict=True):
        into[:, : width - length] = 0
        into[:, width - length : width] = tensor[row, :, end - length : end]
    return buffer


class Step(NamedTuple):
    """One forward pass: what each row goes on with, from which row of the parent, and which tokens' logits are read."""

    segments: Sequence[Tokens]
    index: Sequence[int]  # type: ignore[assignment]  # a field, and not the method of tuples
    reads: Sequence[tuple[int, int]]  # (row, column)
    prompt_ends: Sequence[int]  # column of each row's last prompt token; negative: it lies before this pass


class Runner:
    """Forward passes of one model over such rows."""

    def __init__(self, model: Any, max_length: int) -> None:
        self.model = model
        self.hf: PreTrainedModel = model.hf
        self.last = max_length - 1
        self.takes_positions = "position_ids" in inspect.signature(self.hf.forward).parameters

    def run(self, parents: Rows | None, step: Step, keep: bool) -> tuple[Tensor, Rows | None]:
        """Logits in 32 bit (reads, vocabulary) and, if kept, the rows' cache."""
        longest = max(len(s) for s in step.segments)
        cache, before = self._continued(parents, step, longest, keep)
        out = self._forward(
            _padded(step.segments, longest), cache, before, step.reads or [(0, 0)], torch.tensor(step.prompt_ends)
        )
        lengths = torch.tensor([len(s) for s in step.segments])
        rows = None
        if keep and cache is not None:
            rows = Rows.of(cache, int(before.max()) + lengths, before + lengths)
        return out[: len(step.reads)], rows

    def _continued(
        self, parents: Rows | None, step: Step, longest: int, keep: bool
    ) -> tuple[DynamicCache | None, Tensor]:
        if parents is None:
            return (DynamicCache() if keep else None), torch.zeros(len(step.segments), dtype=torch.long)
        return parents.continued(step.index, longest)

    def advance(self, cache: DynamicCache, lengths: Tensor, tokens: Tensor) -> Tensor:
        """One token more for every row of a cache: the logits after it, in 32 bit (rows, vocabulary)."""
        count = len(tokens)
        reads = [(row, 0) for row in range(count)]
        return self._forward(tokens[:, None], cache, lengths, reads, torch.full((count,), -1))

    @torch.no_grad()
    def _forward(
        self,
        ids: Tensor,
        cache: DynamicCache | None,
        before: Tensor,
        reads: Sequence[tuple[int, int]],
        prompt_ends: Tensor,
    ) -> Tensor:
        device = self.hf.device
        width = int(before.max())
        mask = torch.arange(width + ids.shape[1])[None] >= (width - before)[:, None]
        positions = (before[:, None] + torch.arange(ids.shape[1])).clamp_max(self.last)
        extra = {"position_ids": positions.to(device)} if self.takes_positions else {}
        rows, columns = torch.tensor(reads).to(device).T
        with ExitStack() as stack:
            stack.enter_context(self._reading(prompt_ends.to(device)))
            stack.enter_context(narrowed_head(self.hf, rows, columns))
            out = self.hf(
                input_ids=ids.to(device),
                attention_mask=mask.long().to(device),
                past_key_values=cache,
                use_cache=cache is not None,
                **extra,
            )
        return out.logits[0].float()  # type: ignore[no-any-return]

    def _reading(self, prompt_ends: Tensor) -> AbstractContextManager[None]:
        reading = getattr(self.model, "reading", None)
        return reading(prompt_ends) if reading is not None else nullcontext()


def _padded(segments: Sequence[Tokens], longest: int) -> Tensor:
    """Token ids (rows, longest), padded on the right with each row's own last token, which nothing before it can see.

    A token of the row's own, because a model with one broken embedding would spread it: zero times NaN is NaN.
    """
    return torch.tensor([[*segment, *[segment[-1]] * (longest - len(segment))] for segment in segments])
