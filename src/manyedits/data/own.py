"""Our own form: JSON lines whose fields are those of ``Request``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from manyedits.data import PROBES, Probe, Request
from manyedits.data.reading import id_field, optional_text, text_field, texts_field
from manyedits.errors import UserError
from manyedits.registry import near_miss

NAMES = tuple(field.name for field in fields(Request))


def own(where: str, record: dict[str, Any]) -> Request:
    """One record; an unknown field is refused with the near miss."""
    for name in record:
        if name not in NAMES:
            raise UserError(
                f"{where}: there is no field `{name}`.{near_miss(name, NAMES)}", f"Known: {', '.join(NAMES)}."
            )
    return Request(
        id=id_field(where, record, "id"),
        subject=text_field(where, record, "subject"),
        prompt=text_field(where, record, "prompt"),
        target=text_field(where, record, "target").strip(),
        relation=optional_text(where, record, "relation"),
        old_target=optional_text(where, record, "old_target"),
        span=_span(where, record),
        paraphrases=texts_field(where, record, "paraphrases"),
        generation=texts_field(where, record, "generation"),
        **{name: _probes(where, record, name) for name in PROBES},
    )


def _span(where: str, record: dict[str, Any]) -> tuple[int, int] | None:
    value = record.get("span")
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)):
        raise UserError(f"{where}: the field `span` is not a pair of character positions.", "Give [start, end].")
    return value[0], value[1]


def _probes(where: str, record: dict[str, Any], name: str) -> tuple[Probe, ...]:
    value = record.get(name) or []
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise UserError(
            f"{where}: the field `{name}` is not a list of prompts with targets.", 'Give [{"prompt", "target"}].'
        )
    return tuple(Probe(text_field(where, v, "prompt"), text_field(where, v, "target").strip()) for v in value)
