"""What validation found wrong, as sentences for the user: the place, the value, the near miss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from manyedits.errors import UserError
from manyedits.registry import near_miss

#: What YAML and JSON have in common.
PLAIN = (str, int, float, bool, type(None))


def of_file(error: ValidationError, path: Path, model: type[BaseModel]) -> list[UserError]:
    """What is wrong in an experiment file, each thing once."""
    found = [_of_file(dict(e), path, model) for e in error.errors()]
    return list({str(e): e for e in found}.values())


def _of_file(found: Mapping[str, Any], path: Path, model: type[BaseModel]) -> UserError:
    place = ".".join(str(p) for p in found["loc"] if p not in ("str", "dict[str,any]"))
    if found["type"] == "extra_forbidden":
        names = list(_level(model, found["loc"][:-1]).model_fields)
        return _unknown(f"{path}: there is no key `{place}`.", found, names)
    if found["type"] == "missing":
        return UserError(f"{path}: the key `{place}` is missing.", "Every experiment needs it.")
    if place == "model":  # a union: one sentence instead of one for each of its types
        return UserError(f"{path}: `model` is {shown(found.get('input'))}.", "Give a text or a mapping.")
    message = str(found["msg"]).removeprefix("Value error, ")
    return UserError(
        f"{path}: `{place}` is {shown(found.get('input'))}: {message[:1].lower()}{message[1:]}.", "Correct it."
    )


def of_params(
    params: type[BaseModel], values: Mapping[str, Any], owner: str
) -> tuple[BaseModel | None, list[UserError]]:
    """Parameters of a method, or everything that is wrong with them."""
    try:
        return params(**values), []
    except ValidationError as error:
        return None, [_of_param(params, dict(e), owner) for e in error.errors()]
    except TypeError as error:
        return None, [UserError(f"The parameters of `{owner}` are unusable: {error}.", "Write `key: value` pairs.")]


def _of_param(params: type[BaseModel], found: Mapping[str, Any], owner: str) -> UserError:
    place = ".".join(str(p) for p in found["loc"])
    if found["type"] == "extra_forbidden":
        names = list(_level(params, found["loc"][:-1]).model_fields)
        return _unknown(f"Method `{owner}` has no parameter `{place}`.", found, names)
    return UserError(f"Method `{owner}`: `{place}` is {shown(found.get('input'))}: {found['msg']}.", "Correct it.")


def _level(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """The part of a model that a place lies in, as far as it can be followed."""
    for name in path:
        below = getattr(model.model_fields.get(name), "annotation", None)
        if isinstance(below, type) and issubclass(below, BaseModel):
            model = below
    return model


def _unknown(what: str, found: Mapping[str, Any], names: Sequence[str]) -> UserError:
    return UserError(what + near_miss(str(found["loc"][-1]), names), f"Known: {', '.join(names)}.")


def no_values(value: Any, place: str = "") -> Iterator[str]:
    """What no key can hold, such as bytes, a date, or a text with half a character; each named with its place."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _no_text(key, f"the key {key!r}")
            yield from no_values(below, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from no_values(below, f"{place}.{number}")
    elif isinstance(value, str):
        yield from _no_text(value, f"`{place}`")
    elif not isinstance(value, PLAIN):
        yield f"`{place}` is {shown(value)}, a {type(value).__name__}"


def _no_text(value: str, name: str) -> Iterator[str]:
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        yield f"{ascii(name)[1:-1]} holds a character that no text has"


def shown(value: Any) -> str:
    """A value, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
