"""From a cell of an experiment to the objects that run it: requests, model, method, trajectory, benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manyedits import rundir
from manyedits.artifacts import Artifacts, default_root
from manyedits.benchmarks import benchmarks_named
from manyedits.benchmarks.base import Benchmark, Setting
from manyedits.config import Experiment, Options
from manyedits.data import Request
from manyedits.data.corpus import CORPORA, Corpus, read_corpus
from manyedits.data.sets import DATASETS, SOURCES, load_requests
from manyedits.errors import UserError
from manyedits.loading import load_model
from manyedits.methods import METHODS
from manyedits.methods.base import EditMethod, Supplies, check_model, preset
from manyedits.model import EditableModel
from manyedits.progress import Progress
from manyedits.rundir import RunDir
from manyedits.trajectory import Trajectory

#: How many texts of the corpus benchmarks may read.
VITAL_TEXTS = 100


def cell_of(run: RunDir) -> Experiment:
    """The cell that a run directory says it was made from."""
    try:
        return Experiment(**rundir.read_json(run.resolved)["experiment"])
    except (KeyError, TypeError, ValidationError):
        raise UserError(
            f"{run.resolved} was altered or written by another version.", "Restore it from a copy."
        ) from None


def requests_of(cell: Experiment) -> list[Request]:
    """The requests of a cell up to its last checkpoint, in the order in which they are edited."""
    data, place = cell.data, Path(cell.data.path) if cell.data.path else None
    if place is None and data.name not in SOURCES.names():
        DATASETS.load(data.name)  # an unknown name is told first
        raise UserError(f"The data set `{data.name}` needs a file.", "Set `data: {path: FILE}`.")
    everything = load_requests(data.name, place, data.seed, data.limit, data.order, cell.conflicts)
    return everything[: max(cell.checkpoints)]


def steps_of(cell: Experiment, requests: int) -> list[int]:
    """The checkpoints that this cell measures: multiples of its batch, and the end of the data."""
    return sorted({s for s in cell.checkpoints if s <= requests and (s % cell.batch == 0 or s == requests)})


def method_of(cell: Experiment) -> EditMethod:
    """The method with its preset's parameters and the experiment's own on top; not prepared."""
    cls = METHODS.load(cell.method.name)
    base = preset(cell.method.name, cell.method.preset)["params"] if cell.method.preset else {}
    return cls(cls.Params(**merged(base, cell.method.overrides)))  # type: ignore[no-any-return]


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Two levels of parameters: what the experiment says replaces what the preset says, key by key."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out


def model_of(cell: Experiment, options: Options) -> EditableModel:
    """The unedited model, and a refusal if the cell's method cannot work on it."""
    model = load_model(cell.model, cell.dtype, options.device, trust_remote_code=options.trust_remote_code)
    check_model(METHODS.load(cell.method.name), cell.method.name, model)
    return model


def corpus_of(cell: Experiment) -> Corpus | None:
    """The text that statistics are gathered over, if the experiment names one."""
    if cell.statistics is None:
        return None
    name = cell.statistics.corpus
    return CORPORA.load(name)() if name in CORPORA.names() else read_corpus(Path(name))  # type: ignore[no-any-return]


def supplies_of(cell: Experiment, progress: Progress) -> Supplies:
    """What the cell's method may use while it prepares."""
    return Supplies(Artifacts(default_root()), corpus_of(cell), cell.seed, progress=progress)


def trajectory_of(
    run: RunDir, cell: Experiment, model: EditableModel, method: EditMethod, requests: Sequence[Request], **more: Any
) -> Trajectory:
    """The cell's trajectory in a run directory."""
    identity = {"seed": cell.seed, "statistics": None if (text := corpus_of(cell)) is None else text.digest}
    return Trajectory(run, model, method, requests, cell.batch, identity, **more)


def benchmarks_of(cell: Experiment) -> list[Benchmark]:
    """The cell's benchmarks, suites taken apart, not prepared."""
    return [benchmark for name in cell.benchmarks for benchmark in benchmarks_named(name)]


def setting_of(cell: Experiment, requests: Sequence[Request], options: Options) -> Setting:
    """What the cell tells its benchmarks."""
    return Setting(
        requests=tuple(requests),
        seed=cell.seed,
        limit_items=cell.limit_items,
        max_new_tokens=cell.max_new_tokens,
        chat=cell.chat,
        texts=() if (corpus := corpus_of(cell)) is None else tuple(islice(corpus.texts(), VITAL_TEXTS)),
        data_dir=None if options.data_dir is None else str(options.data_dir),
    )
