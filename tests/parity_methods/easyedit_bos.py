"""EasyEdit's ROME and MEMIT with a tokenizer that puts a BOS in front: the lookup index, then the weights.

Whether a recorded index is right is decided by the text alone: the tokens up to it, decoded, must end with the subject.
Where it is not, everything computed at it is the reference's mistake and not ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from golden import Golden
from manyedits.data import Request
from manyedits.tokens import lookup_rows
from parity_methods.edits import EditAdapter, Hparams
from parity_methods.memit import MemitAdapter
from parity_methods.rome import RomeAdapter
from parity_methods.stage import Stage
from parity_methods.table import BROKEN, EQUAL, SKIPPED, Case, Row, Table

TOKENIZER = "tokenizer_bos"
OFF = "its lookup index does not end with the subject's last token"
PARTS: dict[str, EditAdapter] = {"rome": RomeAdapter(), "memit": MemitAdapter()}
MEMBER = re.compile(r"(?:^|[._])(rome|memit)(?:[._]|$)", re.IGNORECASE)
NUMBERED = re.compile(r"(?:single|seq|request|record)_?(\d+)")


class EasyEditBosAdapter:
    """Runs the adapters of ROME and MEMIT with the other tokenizer, on whatever cases were recorded."""

    method = "easyedit_bos"

    def rows(self, stage: Stage) -> list[Row]:
        other = Stage(stage.golden, TOKENIZER)
        wrong: set[int] = set()
        table = Table(self.method, {})
        for path, value in lookups(stage.golden.notes(self.method).get("scalars", {})):
            self._lookup(other, table, path, value, wrong)
        return [*table.close(), *self._weights(other, wrong)]

    # --- indices ----------------------------------------------------------------------------------------------------

    def _lookup(self, stage: Stage, table: Table, path: str, value: int, wrong: set[int]) -> None:
        """One recorded index of a bare prompt; `path` ends with the request's number."""
        number = int(path.rsplit(".", 1)[1])
        request = stage.requests[number]
        ((_, ours),) = lookup_rows(stage.model.tokenizer, [request], ("{}",), "subject_last")
        case = Case(self.method, path.rsplit(".", 1)[0], f"request {number}", "", (number,))
        if ends_with_subject(stage, request, value):
            table.judge(case, 1, "lookup", float(abs(ours - value)), EQUAL)
        else:
            wrong.add(number)
            table.rows.append(Row(1, self.method, case.variant, case.name, "lookup", BROKEN + OFF))

    # --- weights ----------------------------------------------------------------------------------------------------

    def _weights(self, stage: Stage, wrong: set[int]) -> list[Row]:
        recorded = stage.golden.tensors(self.method)
        rows: list[Row] = []
        for member, part in PARTS.items():
            mine = {key: tensor for key, tensor in recorded.items() if belongs(key, member)}
            if mine:
                rows += self._member(stage, member, part, mine, wrong)
        strangers = [key for key in recorded if not any(belongs(key, member) for member in PARTS)]
        return rows + [Row(7, self.method, "-", "-", key, SKIPPED + "no rule for this tensor") for key in strangers]

    def _member(self, stage: Stage, member: str, part: EditAdapter, mine: dict[str, Any], wrong: set[int]) -> list[Row]:
        renamed = {stripped(key, member): tensor for key, tensor in mine.items()}
        table = Table(self.method, renamed, part.broken)
        hparams = hparams_of(stage.golden, member, part.default)
        for variant in part.variants(renamed):
            part.variant(stage, table, variant, hparams)
        rows = table.close()
        return [self._relabelled(row, member, part.default, wrong) for row in rows]

    def _relabelled(self, row: Row, member: str, default: str, wrong: set[int]) -> Row:
        variant = member if row.variant in ("-", default) else f"{member}.{row.variant}"
        number = NUMBERED.search(row.case)
        named = replace(row, method=self.method, variant=variant)
        if number and int(number[1]) in wrong and row.error is not None and row.check > 3:
            return replace(named, verdict=BROKEN + OFF, error=None, tolerance=None)
        return named


def lookups(scalars: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Recorded lookup indices as (path ending with a request's number, index), however they are nested."""
    for key, value in scalars.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield from lookups(value, here)
        elif "lookup" in here:
            yield from numbered(here.removesuffix(".value"), value)


def numbered(path: str, value: Any) -> Iterator[tuple[str, int]]:
    """A list is an index per request; a number belongs to the request that its path names, or to the first."""
    if isinstance(value, list):
        for number, each in enumerate(value):
            first = each[0] if isinstance(each, list) else each
            if isinstance(first, int):
                yield f"{path}.{number}", first
    elif isinstance(value, int) and not isinstance(value, bool):
        named = NUMBERED.search(path) or re.search(r"\.(\d+)(?=\.|$)", path)
        yield f"{path}.{named[1] if named else 0}", value


def ends_with_subject(stage: Stage, request: Request, index: int) -> bool:
    """Whether the prompt's tokens up to an index end with the subject. A negative index counts from the end."""
    tokenizer = stage.model.tokenizer
    ids = tokenizer(request.text)["input_ids"]
    up_to = ids[: (index if index >= 0 else len(ids) + index) + 1]
    return bool(tokenizer.decode(up_to, skip_special_tokens=True).endswith(request.subject))


def belongs(key: str, member: str) -> bool:
    found = MEMBER.search(key)
    return found is not None and found[1].lower() == member


def stripped(key: str, member: str) -> str:
    """A key without the part that names the method."""
    return ".".join(part for part in key.split(".") if part.lower() != member)


def hparams_of(golden: Golden, member: str, default: str) -> Hparams:
    """The method's own parameters where the folder has them for this file, else those of its default variant."""
    own = golden.hparams("easyedit_bos")
    found = next((value for name, value in own.items() if belongs(name, member)), None)
    return found if found is not None else golden.hparams(member)[default]


ADAPTER = EasyEditBosAdapter()
