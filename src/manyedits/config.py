"""An experiment as the user writes it: YAML in, frozen and validated objects and their digest out.

What changes a result is in the experiment and its digest; what does not (device, workers, folders) is an option of the
command. ``model``, ``method``, ``batch`` and ``data.seed`` may be lists: the grid of all of them is a study, one run
directory per cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from manyedits import complaints
from manyedits.complaints import no_values
from manyedits.errors import Mistakes, UserError, raise_all
from manyedits.registry import near_miss, nearest

#: Larger numbers do not fit into the generators and counters of torch.
MOST = 2**63 - 1

Count = Annotated[int, Field(ge=0, le=MOST, strict=True)]
Positive = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Threads = Annotated[int, Field(ge=1, le=1024, strict=True)]


class Part(BaseModel):
    """A part of an experiment: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        """A key without a value, ``seed:`` or ``seed: null``, means its default."""
        if not isinstance(value, Mapping):
            return value
        return {k: v for k, v in value.items() if v is not None or k not in cls.model_fields}


class MethodSpec(Part):
    """Which method, from which preset, with which parameters of its own."""

    name: str = Field(description="The method's name; `manyedits list methods`.")
    preset: str | None = Field(None, description="A preset of the method; `manyedits list presets`.")
    overrides: dict[str, Any] = Field(default_factory=dict, description="Parameters that replace the preset's.")

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        """``memit``, or a mapping whose keys beside ``name`` and ``preset`` are parameters."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "overrides" not in value:
            known = {k: v for k, v in value.items() if k in ("name", "preset")}
            return {**known, "overrides": {k: v for k, v in value.items() if k not in known}}
        return value


class DataSpec(Part):
    """Which facts are edited, in which order."""

    name: str = Field(description="The data set's name; `manyedits list datasets`.")
    path: str | None = Field(None, description="The file; relative to the experiment file, then to the working folder.")
    limit: Positive | None = Field(None, description="How many requests of the order are taken. Count.")
    seed: Count = Field(0, description="Seed of the order. Integer.")
    order: Literal["seeded", "file"] = Field("seeded", description="Whether the order is drawn or that of the file.")


class StatisticsSpec(Part):
    """The text that second moments are gathered over."""

    corpus: str = Field(description="A text file, JSON lines with a field `text`, or `world`.")


class Experiment(Part):
    """One cell: one model, one method, one sequence of requests, and what is measured on the way."""

    model: str | dict[str, Any] = Field(description="A folder, owner/name@revision, world:m, or {random: llama, ...}.")
    method: MethodSpec = Field(description="The editing method.")
    data: DataSpec = Field(description="The facts to write.")
    batch: Positive = Field(1, description="Requests per edit. Count.")
    checkpoints: tuple[Count, ...] = Field(description="Counts of requests at which is measured.", min_length=1)
    benchmarks: tuple[str, ...] = Field(("edits",), description="What is measured; `manyedits list benchmarks`.")
    seed: Count = Field(0, description="Seed of everything random but the order of the data. Integer.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="The type the model runs in.")
    threads: Threads = Field(1, description="Threads of editing and scoring on the CPU. Count.")
    conflicts: Literal["refuse", "keep", "last"] = Field("refuse", description="What becomes of conflicting requests.")
    chat: Literal["auto", "off"] = Field("auto", description="Whether instruct models are asked in their chat form.")
    statistics: StatisticsSpec | None = Field(
        None, description="The text for second moments, if the method needs them."
    )
    limit_items: Positive | None = Field(None, description="The most items of a task. Count.")
    max_new_tokens: Positive | None = Field(None, description="The longest generated answer. Tokens.")

    @field_validator("checkpoints")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    def facts(self) -> dict[str, Any]:
        """Every value in force, as JSON can hold it."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Identity of the experiment. Of files only the names count: what is in them is part of every step's id."""
        facts = self.facts()
        facts["model"] = _named(facts["model"])
        if isinstance(facts["model"], dict):
            facts["model"]["tokenizer"] = _named(facts["model"].get("tokenizer"))
        facts["data"]["path"] = _named(facts["data"]["path"])
        if facts["statistics"]:
            facts["statistics"]["corpus"] = _named(facts["statistics"]["corpus"])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _named(reference: Any) -> Any:
    return Path(reference).name if isinstance(reference, str) else reference


