"""Where scores are kept, and when one may be taken instead of measured.

A score belongs to exactly what it was measured on: its key covers the edited state, the type the model ran in, the kind
of device, the version of the engine, what was asked, and the chat form. A score with the same key is the same score, so
step 0 of ten methods on one model is measured once, and a resumed run measures nothing twice.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from manyedits import rundir
from manyedits.benchmarks.base import Benchmark, Sample, Score, content_digest
from manyedits.config import Experiment
from manyedits.lm import VERSION as ENGINE_VERSION
from manyedits.model import EditableModel
from manyedits.rundir import RunDir

logger = logging.getLogger(__name__)


class ScoreStore:
    """The scores of one run directory, and beside them a store that runs share."""

    def __init__(self, run: RunDir, model: EditableModel, cell: Experiment, shared: Path) -> None:
        self.run, self.model, self.cell, self.shared = run, model, cell, shared

    def measure(self, benchmark: Benchmark, step: int) -> None:
        """Make sure the run has this benchmark's score at the model's present step: kept, taken or measured."""
        key = self.key(benchmark, step)
        target = self.run.score(step, benchmark.name)
        if _read_key(target) == key:
            return
        kept = self.shared / key[:2] / key
        if not (kept / "score.json").is_file():
            self._run(benchmark, step, key, kept)
        rundir.write_atomic(self.run.samples(step, benchmark.name), (kept / "samples.jsonl.gz").read_bytes())
        score = json.loads((kept / "score.json").read_bytes())
        rundir.write_json(target, {**score, "step": step})

    def key(self, benchmark: Benchmark, step: int) -> str:
        """Identity of a score."""
        facts = {
            "state": self.model.digest(),
            "dtype": str(self.model.hf.dtype),
            "device": self.model.device.type,
            "engine": ENGINE_VERSION,
            "task": benchmark.digest(step),
            "chat": self.cell.chat,
            "threads": self.cell.threads,
        }
        return content_digest(facts)

    def _run(self, benchmark: Benchmark, step: int, key: str, kept: Path) -> None:
        started = time.perf_counter()
        samples = benchmark.run(self.model, step)
        scores = benchmark.score(samples)
        rundir.write_atomic(kept / "samples.jsonl.gz", pack_samples(samples))
        content = {
            "benchmark": benchmark.name,
            "version": benchmark.version,
            "key": key,
            "state": self.model.digest(),
            "scores": [_as_row(score) for score in scores],
            "seconds": time.perf_counter() - started,
        }
        rundir.write_json(kept / "score.json", content)


def _as_row(score: Score) -> dict[str, Any]:
    return asdict(score)


def _read_key(path: Path) -> str | None:
    """The key of a score file; None when there is no whole one."""
    try:
        return str(json.loads(path.read_bytes())["key"])
    except (OSError, ValueError, KeyError):
        return None


def pack_samples(samples: Sequence[Sample]) -> bytes:
    """Samples as compressed JSON lines; the same samples give the same bytes."""
    rows = "".join(json.dumps(asdict(s), sort_keys=True, ensure_ascii=False) + "\n" for s in samples)
    return gzip.compress(rows.encode(), mtime=0)


def read_samples(path: Path) -> list[Sample]:
    """The inverse of :func:`pack_samples`, from a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Sample(**{**row, "flags": tuple(row["flags"])}) for row in rows]
