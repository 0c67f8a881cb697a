"""Does a run directory hold together: journal, change files, snapshots, and does replaying give the same states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from manyedits.assembly import cell_of, method_of, model_of, requests_of, supplies_of, trajectory_of
from manyedits.config import Experiment, Options
from manyedits.errors import UserError
from manyedits.progress import Silent
from manyedits.results import read_score
from manyedits.rundir import RunDir
from manyedits.trajectory import Trajectory, file_digest


def verify(folder: Path, options: Options) -> list[str]:
    """Problems of a run directory, each naming file and step; none means that it holds."""
    run = RunDir(folder)
    cell = cell_of(run)
    requests = requests_of(cell)
    model, method = model_of(cell, options), method_of(cell)
    try:
        trajectory = trajectory_of(run, cell, model, method, requests)
    except UserError as error:
        return [str(error)]
    problems = [*_changes(trajectory), *_snapshots(trajectory), *_scores(trajectory)]
    return problems or list(_replay(trajectory, cell))


def _changes(trajectory: Trajectory) -> Iterator[str]:
    for step, line in trajectory.lines.items():
        if line.change is not None:
            path = trajectory.run.root / "changes" / line.change
            yield from _compared(path, step, line.change_digest)


def _snapshots(trajectory: Trajectory) -> Iterator[str]:
    for step, digest in trajectory.snapshots.items():
        if step in trajectory.lines:
            yield from _compared(trajectory.run.snapshot(step), step, digest)
        else:
            yield _without_line(trajectory, trajectory.run.snapshot(step), step)


def _compared(path: Path, step: int, digest: str | None) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: the file of step {step} is missing."
    elif file_digest(path.read_bytes()) != digest:
        yield f"{path}: the file of step {step} is not the one that was written."


def _scores(trajectory: Trajectory) -> Iterator[str]:
    for path in sorted((trajectory.run.root / "scores").glob("*/*.json")):
        step = int(path.parent.name)
        line = trajectory.lines.get(step)
        if line is None and step:
            yield _without_line(trajectory, path, step)
        elif line is not None and read_score(path)["state"] != line.digest:
            yield f"{path}: measured on another state than the journal's step {step}."


def _without_line(trajectory: Trajectory, path: Path, step: int) -> str:
    """Snapshots and scores come after the journal's line, so a step that has one and no line has lost it."""
    return f"{trajectory.run.journal}: the line of step {step} is missing or torn, but {path.name} is of that step."


def _replay(trajectory: Trajectory, cell: Experiment) -> Iterator[str]:
    """Go through every step from the base, without snapshots, comparing each state with the journal's."""
    if any(line.change is None for line in trajectory.lines.values()):
        trajectory.method.prepare(trajectory.model, supplies_of(cell, Silent()))
    trajectory.snapshots.clear()
    try:
        for step in trajectory.lines:
            trajectory.at(step)
    except UserError as error:
        yield str(error)
