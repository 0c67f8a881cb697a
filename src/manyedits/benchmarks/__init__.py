"""The benchmarks by name, one line each; others join through the entry point group ``manyedits.benchmarks``.

A name that is none of these is a task or a group of lm-evaluation-harness, a YAML file of one, or ``suite:NAME``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from manyedits.registry import Registry

if TYPE_CHECKING:
    from manyedits.benchmarks.base import Benchmark

BENCHMARKS = Registry(
    "benchmark",
    {
        "edits": "manyedits.benchmarks.edits:Edits",
        "vitals": "manyedits.benchmarks.vitals:Vitals",
    },
    "manyedits.benchmarks",
)


def benchmarks_named(name: str) -> list[Benchmark]:
    """The benchmarks that an experiment's entry stands for, not yet prepared. Raises ``UserError`` for an unknown one."""
    if name in BENCHMARKS.names():
        return [BENCHMARKS.load(name)()]
    from manyedits.benchmarks.harness import harness_benchmarks

    return list(harness_benchmarks(name))
