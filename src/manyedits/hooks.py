"""Capture and replace activations, and run a model from one of its layers on.

The only file that knows what a block returns: a tensor or a tuple, by family and by release of transformers. Everything
else here asks for "the output" and gets a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel

Side = Literal["in", "out"]


class _Enough(BaseException):
    """Raised inside a forward pass once everything wanted was seen; nobody outside this file meets it."""


def output_of(returned: Any) -> Tensor:
    """The hidden state in what a module returned."""
    return returned[0] if isinstance(returned, tuple) else returned


def by_token(tensor: Tensor, rows: int) -> Tensor:
    """Activations as (rows, tokens, features): some families flatten rows and tokens inside their MLP."""
    return tensor if tensor.dim() == 3 else tensor.unflatten(0, (rows, -1))


def with_output(returned: Any, hidden: Tensor) -> Any:
    """What a module returned, with another hidden state in it."""
    return (hidden, *returned[1:]) if isinstance(returned, tuple) else hidden


@contextmanager
def hooked_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass a module's output through ``change`` while inside."""
    handle = module.register_forward_hook(lambda m, args, out: with_output(out, change(output_of(out))))
    try:
        yield
    finally:
        handle.remove()


def capture(
    hf: PreTrainedModel,
    batch: Mapping[str, Tensor],
    wanted: Mapping[str, Side],
    take: Callable[[str, Tensor], Tensor] = lambda path, tensor: tensor,
    stop: bool = True,
) -> dict[str, Tensor]:
    """Inputs or outputs of modules in one forward pass that stops as soon as it has seen them all.

    ``wanted`` maps a module's path to the side that is read; ``take`` reduces a tensor (rows, tokens, features) at once,
    so that whole activations are not kept. No gradients.
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str, tensor: Tensor) -> None:
        seen[path] = take(path, by_token(tensor.detach(), len(batch["input_ids"])))
        if stop and len(seen) == len(wanted):
            raise _Enough

    with ExitStack() as stack, torch.no_grad():
        for path, side in wanted.items():
            stack.enter_context(watching(hf.get_submodule(path), side, partial(keep, path)))
        # A pass that is cut short is not an error: all that was wanted has been seen.
        with suppress(_Enough):
            hf(**batch, use_cache=False, logits_to_keep=1)
    return seen


@contextmanager
def watching(module: nn.Module, side: Side, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show a module's input or output to ``see`` while inside."""
    if side == "in":
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: see(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda m, args, out: see(output_of(out)))
    try:
        yield
    finally:
        handle.remove()


class _Through(nn.Module):
    """Stands where a block was and hands its input on."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        for name in ("attention_type", "layer_idx", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


class Tail:
    """The layers of a model from one layer on, as a function of hidden states.

    ``layer`` is the first layer that runs; ``layer == number of blocks`` leaves the final norm and the head. Masks,
    rotary tables, the final norm and whatever is done to the logits stay the model's own business: the lower blocks are
    replaced by pass-throughs for the duration of a call and the hidden state is put in before the first that runs.
    Logits are computed only at the columns asked for, by narrowing the head's input.
    """

    def __init__(self, hf: PreTrainedModel, blocks: str, layer: int, final_norm: str, as_tuple: bool) -> None:
        self.hf = hf
        self.blocks: nn.ModuleList = hf.get_submodule(blocks)  # type: ignore[assignment]
        self.layer = layer
        self.entry = self.blocks[layer] if layer < len(self.blocks) else hf.get_submodule(final_norm)
        self.through = [_Through(block, as_tuple) for block in self.blocks[:layer]]

    def __call__(
        self,
        hidden: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
        rows: Tensor,
        columns: Tensor,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits (n, vocabulary) at ``(rows[i], columns[i])``, given hidden states (batch, tokens, hidden).

        ``mask`` covers the cached tokens and these; ``cache`` is not changed. ``weights`` stand in for the model's own of
        the same names, so that a gradient can reach them.
        """
        with ExitStack() as stack:
            stack.enter_context(self._lower_blocks_out())
            stack.enter_context(_replaced_input(self.entry, hidden))
            stack.enter_context(narrowed_head(self.hf, rows, columns))
            inputs = {
                "inputs_embeds": hidden.detach(),
                "attention_mask": mask,
                "position_ids": positions,
                "past_key_values": None if cache is None else shallow_copy(cache),
                "use_cache": cache is not None,
            }
            out = functional_call(self.hf, dict(weights), (), inputs) if weights else self.hf(**inputs)
        return out.logits[0]  # type: ignore[no-any-return]

    @contextmanager
    def _lower_blocks_out(self) -> Iterator[None]:
        kept = list(self.blocks[: self.layer])
        try:
            for i, through in enumerate(self.through):
                self.blocks[i] = through
            yield
        finally:
            for i, block in enumerate(kept):
                self.blocks[i] = block


@contextmanager
def _replaced_input(module: nn.Module, hidden: Tensor) -> Iterator[None]:
    def put(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    handle = module.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def narrowed_head(hf: PreTrainedModel, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """While inside, the language-model head sees only the tokens at ``(rows[i], columns[i])``, as one row.

    What the model does to its logits afterwards (soft caps, scales) still happens, since it works entry by entry.
    """
    head = hf.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda m, args: (args[0][rows, columns].unsqueeze(0), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def shallow_copy(cache: DynamicCache) -> DynamicCache:
    """A cache that shares its tensors with another; appending to it leaves the other as it was."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def select_cache(cache: DynamicCache, rows: Tensor | None = None, columns: int | None = None) -> DynamicCache:
    """Some rows, and the first columns, of a cache (batch, heads, tokens, size of a head)."""
    twin = shallow_copy(cache)
    for layer in twin.layers:
        if not getattr(layer, "is_initialized", True):
            continue
        keys, values = layer.keys, layer.values
        if columns is not None:
            keys, values = keys[:, :, :columns], values[:, :, :columns]
        if rows is not None:
            keys, values = keys[rows], values[rows]
        layer.keys, layer.values = keys, values
    return twin
