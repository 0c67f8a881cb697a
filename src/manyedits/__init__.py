"""What is left of a language model after many edits?

The public names are imported on use, so that importing the package does nothing and costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Arch": "manyedits.arch",
    "Benchmark": "manyedits.benchmarks.base",
    "Edit": "manyedits.methods.base",
    "EditMethod": "manyedits.methods.base",
    "EditableModel": "manyedits.model",
    "Engine": "manyedits.lm",
    "Experiment": "manyedits.config",
    "MethodParams": "manyedits.methods.base",
    "Options": "manyedits.config",
    "Probe": "manyedits.data",
    "Request": "manyedits.data",
    "RunDir": "manyedits.rundir",
    "Trajectory": "manyedits.trajectory",
    "UserError": "manyedits.errors",
    "load_study": "manyedits.config",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module `manyedits` has no attribute `{name}`")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
