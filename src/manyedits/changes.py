"""What an edit is made of: small, typed, serialisable records.

The set is closed. Each change knows the weight or the site it touches, how to apply itself to a model, and how to go to
tensors and back. Weights are named as in the model's state dict and always meant as (out, in), whatever the module
stores; the model turns them round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from manyedits.data import Request, request_from_dict

if TYPE_CHECKING:
    from manyedits.model import EditableModel


class Change(Protocol):
    """One record of what an edit does to a model."""

    kind: ClassVar[str]

    def apply(self, model: EditableModel) -> None:
        """Make the change on the model's 32-bit master copies, or on its adapters or memory."""

    def tensors(self) -> dict[str, Tensor]:
        """The change's numbers by field name."""

    def facts(self) -> dict[str, object]:
        """The rest of the change: JSON-able values by field name."""


@dataclass(frozen=True)
class LowRank:
    """``weight += left @ right.T``; left is (out, rank), right is (in, rank)."""

    kind: ClassVar[str] = "low_rank"
    weight: str
    left: Tensor
    right: Tensor

    def delta(self) -> Tensor:
        """The whole change, (out, in), in 32 bit."""
        return self.left.float() @ self.right.float().T

    def apply(self, model: EditableModel) -> None:
        model.add(self.weight, self.delta())

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def facts(self) -> dict[str, object]:
        return {"weight": self.weight}


@dataclass(frozen=True)
class Slices:
    """A few rows (axis 0: outputs) or columns (axis 1: inputs) of a weight; delta is (len(index), length of one)."""

    kind: ClassVar[str] = "slices"
    weight: str
    axis: int
    index: Tensor
    delta: Tensor

    def apply(self, model: EditableModel) -> None:
        whole = torch.zeros_like(model.weight(self.weight))
        rows = self.delta.float().to(whole.device)
        whole.index_add_(self.axis, self.index.to(whole.device), rows if self.axis == 0 else rows.T)
        model.add(self.weight, whole)

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "delta": self.delta}

    def facts(self) -> dict[str, object]:
        return {"weight": self.weight, "axis": self.axis}


@dataclass(frozen=True)
class Dense:
    """``weight += delta``, (out, in): when nothing smaller is true."""

    kind: ClassVar[str] = "dense"
    weight: str
    delta: Tensor

    def apply(self, model: EditableModel) -> None:
        model.add(self.weight, self.delta.float())

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def facts(self) -> dict[str, object]:
        return {"weight": self.weight}


@dataclass(frozen=True)
class Entries:
    """Rows added to or replaced in the codebook of the adapter at a site.

    ``index`` (n,) are row numbers, ``keys`` (n, d_key), ``values`` (n, d_value), ``radii`` (n,); an edit may change an
    older entry, so it carries every row that changed.
    """

    kind: ClassVar[str] = "entries"
    site: str
    index: Tensor
    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: tuple[str, ...] = ()

    def apply(self, model: EditableModel) -> None:
        model.adapter(self.site).write(self)

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "keys": self.keys, "values": self.values, "radii": self.radii}

    def facts(self) -> dict[str, object]:
        return {"site": self.site, "labels": list(self.labels)}


@dataclass(frozen=True)
class Remember:
    """Facts that a memory or a prompt method carries beside the model."""

    kind: ClassVar[str] = "remember"
    requests: tuple[Request, ...]

    def apply(self, model: EditableModel) -> None:
        model.memory.extend(self.requests)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, object]:
        return {"requests": [{"id": r.id, **r.content()} for r in self.requests]}


AnyChange = LowRank | Slices | Dense | Entries | Remember


def weight_of(change: AnyChange) -> str | None:
    """The weight that a change touches; None for adapters and memory."""
    return change.weight if isinstance(change, LowRank | Slices | Dense) else None


def size(changes: Sequence[AnyChange]) -> int:
    """How many bytes the tensors of these changes take."""
    return sum(t.numel() * t.element_size() for c in changes for t in c.tensors().values())


def to_tensors(changes: Sequence[AnyChange]) -> tuple[dict[str, Tensor], str]:
    """Changes as named tensors and one JSON text, for a safetensors file."""
    tensors = {f"{i}.{name}": t.contiguous() for i, c in enumerate(changes) for name, t in c.tensors().items()}
    return tensors, json.dumps([{"kind": c.kind, **c.facts()} for c in changes], sort_keys=True)


def from_tensors(tensors: Mapping[str, Tensor], described: str) -> tuple[AnyChange, ...]:
    """The inverse of :func:`to_tensors`."""
    return tuple(_rebuild(i, facts, tensors) for i, facts in enumerate(json.loads(described)))


def _rebuild(position: int, facts: dict[str, object], tensors: Mapping[str, Tensor]) -> AnyChange:
    mine = {k.split(".", 1)[1]: t for k, t in tensors.items() if k.split(".", 1)[0] == str(position)}
    kind = facts.pop("kind")
    if kind == Remember.kind:
        return Remember(tuple(request_from_dict(r) for r in facts["requests"]))  # type: ignore[attr-defined]
    if kind == Entries.kind:
        facts["labels"] = tuple(facts["labels"])  # type: ignore[arg-type]
    kinds: dict[object, type[AnyChange]] = {c.kind: c for c in (LowRank, Slices, Dense, Entries)}
    return kinds[kind](**facts, **mine)  # type: ignore[arg-type]
