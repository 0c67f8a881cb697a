"""What there is, by kind, a line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from manyedits.errors import UserError
from manyedits.registry import Registry, near_miss


def listed(kind: str) -> str:
    """The things of a kind, a line each. Raises ``UserError`` for an unknown kind."""
    kinds: dict[str, Callable[[], Iterator[str]]] = {
        "methods": _methods,
        "models": _models,
        "datasets": _datasets,
        "benchmarks": _benchmarks,
        "presets": _presets,
    }
    if kind not in kinds:
        raise UserError(f"There is no list of `{kind}`.{near_miss(kind, kinds)}", f"Known: {', '.join(kinds)}.")
    return "\n".join(kinds[kind]())


def _described(registry: Registry) -> Iterator[str]:
    width = max(len(name) for name in registry.names())
    for name in registry.names():
        thing = registry.load(name)
        text = inspect.getdoc(inspect.getmodule(thing)) or inspect.getdoc(thing) or ""
        yield f"{name:<{width}}  {text.splitlines()[0]}"


def _methods() -> Iterator[str]:
    from manyedits.methods import METHODS

    return _described(METHODS)


def _datasets() -> Iterator[str]:
    from manyedits.data.sets import DATASETS, SOURCES

    yield from _described(DATASETS)
    yield from (f"{name:<12} carried by the package, needs no file" for name in SOURCES.names())


def _benchmarks() -> Iterator[str]:
    from manyedits.benchmarks import BENCHMARKS

    return _described(BENCHMARKS)


def _models() -> Iterator[str]:
    from manyedits.arch import ARCHS
    from manyedits.world.models import names

    yield "Carried by the package: " + (", ".join(names()) or "none")
    yield "Any safetensors folder or hub name of these architectures (others are discovered by structure):"
    for kind, row in ARCHS.items():
        note = "; not for locate-then-edit methods" if row.norm_after_mlp else ""
        yield f"  {kind:<12} {row.blocks}, {row.mlp_out}{note}"


def _presets() -> Iterator[str]:
    from manyedits.methods import METHODS
    from manyedits.methods.base import presets_of

    for method in METHODS.names():
        for name, preset in presets_of(method).items():
            yield f"{method:<12} {name:<20} {preset['architecture']:<10} {preset['source']}"
