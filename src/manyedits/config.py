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
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from manyedits.errors import Mistakes, UserError
from manyedits.registry import near_miss

Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]


class Part(BaseModel):
    """A part of an experiment: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
    threads: Positive = Field(1, description="Threads of editing and scoring on the CPU. Count.")
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


# --- reading ----------------------------------------------------------------------------------------------------------


def load_study(path: Path) -> Study:
    """Read an experiment file. Raises ``Mistakes`` with everything that is wrong in its form, at once."""
    text = _text(path)
    return study_of(_yaml(path, text), text, path)


def study_of(content: Any, text: str, path: Path) -> Study:
    """A study out of the file's content."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is no experiment: it holds {type(content).__name__}.", "Write `key: value` lines.")
    variants = list(_grid(content))
    cells, mistakes = [], dict[str, UserError]()
    for values in variants:
        try:
            cells.append(Experiment(**_located(values, path.parent)))
        except ValidationError as error:
            mistakes.update({str(e): e for e in _as_user_errors(error, path)})
        except TypeError:
            raise UserError(f"{path}: the keys must be names.", "Write `key: value` lines.") from None
    if mistakes:
        raise Mistakes(list(mistakes.values()))
    return Study(path.stem, text, tuple(cells), tuple(_labels(variants)), path.parent)


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
        "model": [_short(v.get("model")) for v in variants],
        "method": [_method_label(v.get("method")) for v in variants],
        "batch": [f"batch{v.get('batch', 1)}" for v in variants],
        "seed": [f"seed{(v.get('data') or {}).get('seed', 0)}" for v in variants],
    }
    differing = [column for column in columns.values() if len(set(column)) > 1]
    labels = ["-".join(parts) for parts in zip(*differing, strict=True)] if differing else ["cell"] * len(variants)
    return [label if labels.count(label) == 1 else f"{label}-{i + 1}" for i, label in enumerate(labels)]


def _method_label(value: Any) -> str:
    if isinstance(value, Mapping):
        return _short("-".join(str(v) for k, v in value.items() if k in ("name",)) or "method")
    return _short(value)


def _short(value: Any) -> str:
    text = str(value.get("random", "model")) if isinstance(value, Mapping) else str(value).split("@")[0].rstrip("/")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.rsplit("/", 1)[-1])[:60] or "x"


def _as_user_errors(error: ValidationError, path: Path) -> list[UserError]:
    return [_as_user_error(e, path) for e in error.errors()]  # type: ignore[arg-type]


def _as_user_error(found: Mapping[str, Any], path: Path) -> UserError:
    place = ".".join(str(p) for p in found["loc"] if p not in ("str", "dict[str,any]"))
    if found["type"] == "extra_forbidden":
        parts: dict[str, type[Part]] = {"data": DataSpec, "method": MethodSpec, "statistics": StatisticsSpec}
        known = parts.get(str(found["loc"][0]), Experiment) if len(found["loc"]) > 1 else Experiment
        names = list(known.model_fields)
        return UserError(
            f"{path}: there is no key `{place}`.{near_miss(str(found['loc'][-1]), names)}",
            f"Known: {', '.join(names)}.",
        )
    if found["type"] == "missing":
        return UserError(f"{path}: the key `{place}` is missing.", "Every experiment needs it.")
    message = str(found["msg"]).removeprefix("Value error, ")
    return UserError(
        f"{path}: `{place}` is {_shown(found.get('input'))}: {message[:1].lower()}{message[1:]}.", "Correct it."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def validate_params(
    params: type[BaseModel], values: Mapping[str, Any], owner: str
) -> tuple[BaseModel | None, list[UserError]]:
    """Parameters of a method, or everything that is wrong with them."""
    try:
        return params(**values), []
    except ValidationError as error:
        return None, [_param_error(params, dict(e), owner) for e in error.errors()]
    except TypeError as error:
        return None, [UserError(f"The parameters of `{owner}` are unusable: {error}.", "Write `key: value` pairs.")]


def _param_error(params: type[BaseModel], found: Mapping[str, Any], owner: str) -> UserError:
    place = ".".join(str(p) for p in found["loc"])
    if found["type"] == "extra_forbidden":
        level: Any = params
        for name in found["loc"][:-1]:
            level = (
                getattr(level.model_fields.get(name), "annotation", level) if hasattr(level, "model_fields") else level
            )
        names = list(getattr(level, "model_fields", params.model_fields))
        return UserError(
            f"Method `{owner}` has no parameter `{place}`.{near_miss(str(found['loc'][-1]), names)}",
            f"Known: {', '.join(names)}.",
        )
    return UserError(f"Method `{owner}`: `{place}` is {_shown(found.get('input'))}: {found['msg']}.", "Correct it.")
