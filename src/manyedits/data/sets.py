"""The data sets by name, and the way from a file to requests in a seeded order without surprises."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from manyedits.data import Request
from manyedits.data.reading import Record, read_records
from manyedits.errors import Mistakes, UserError
from manyedits.registry import Registry

logger = logging.getLogger(__name__)

Conflicts = Literal["refuse", "keep", "last"]
Reader = Callable[[str, dict[str, Any]], Request]

DATASETS = Registry(
    "data set",
    {
        "counterfact": "manyedits.data.counterfact:counterfact",
        "own": "manyedits.data.own:own",
    },
    "manyedits.datasets",
)

#: Facts that the package itself carries: a name and no file.
SOURCES = Registry(
    "data set",
    {
        "world": "manyedits.world.data:edit_requests",
        "world-editor": "manyedits.world.data:editor_requests",
    },
)

#: Mistakes of one file that are listed before the rest is only counted.
MOST_MISTAKES = 10


def load_requests(
    name: str,
    path: Path | None,
    seed: int = 0,
    limit: int | None = None,
    order: str = "seeded",
    conflicts: Conflicts = "refuse",
) -> list[Request]:
    """Requests of a data set: read, checked, freed of duplicates and conflicts, in the seeded order, the first ``limit``.

    The order does not depend on ``limit``, so a longer run begins with a shorter one. Raises ``Mistakes`` with every
    record that is wrong (the first ten in words).
    """
    found = SOURCES.load(name)() if path is None else _read(DATASETS.load(name), read_records(path))
    place = path or name
    requests = _without_conflicts(_without_duplicates(found), conflicts, place)
    if order == "seeded":
        random.Random(seed).shuffle(requests)
    if limit is not None and limit > len(requests):
        raise UserError(f"{place} gives {len(requests)} requests, `limit` asks for {limit}.", "Lower `limit`.")
    return requests[:limit]


def _read(reader: Reader, records: Sequence[Record]) -> list[Request]:
    requests, mistakes = [], []
    for where, record in records:
        try:
            requests.append(_checked(where, reader(where, record)))
        except UserError as error:
            mistakes.append(error)
    mistakes += _repeated_ids(requests)
    if len(mistakes) > MOST_MISTAKES:
        more = UserError(f"and {len(mistakes) - MOST_MISTAKES} more records with mistakes.")
        mistakes = [*mistakes[:MOST_MISTAKES], more]
    if mistakes:
        raise Mistakes(mistakes)
    return requests


def _checked(where: str, request: Request) -> Request:
    if request.span is None and request.prompt.count("{}") != 1:
        raise UserError(
            f"{where}: the prompt {request.prompt!r} does not hold the subject once: it needs one {{}}.",
            "Put {} where the subject stands, or give the whole text and `span`.",
        )
    start, end = request.subject_span
    if not 0 <= start < end <= len(request.text) or request.text[start:end] != request.subject:
        raise UserError(f"{where}: the subject {request.subject!r} is not in its prompt.", "Correct one of the two.")
    return request


def _repeated_ids(requests: Sequence[Request]) -> list[UserError]:
    """Figures of single facts are told apart by their ids, so two different facts may not share one."""
    by_id: dict[str, set[tuple[str, str]]] = {}
    for request in requests:
        by_id.setdefault(request.id, set()).add((request.text, request.target))
    return [
        UserError(f"The id `{name}` belongs to {len(facts)} different records.", "Give each record an id of its own.")
        for name, facts in by_id.items()
        if len(facts) > 1
    ]


def _without_duplicates(requests: Sequence[Request]) -> list[Request]:
    kept = {(r.text, r.subject, r.target): r for r in reversed(requests)}
    if len(kept) < len(requests):
        logger.warning("%d records repeat an earlier one word for word and are left out", len(requests) - len(kept))
    return list(reversed(kept.values()))


def _without_conflicts(requests: Sequence[Request], conflicts: Conflicts, place: Path | str) -> list[Request]:
    """Requests that write different answers to one prompt: refused, kept, or all but the last left out."""
    by_prompt: dict[str, list[Request]] = {}
    for request in requests:
        by_prompt.setdefault(request.text, []).append(request)
    clashes = [group for group in by_prompt.values() if len(group) > 1]
    if not clashes or conflicts == "keep":
        return list(requests)
    if conflicts == "refuse":
        ids = "; ".join(", ".join(r.id for r in group) for group in clashes[:5])
        raise UserError(
            f"{place}: {len(clashes)} prompts are to get several answers (records {ids}).",
            "Set `conflicts: keep` to write them one after the other, or `conflicts: last` to keep the last of each.",
        )
    losers = {id(r) for group in clashes for r in group[:-1]}
    logger.warning("%d records are left out because a later one writes another answer to their prompt", len(losers))
    return [r for r in requests if id(r) not in losers]
