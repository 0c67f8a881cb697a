"""The benchmarks by name, one line each; others join through the entry point group ``manyedits.benchmarks``."""

from __future__ import annotations

from manyedits.registry import Registry

BENCHMARKS = Registry(
    "benchmark",
    {
        "edits": "manyedits.benchmarks.edits:Edits",
    },
    "manyedits.benchmarks",
)
