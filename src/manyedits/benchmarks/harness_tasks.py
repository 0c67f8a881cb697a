"""Tasks of lm-evaluation-harness by name, by YAML file or as a dictionary; nothing has to be registered.

The harness knows some 14,000 names and takes seconds to index them. A task's folder is nearly always named like the
beginning of the task, so that folder is looked into first, and everything only for names that are not found there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from lm_eval import tasks as harness
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyedits.benchmarks import BENCHMARKS
from manyedits.errors import UserError
from manyedits.registry import near_miss

logger = logging.getLogger(__name__)

OWN_TASKS = Path(__file__).parents[1] / "tasks"
BUILT_IN = Path(harness.__file__).parent


class Loaded(NamedTuple):
    """The tasks that one name stands for, and the groups that sum them up."""

    tasks: dict[str, Task]
    groups: dict[str, Group]


class TaskSpec(BaseModel):
    """A task and what may be set about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str | dict[str, Any] = Field(description="Name of a task or group, path of a YAML file, or a configuration.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples in the prompt, where the task leaves it open.")
    limit: int | None = Field(None, ge=1, description="The most items, drawn with a fixed seed, stratified.")
    max_new_tokens: int | None = Field(None, ge=1, description="The longest generated answer, in tokens.")

    @property
    def name(self) -> str:
        """What the benchmark is called in files and reports."""
        if isinstance(self.task, dict):
            return str(self.task.get("task") or self.task.get("group"))
        return Path(self.task).stem if is_path(self.task) else self.task


def is_path(name: str) -> bool:
    """Whether a task is meant by its file."""
    return name.endswith((".yaml", ".yml"))


# --- suites ---------------------------------------------------------------------------------------------------------


def suite(name: str) -> list[TaskSpec]:
    """The tasks of a suite."""
    suites = yaml.safe_load((OWN_TASKS / "suites.yaml").read_text(encoding="utf-8"))
    if name not in suites:
        known = ", ".join(sorted(suites))
        raise UserError(f"There is no suite `{name}`.{near_miss(name, suites)}", f"Suites: {known}.")
    return [spec for entry in suites[name] for spec in _specs(entry)]


def _specs(entry: str | Mapping[str, Any]) -> Iterator[TaskSpec]:
    if isinstance(entry, str):
        yield TaskSpec(task=entry)
    elif "python" in entry:
        module, _, function = entry["python"].partition(":")
        yield from (TaskSpec(task=config) for config in getattr(import_module(module), function)())
    else:
        yield TaskSpec(**entry)


# --- loading --------------------------------------------------------------------------------------------------------


