"""A language model that can be edited, and taken back exactly.

Edited weights have 32-bit master copies, always seen as (out, in): a change is added there and rounded once into
whatever the model runs in. Adding 1,000 small changes in bfloat16 in place would lose most of them, and a study of what
many edits do would measure that rounding as if it were the method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyedits.arch import Arch, arch_of, is_transposed
from manyedits.changes import AnyChange, Entries, weight_of
from manyedits.data import Request
from manyedits.errors import UserError


class Adapter(Protocol):
    """What a memory method puts at a site; its tensors are part of the model's digest and of snapshots."""

    def attach(self, model: EditableModel) -> None:
        """Register hooks; called when the adapter is put in."""

    def detach(self) -> None:
        """Remove the hooks again."""

    def write(self, entries: Entries) -> None:
        """Add or replace rows."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was written."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""

    def clear(self) -> None:
        """Forget everything that was written."""


class EditableModel:
    """A transformers model, its tokenizer and its architecture row; the one mutable thing in a run."""

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.arch: Arch = arch_of(hf)
        self.memory: list[Request] = []
        self.prompt_adapter: Callable[[str], str] | None = None
        self._adapters: dict[str, Adapter] = {}
        self._masters: dict[str, Tensor] = {}
        self._base: dict[str, Tensor] = {}
        self._hashes: dict[str, str] = {}
        self._prompt_ends: Tensor | None = None
        self._tuple: bool | None = None

    @classmethod
    def load(cls, ref: str | Path | Mapping[str, Any], **how: Any) -> EditableModel:
        """A model by reference; see :func:`manyedits.loading.load_model` for the forms and the options."""
        from manyedits.loading import load_model

        return load_model(ref, **how)

    @classmethod
    def wrap(cls, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EditableModel:
        """A model that is already in memory; its fingerprint is taken from its tensors as they are."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {type(tokenizer).__name__} gives no character offsets.",
                "Use the model's fast tokenizer (a folder with a tokenizer.json).",
            )
        return cls(hf, tokenizer, tensors_digest(hf.state_dict()))

    # --- where things are -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.hf.device

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return int(self.hf.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""
        return int(self.hf.config.hidden_size)

    def block(self, layer: int) -> str:
        """The path of a block."""
        if not 0 <= layer < self.layers:
            raise UserError(
                f"Layer {layer} does not exist: the model has {self.layers} layers, 0 to {self.layers - 1}.",
                "Correct `layer` or `layers` in the method's parameters.",
            )
        return f"{self.arch.blocks}.{layer}"

    def mlp_out(self, layer: int) -> str:
        """The path of the projection whose weight locate-then-edit methods change; its input is the key."""
        return f"{self.block(layer)}.{self.arch.mlp_out}"

    def attn_out(self, layer: int) -> str:
        """The path of the projection out of attention."""
        if not self.arch.attn_out:
            raise UserError(
                f"No projection out of attention is known for {self.hf.config.model_type}.",
                "Add it to the architecture's row in arch.py, or choose a method that changes MLPs only.",
            )
        return f"{self.block(layer)}.{self.arch.attn_out}"

    def returns_tuple(self) -> bool:
        """Whether this family's blocks return a tuple, found by running one token through the first block."""
        if self._tuple is None:
            seen: list[bool] = []
            block = self.hf.get_submodule(self.block(0))
            handle = block.register_forward_hook(lambda m, args, out: seen.append(isinstance(out, tuple)))
            try:
                with torch.no_grad():
                    self.hf(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.device), use_cache=False)
            finally:
                handle.remove()
            self._tuple = seen[0]
        return self._tuple

    # --- weights ----------------------------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """The 32-bit master copy of a weight, (out, in), as the edits so far have left it."""
        if name in self._masters:
            return self._masters[name]
        module, parameter = self._parameter(name)
        return turned(module, parameter.detach().float()).contiguous()

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A weight given as (out, in), in the orientation and type in which the running model keeps it."""
        module, parameter = self._parameter(name)
        return turned(module, value).to(parameter.dtype)

    def parameters_of(self, path: str) -> list[str]:
        """The names of a module's own parameters: its weight, and its bias if it has one."""
        return [f"{path}.{leaf}" for leaf, _ in self.hf.get_submodule(path).named_parameters(recurse=False)]

    def _parameter(self, name: str) -> tuple[nn.Module, nn.Parameter]:
        path, _, leaf = name.rpartition(".")
        try:
            module = self.hf.get_submodule(path)
            return module, getattr(module, leaf)
        except AttributeError:
            raise UserError(f"The model has no weight `{name}`.", "Was the change made for another model?") from None

    def add(self, name: str, delta: Tensor) -> None:
        """Add (out, in) to a weight's master copy and round once into the running model."""
        self._keep(name)
        self._masters[name] += delta.to(self._masters[name].device)
        self._publish(name)

    def _keep(self, name: str) -> None:
        if name not in self._masters:
            _, parameter = self._parameter(name)
            self._base[name] = parameter.detach().clone()
            self._masters[name] = self.weight(name).clone()

    def _publish(self, name: str) -> None:
        module, parameter = self._parameter(name)
        master = self._masters[name]
        parameter.data.copy_(turned(module, master))
        self._hashes.pop(name, None)

    def apply(self, change: AnyChange) -> None:
        """Make a change."""
        change.apply(self)

    @contextmanager
    def trying(self, changes: Iterable[AnyChange]) -> Iterator[None]:
        """Make weight changes while inside and take them back exactly."""
        changes = list(changes)
        names = {w for c in changes if (w := weight_of(c)) is not None}
        for name in names:
            self._keep(name)
        before = {name: self._masters[name].clone() for name in names}
        hashes = dict(self._hashes)
        try:
            for change in changes:
                self.apply(change)
            yield
        finally:
            for name, master in before.items():
                self._masters[name].copy_(master)
                self._publish(name)
            self._hashes = hashes

    def masters(self) -> dict[str, Tensor]:
        """The edited weights that differ from the base, 32 bit, (out, in), by name."""
        return {n: m for n, m in sorted(self._masters.items()) if not torch.equal(m, self.base_weight(n))}

    def base_weight(self, name: str) -> Tensor:
        """A weight as it was before any edit, 32 bit, (out, in)."""
        if name not in self._base:
            return self.weight(name)
        module, _ = self._parameter(name)
        return turned(module, self._base[name].float()).contiguous()

    def restore(self, masters: Mapping[str, Tensor]) -> None:
        """Reset, then set these master copies: what a snapshot holds."""
        self.reset()
        for name, master in masters.items():
            self._keep(name)
            self._masters[name].copy_(master)
            self._publish(name)

    def reset(self) -> None:
        """The model as it was loaded: base tensors copied back, adapters and memory emptied."""
        for name, base in self._base.items():
            self._parameter(name)[1].data.copy_(base)
        self._masters.clear()
        self._base.clear()
        self._hashes.clear()
        self.memory.clear()
        for adapter in self._adapters.values():
            adapter.clear()

    # --- adapters ---------------------------------------------------------------------------------------------------

    def adapt(self, site: str, adapter: Adapter) -> None:
        """Put an adapter at a site: a module's path, "prompt" or "logits". Replaces the one that was there."""
        if site in self._adapters:
            self._adapters[site].detach()
        self._adapters[site] = adapter
        adapter.attach(self)

    def adapter(self, site: str) -> Adapter:
        """The adapter at a site."""
        if site not in self._adapters:
            raise UserError(f"No adapter at `{site}`.", "Was the change made by another method?")
        return self._adapters[site]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by site."""
        return self._adapters

    @contextmanager
    def reading(self, prompt_ends: Tensor) -> Iterator[None]:
        """Tell adapters where each row's prompt ends (index of its last token) while inside."""
        before, self._prompt_ends = self._prompt_ends, prompt_ends
        try:
            yield
        finally:
            self._prompt_ends = before

    @property
    def prompt_ends(self) -> Tensor | None:
        """Index of the last prompt token of each row of the forward pass under way, if it was told."""
        return self._prompt_ends

    # --- identity ---------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """Identity of the edited state: the base, every weight that differs from it, adapters and memory."""
        total = hashlib.sha256(self.fingerprint.encode())
        for name, master in self.masters().items():
            total.update(f"{name}={self._hash(name, master)};".encode())
        for site, adapter in sorted(self._adapters.items()):
            written = adapter.tensors()
            if any(t.numel() for t in written.values()):
                total.update(f"{site}={tensors_digest(written)};".encode())
        for request in self.memory:
            total.update(json.dumps(request.content(), sort_keys=True).encode())
        return total.hexdigest()

    def _hash(self, name: str, master: Tensor) -> str:
        if name not in self._hashes:
            self._hashes[name] = tensors_digest({name: master})
        return self._hashes[name]


def turned(module: nn.Module, value: Tensor) -> Tensor:
    """A weight from the orientation a module keeps to (out, in), or back; biases stay as they are."""
    return value.T if value.dim() == 2 and is_transposed(module) else value


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()
