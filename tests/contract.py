"""What tests over everything registered share: a method made ready on a tiny model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import tiny
from manyedits.artifacts import Artifacts
from manyedits.data.corpus import Corpus
from manyedits.methods import METHODS
from manyedits.methods.base import EditMethod, Need, Supplies, presets_of
from manyedits.model import EditableModel


def corpus() -> Corpus:
    """The sentences that the toy tokenizers know."""
    return Corpus(lambda: iter(tiny.TEXT), hashlib.sha256("\n".join(tiny.TEXT).encode()).hexdigest())


def method(name: str) -> EditMethod:
    """A registered method with its preset for tiny models, or its defaults where it has none."""
    cls = METHODS.load(name)
    chosen = presets_of(name).get("tiny", {}).get("params", {})
    return cls(cls.Params(**chosen))  # type: ignore[no-any-return]


def supplies(folder: Path) -> Supplies:
    """Everything a method may need, from this folder's files."""
    return Supplies(Artifacts(folder), corpus(), seed=0, training=tuple(tiny.requests(12)))


def ready(name: str, kind: str, folder: Path) -> tuple[EditableModel, EditMethod]:
    """A tiny model, and a method prepared on it."""
    model, made = tiny.model(kind), method(name)
    made.prepare(model, supplies(folder))
    return model, made


def combinations(kinds: list[str]) -> Iterator[tuple[str, str]]:
    """Every registered method on every kind of model that it does not refuse."""
    for name in METHODS.names():
        needs = METHODS.load(name).needs
        for kind in kinds:
            if Need.ADDITIVE_MLP not in needs or kind in tiny.ADDITIVE:
                yield name, kind