@dataclass(frozen=True)
class Options:
    """Where and how a command runs; none of it changes a result."""

    out: Path | None = None
    device: str = "cpu"
    data_dir: Path | None = None
    workers: int = 1
    accept_data: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Study:
    """All cells of an experiment file, and the file itself."""

    name: str
    text: str
    cells: tuple[Experiment, ...]
    labels: tuple[str, ...]  # what tells each cell from the others; empty when there is one
    home: Path = field(default_factory=Path.cwd)  # the folder of the experiment file

    def digest(self) -> str:
        """Identity of the whole grid."""
        return hashlib.sha256("".join(cell.digest() for cell in self.cells).encode()).hexdigest()

    def out(self, options: Options) -> Path:
        """The folder of the study: ``--out``, else runs/NAME-DIGEST."""
        return options.out or Path("runs") / f"{self.name}-{self.digest()[:8]}"

    def folders(self, options: Options) -> dict[Path, Experiment]:
        """The run directory of each cell."""
        root = self.out(options)
        places = [root / label if label else root for label in self.labels]
        return dict(zip(places, self.cells, strict=True))


#: A cell whose form is sound but for some keys, which have stand-ins; and the names of those.
Sound = tuple[Experiment, frozenset[str]]

FIELDS = tuple(Experiment.model_fields)
STAND_INS: Mapping[str, Any] = MappingProxyType(
    {"model": "-", "method": {"name": "-"}, "data": {"name": "-"}, "checkpoints": (0,)}
)


class FormMistakes(Mistakes):
    """What is wrong in the form of an experiment file; ``rest`` is what can be looked at all the same."""

    def __init__(self, errors: Sequence[UserError], rest: Sequence[Sound]) -> None:
        super().__init__(errors)
        self.rest = tuple(rest)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_study(path: Path) -> Study:
    """Read an experiment file. Raises ``Mistakes`` with everything that is wrong in its form, at once."""
    text = _text(path)
    return study_of(_yaml(path, text), text, path)


def study_of(content: Any, text: str, path: Path) -> Study:
    """A study out of the file's content."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is no experiment: it holds {type(content).__name__}.", "Write `key: value` lines.")
    raise_all([UserError(f"{path}: {what}.", "Write a text, a number, a list.") for what in no_values(content)])
    variants = list(_grid(content))
    cells, mistakes, rest = [], dict[str, UserError](), list[Sound]()
    for values in (_located(v, path.parent) for v in variants):
        try:
            cells.append(Experiment(**values))
            rest.append((cells[-1], frozenset()))
        except ValidationError as error:
            mistakes.update({str(e): e for e in complaints.of_file(error, path, Experiment)})
            rest += _what_is_sound(values, error)
    if mistakes:
        raise FormMistakes(list(mistakes.values()), rest)
    if len({json.dumps(cell.facts(), sort_keys=True) for cell in cells}) < len(cells):
        raise UserError(f"{path}: its lists give the same cell twice.", "Remove the repeated entry.")
    return Study(path.stem, text, tuple(cells), tuple(_labels(variants)), path.parent)


def _what_is_sound(values: Mapping[str, Any], error: ValidationError) -> list[Sound]:
    """A cell without its wrong keys, and which these are; a key that was misspelled counts as wrong."""
    wrong = {str(e["loc"][0]) for e in error.errors()}
    missed = {near for name in wrong - set(FIELDS) if (near := nearest(name, FIELDS)) and values.get(near) is None}
    kept = {name: value for name, value in values.items() if name not in wrong}
    try:
        return [(Experiment(**{**STAND_INS, **kept}), frozenset(wrong | missed))]
    except ValidationError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        near = near_miss(path.name, (p.name for p in path.parent.glob("*.y*ml")))
        raise UserError(f"There is no experiment file {path}.{near}", "Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Give the path of a YAML file.") from None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not a name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` stands twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a safe loader, made stricter)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{place}: {what}.", "Mend the YAML there.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not usable YAML: {error}.", "Mend the YAML.") from None


def _grid(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the keys that may be lists."""
    data = content.get("data")
    seeds = data.get("seed") if isinstance(data, Mapping) else None
    lists = {k: content[k] for k in ("model", "method", "batch") if isinstance(content.get(k), list) and content[k]}
    if isinstance(seeds, list) and seeds:
        lists["data.seed"] = seeds
    for chosen in itertools.product(*lists.values()):
        values = {**content, **{k: v for k, v in zip(lists, chosen, strict=True) if k != "data.seed"}}
        if "data.seed" in lists:
            values["data"] = {**content["data"], "seed": chosen[list(lists).index("data.seed")]}
        yield values


