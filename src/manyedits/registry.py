"""Names to things: a table of "module:attribute", loaded on use, open to other packages through entry points."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from manyedits.errors import UserError


def nearest(word: str, choices: Iterable[str]) -> str:
    """The closest choice, or an empty text."""
    close = difflib.get_close_matches(str(word).lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    return close[0] if close else ""


def near_miss(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean `memit`?`` for the closest choice, or nothing."""
    close = nearest(word, choices)
    return f" Did you mean `{close}`?" if close else ""


class Registry:
    """One open set, such as the methods. Nothing is imported until a name is asked for."""

    def __init__(self, kind: str, table: Mapping[str, str], entry_point_group: str | None = None) -> None:
        self.kind = kind
        self._table = dict(table)
        self._group = entry_point_group

    def names(self) -> list[str]:
        """All names, our own first, then those of other packages."""
        return [*self._table, *(name for name in sorted(self._foreign()) if name not in self._table)]

    def load(self, name: str) -> Any:
        """What a name stands for. Raises ``UserError`` with the near miss for an unknown one."""
        if name in self._table:
            module, _, attribute = self._table[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        foreign = self._foreign()
        if name in foreign:
            return self._load_foreign(foreign[name])
        raise UserError(
            f"There is no {self.kind} `{name}`.{near_miss(name, self.names())}",
            f"Known: {', '.join(self.names())}.",
        )

    def _load_foreign(self, entry: EntryPoint) -> Any:
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"The {self.kind} `{entry.name}` of another package ({entry.value}) cannot be loaded: {error}.",
                "Install that package again, or ask its authors.",
            ) from error

    def _foreign(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self._group)} if self._group else {}
