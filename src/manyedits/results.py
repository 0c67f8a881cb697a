"""Rows out of run directories; reads files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from manyedits.config import Count, Experiment
from manyedits.errors import UserError
from manyedits.rundir import RESTORE, RunDir, read_json, read_lines

T = TypeVar("T")


class _Strict(BaseModel):
    """What a file of a run must hold; more may stand in it."""

    model_config = ConfigDict(strict=True)


class _Line(_Strict):
    step: Count
    seconds: float


class _Figure(_Strict):
    metric: str
    value: float | None
    error: float | None
    n: int
    unscored: int
    extra: dict[str, Any] = Field(default_factory=dict)


class _Score(_Strict):
    benchmark: str
    state: str
    scores: list[_Figure]


class _Resolved(BaseModel):
    experiment: Experiment
    digest: str
    steps: Annotated[list[Count], Field(min_length=1)]
    benchmarks: list[str]


def _checked(path: Path, kind: type[T], content: Any) -> T:
    """The content of a file as what it must be. Raises ``UserError`` for a file that was altered."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError:
        raise UserError(f"{path} was altered or written by another program.", RESTORE) from None


@dataclass(frozen=True)
class Row:
    """One figure of one run."""

    run: str
    model: str
    method: str
    step: int
    benchmark: str
    metric: str
    value: float | None
    error: float | None
    n: int
    unscored: int
    extra: dict[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What a run directory says of itself."""

    folder: Path
    experiment: dict[str, Any]
    digest: str
    provenance: dict[str, Any]
    edited: int  # requests applied so far
    seconds: float  # spent editing
    steps: list[int]  # the checkpoints that this run measures
    benchmarks: list[str]  # suites taken apart

    @property
    def label(self) -> str:
        """Method, preset, batch and seed in a few words."""
        method = self.experiment["method"]
        parts = [method["name"]]
        if self.experiment["batch"] > 1:
            parts.append(f"batch {self.experiment['batch']}")
        if self.experiment["data"]["seed"]:
            parts.append(f"seed {self.experiment['data']['seed']}")
        return ", ".join(parts)

    @property
    def model(self) -> str:
        """The model in a word."""
        ref = self.experiment["model"]
        return f"random {ref['random']}" if isinstance(ref, dict) else Path(ref).name if "/" in ref else ref


def run_info(folder: Path) -> RunInfo:
    """What a run directory says of itself. Raises ``UserError`` when it is none."""
    run = RunDir(folder)
    if not run.resolved.is_file():
        raise UserError(
            f"{folder} is no run directory: it has no resolved.json.", "Name a folder that `manyedits run` wrote."
        )
    resolved = _checked(run.resolved, _Resolved, read_json(run.resolved))
    lines = _checked(run.journal, list[_Line], read_lines(run.journal))
    made_by = read_json(run.provenance) if run.provenance.is_file() else {}
    edited = lines[-1].step if lines else 0
    seconds = sum(line.seconds for line in lines)
    return RunInfo(
        folder,
        resolved.experiment.facts(),
        resolved.digest,
        made_by,
        edited,
        seconds,
        resolved.steps,
        resolved.benchmarks,
    )


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories among these folders and directly below them."""
    found: list[Path] = []
    for path in paths:
        below = sorted(p.parent for p in path.glob("*/resolved.json"))
        here = [path] if RunDir(path).resolved.is_file() else below
        if not here:
            raise UserError(f"{path} is no run directory and holds none.", "Name a folder that `manyedits run` wrote.")
        found += [p for p in here if p not in found]
    return found


def rows(folder: Path) -> list[Row]:
    """All figures of a run, by step, benchmark and metric."""
    info = run_info(folder)
    found = []
    for path in sorted((folder / "scores").glob("[0-9]*/*.json")):
        score = read_score(path)
        for s in score["scores"]:
            found.append(
                Row(
                    run=str(folder),
                    model=info.model,
                    method=info.label,
                    step=int(path.parent.name),
                    benchmark=score["benchmark"],
                    metric=s["metric"],
                    value=s["value"],
                    error=s["error"],
                    n=s["n"],
                    unscored=s["unscored"],
                    extra=s.get("extra", {}),
                )
            )
    return found


def read_score(path: Path) -> dict[str, Any]:
    """One score file. Raises ``UserError`` when it is broken."""
    try:
        score = json.loads(path.read_bytes())
        _Score.model_validate(score)
        return dict(score)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        what = "it is no score" if isinstance(error, ValidationError) else error
        raise UserError(f"{path} cannot be read: {what}.", "Delete it and run again; it is measured anew.") from None


def missing(info: RunInfo) -> list[tuple[int, str]]:
    """Checkpoints and benchmarks of a run that have no score yet."""
    run = RunDir(info.folder)
    return [(step, name) for step in info.steps for name in info.benchmarks if not run.score(step, name).is_file()]


def is_complete(info: RunInfo) -> bool:
    """Whether everything was edited, measured and reported."""
    return info.edited >= info.steps[-1] and RunDir(info.folder).report.is_file() and not missing(info)
