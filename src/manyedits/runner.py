"""The main flow: from an experiment to run directories, in the order in which things happen."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from manyedits import rundir
from manyedits.artifacts import default_root
from manyedits.assembly import (
    benchmarks_of,
    method_of,
    model_of,
    requests_of,
    setting_of,
    steps_of,
    supplies_of,
    trajectory_of,
)
from manyedits.benchmarks.base import Benchmark
from manyedits.checks import check_study
from manyedits.config import Experiment, Options, Study
from manyedits.data import Request
from manyedits.progress import Progress
from manyedits.report.markdown import write_markdown
from manyedits.results import is_complete, run_info
from manyedits.rundir import RunDir
from manyedits.scores import ScoreStore

logger = logging.getLogger(__name__)


def run(study: Study, options: Options, progress: Progress) -> list[Path]:
    """Edit, measure and report every cell of a study; goes on where an earlier run stopped.

    Every mistake of the experiment file is raised at once, before any weight is loaded.
    """
    check_study(study)
    folders = study.folders(options)
    for folder, cell in folders.items():
        run_cell(cell, study.text, folder, options, progress)
    write_markdown(study.out(options) / "report.md", list(folders))
    return list(folders)


def run_cell(cell: Experiment, text: str, folder: Path, options: Options, progress: Progress) -> None:
    """One model, one method, one sequence of requests: edit to the largest count, measure at every checkpoint."""
    run, benchmarks, requests = RunDir(folder), benchmarks_of(cell), requests_of(cell)
    steps = steps_of(cell, len(requests))
    resolved = {
        "digest": cell.digest(),
        "experiment": cell.facts(),
        "steps": steps,
        "benchmarks": [benchmark.name for benchmark in benchmarks],
    }
    with run.editing(), computing_with(cell.threads):
        run.begin(text, resolved, rundir.provenance(options.device, cell.seed, cell.threads))
        if is_complete(run_info(folder)):
            logger.info("%s is complete", folder)
            return
        measure(run, cell, benchmarks, requests[: steps[-1]], steps, options, progress)
        write_markdown(run.report, [folder])


def measure(
    run: RunDir,
    cell: Experiment,
    benchmarks: Sequence[Benchmark],
    requests: Sequence[Request],
    steps: Sequence[int],
    options: Options,
    progress: Progress,
) -> None:
    """Stand at every checkpoint in turn and score it; what was edited or scored before is taken from the run."""
    name = run.root.name
    model, method = model_of(cell, options), method_of(cell)
    method.prepare(model, supplies_of(cell, progress))
    for benchmark in benchmarks:
        benchmark.prepare(model, setting_of(cell, requests, options))
    progress.start(name, steps[-1])
    trajectory = trajectory_of(run, cell, model, method, requests, told=lambda step: progress.advance(name, cell.batch))
    store = ScoreStore(run, model, cell, default_root() / "scores")
    for step in steps:
        trajectory.at(step)
        trajectory.snapshot()
        for benchmark in benchmarks:
            progress.advance(name, 0, step=step, scoring=benchmark.name)
            store.measure(benchmark, step)
    progress.done(name)


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Compute with a fixed number of threads while inside: another number could round another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
