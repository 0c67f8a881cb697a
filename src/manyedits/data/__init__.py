"""Requests: facts to write, and the prompts that tell whether they were written well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer that is right for it."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Request:
    """One fact to write.

    ``prompt`` is a template with one ``{}`` for the subject; or, where the subject stands in it twice or bent, the whole
    text with ``span``, the subject's place in it, in characters. Answers have no leading space.
    """

    id: str
    subject: str
    prompt: str
    target: str
    relation: str | None = None
    old_target: str | None = None
    span: tuple[int, int] | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()  # their answer must not change
    attributes: tuple[Probe, ...] = ()  # subjects of which the new answer is already true
    generation: tuple[str, ...] = ()
    portability: tuple[Probe, ...] = ()  # what follows from the new fact

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt if self.span is not None else self.prompt.replace("{}", self.subject, 1)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Where the subject stands in :attr:`text`, in characters."""
        if self.span is not None:
            return self.span
        start = self.prompt.index("{}")
        return start, start + len(self.subject)

    def template(self, context: str) -> tuple[str, tuple[int, int]]:
        """The text inside a context, a template with one ``{}``, and where the subject stands in that."""
        before, _, after = context.partition("{}")
        start, end = self.subject_span
        return before + self.text + after, (start + len(before), end + len(before))

    def content(self) -> dict[str, Any]:
        """Everything but the id, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name != "id"}


PROBES = ("neighbours", "attributes", "portability")


def request_from_dict(row: Mapping[str, Any]) -> Request:
    """A request from what :meth:`Request.content` and the id gave."""
    known = {field.name: row[field.name] for field in fields(Request) if field.name in row}
    for name in PROBES:
        known[name] = tuple(Probe(p["prompt"], p["target"]) for p in known.get(name) or ())
    for name in ("paraphrases", "generation"):
        known[name] = tuple(known.get(name) or ())
    if known.get("span") is not None:
        known["span"] = tuple(known["span"])
    return Request(**known)