class _Mirrored(TaskFactory):
    """Makes tasks that read a data set from ``folder/OWNER/NAME`` where that exists, and from the hub otherwise."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        mirror = self.folder / str(config.get("dataset_path"))
        return {**config, "dataset_path": str(mirror)} if mirror.is_dir() else config


def load(spec: TaskSpec, data_dir: str | None = None) -> Loaded:
    """The tasks with their data; whatever is wrong with them is the user's to mend.

    ``data_dir`` may hold copies of data sets of the hub, each in a folder named like it: ``cais/mmlu``.
    """
    with quiet():
        manager, wanted = _found(spec.task)
        if data_dir is not None:
            manager = copy(manager)
            manager._factory = _Mirrored(Path(data_dir))
        try:
            found = manager.load(wanted)
        except UserError:
            raise
        except yaml.YAMLError as error:
            raise _broken(spec, error) from error
        except Exception as error:  # a task's file may run anything, so it may fail in any way
            raise UserError(
                f"The task `{spec.name}` could not be loaded: {type(error).__name__}: {_first_line(error)}",
                "Its data may be missing here (no network), or its file may have a mistake.",
            ) from error
    loaded = Loaded(dict(found["tasks"]), dict(found.get("groups", {})))
    for name, task in loaded.tasks.items():
        _supported(name, task)
    return loaded


def root_of(groups: Mapping[str, Group]) -> str | None:
    """The group that holds all the others, if there is one."""
    below = {child.name for group in groups.values() for child in group.get_all_groups()}
    roots = [name for name in groups if name not in below]
    return roots[0] if len(roots) == 1 else None


def check(spec: TaskSpec) -> None:
    """Raise if there is no such task, without reading its data."""
    with quiet():
        _found(spec.task)


def _found(task: str | dict[str, Any]) -> tuple[TaskManager, str | dict[str, Any]]:
    """An index that knows the task and everything that it refers to, and what to ask it for."""
    if isinstance(task, dict):
        return TaskManager(include_defaults=False), task
    return _found_file(Path(task)) if is_path(task) else (_manager(task), task)


def _manager(task: str) -> TaskManager:
    """An index that knows a name: of the likeliest folders, else of everything."""
    near = _indexed(tuple(_folders(task)))
    entry = near.task_index.get(task)
    if entry is not None and entry.kind is not Kind.TAG and _complete(near, task):  # a tag may have members anywhere
        return near
    everything = _everything()
    if task not in everything.task_index:
        raise UserError(
            f"There is no benchmark `{task}`.{near_miss(task, [*BENCHMARKS.names(), *everything.all_tasks])}",
            "Give the name of a task or group of lm-evaluation-harness, the path of a YAML file, or `suite:NAME`.",
        )
    return everything


def _folders(task: str) -> Iterator[Path]:
    """Our own tasks, and the built-in folders named like the beginning of a task."""
    yield OWN_TASKS
    words = task.split("_")
    for count in range(len(words), 0, -1):
        folder = BUILT_IN / "_".join(words[:count])
        if folder.is_dir():
            yield folder


@lru_cache(maxsize=64)
def _indexed(folders: tuple[Path, ...]) -> TaskManager:
    return TaskManager(include_path=list(folders), include_defaults=False)


@lru_cache(maxsize=1)
def _everything() -> TaskManager:
    return TaskManager(include_path=[OWN_TASKS])


def _found_file(path: Path) -> tuple[TaskManager, str]:
    """A task by its file; a group by its name, in an index of the files beside it and, if need be, of everything."""
    config = _read(path)
    if "group" not in config:
        return TaskManager(include_defaults=False), str(path)
    near = _with_files(TaskManager(include_defaults=False), path.parent)
    if _complete(near, config["group"]):
        return near, config["group"]
    return _with_files(TaskManager(include_path=[OWN_TASKS]), path.parent), config["group"]


def _with_files(manager: TaskManager, folder: Path) -> TaskManager:
    """An index that also knows the files of a folder; those that are no tasks are passed over, as the harness does."""
    for path in sorted(folder.glob("*.yaml")):
        try:
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, manager.task_index)
        except (ValueError, OSError, yaml.YAMLError) as error:
            logger.debug("%s is no task: %s", path, error)
    return manager


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no task file {path}.", "Correct the path.")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Lenient)  # noqa: S506
    except yaml.YAMLError as error:
        raise _broken(TaskSpec(task=str(path)), error) from error
    if not isinstance(config, dict) or not ({"task", "group", "class", "include"} & set(config)):
        raise UserError(f"{path} is no task: it has neither `task` nor `group`.", "See the harness's task guide.")
    return config


class _Lenient(yaml.SafeLoader):
    """A safe loader that reads a task's file without running what its tags name."""


_Lenient.add_multi_constructor("!", lambda loader, suffix, node: str(getattr(node, "value", "")))


def _complete(manager: TaskManager, name: str) -> bool:
    """Whether an index holds a name and everything below it."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    return not isinstance(members, list) or all(_known(manager, member) for member in members)


def _known(manager: TaskManager, member: Any) -> bool:
    if isinstance(member, str):
        return _complete(manager, member)
    name = member.get("group") or member.get("task")
    if name not in manager.task_index and len(member) > 1:  # defined on the spot
        below = member["task"] if isinstance(member.get("task"), list) else []
        return all(_known(manager, each) for each in below)
    return _complete(manager, name)


def _broken(spec: TaskSpec, error: yaml.YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or _first_line(error)
    return UserError(f"The task file {spec.task} is no valid YAML: {where}{problem}.", "Correct the file.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _supported(name: str, task: Task) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"The task `{name}` shows pictures or sound.", "Only tasks on text can be measured.")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"The task `{name}` runs code that the model wrote.", "It is not run here; leave it out.")


def set_shots(loaded: Loaded, num_fewshot: int | None, seed: int) -> None:
    """Examples and their random draw, by the harness's rules: a task that says 0 keeps 0."""
    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed)


@contextmanager
def quiet() -> Iterator[None]:
    """The harness warns about most of what it does, and data sets draw bars; while inside, only errors are shown."""
    harness_logger = logging.getLogger("lm_eval")
    level, without_bars = harness_logger.level, are_progress_bars_disabled()
    harness_logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        harness_logger.setLevel(level)
        if not without_bars:
            enable_progress_bars()


def spec_of(task: str | Mapping[str, Any]) -> TaskSpec:
    """A spec out of a name, a file, a task's configuration, or a mapping with `task` and settings."""
    settings = set(TaskSpec.model_fields) - {"task"}
    if isinstance(task, str):
        return TaskSpec(task=task)
    try:
        return TaskSpec(**task) if set(task) - {"task"} <= settings else TaskSpec(task=dict(task))
    except ValidationError as error:
        raise UserError(f"The task {task.get('task')!r} has a wrong setting: {error.errors()[0]['msg']}.") from error