def _located(values: dict[str, Any], home: Path) -> dict[str, Any]:
    """Paths relative to the experiment file made so that they hold from the working folder."""
    found = dict(values)
    if isinstance(found.get("model"), str):
        found["model"] = _place(found["model"], home)
    for part, key in (("model", "tokenizer"), ("data", "path"), ("statistics", "corpus")):
        below = found.get(part)
        if isinstance(below, Mapping) and isinstance(below.get(key), str):
            found[part] = {**below, key: _place(below[key], home)}
    return found


def _place(path: str, home: Path) -> str:
    try:
        beside = home / path
        return str(beside.resolve()) if beside.exists() else path
    except (OSError, ValueError):
        return path


def _labels(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder name per cell, made of what differs."""
    if len(variants) == 1:
        return [""]
    columns = {
        "model": _model_labels([v.get("model") for v in variants]),
        "method": _method_labels([v.get("method") for v in variants]),
        "batch": [f"batch{v.get('batch', 1)}" for v in variants],
        "seed": [f"seed{(v.get('data') or {}).get('seed', 0)}" for v in variants],
    }
    differing = [column for column in columns.values() if len(set(column)) > 1]
    labels = ["-".join(parts) for parts in zip(*differing, strict=True)] if differing else ["cell"] * len(variants)
    return [label if labels.count(label) == 1 else f"{label}-{i + 1}" for i, label in enumerate(labels)]


def _method_labels(values: Sequence[Any]) -> list[str]:
    """A method's name, and what tells it from others of that name in the grid: ``memit-value.steps5``."""
    flat = [dict(_flat(v)) if isinstance(v, Mapping) else {"name": v} for v in values]
    return [_method_label(one, [other for other in flat if other["name"] == one["name"]]) for one in flat]


def _method_label(one: Mapping[str, Any], namesakes: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for other in namesakes for key in other)
    differing = [key for key in keys if any(other.get(key) != one.get(key) for other in namesakes)]
    parts = [f"{'' if key == 'preset' else key}{one[key]}" for key in differing if key in one]
    return _plain("-".join([str(one["name"]), *parts]))


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, below in value.items():
        if isinstance(below, Mapping):
            yield from _flat(below, f"{above}{key}.")
        else:
            yield above + key, below


def _model_labels(values: Sequence[Any]) -> list[str]:
    """A model's last name; with the folder it lies in where another has the same."""
    texts = [str(v.get("random")) if isinstance(v, Mapping) else str(v).split("@")[0].rstrip("/") for v in values]
    names = {text: text.rsplit("/", 1)[-1] for text in texts}
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return [_plain("/".join(t.split("/")[-2:]) if names[t] in shared else names[t]) for t in texts]


def _plain(text: str) -> str:
    """A text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:60] or "x"
