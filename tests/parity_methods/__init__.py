"""One file per recorded method: how ours is run on a recorded case, and which tensor is compared with what tolerance.

Adding a method is one file with an `ADAPTER` that has `method` and `rows(stage)`, and one line in the table below.
Methods of the locate-then-edit kind take `EditAdapter` from `edits.py` and state rules, a factory and closed forms.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from parity_methods.stage import Stage
from parity_methods.table import Row

#: Where each recorded method is compared.
MODULES = {
    "covariance": "parity_methods.covariance",
    "rome": "parity_methods.rome",
    "r_rome": "parity_methods.r_rome",
    "memit": "parity_methods.memit",
    "emmet": "parity_methods.emmet",
    "alphaedit": "parity_methods.alphaedit",
    "pmet": "parity_methods.pmet",
    "ft": "parity_methods.ft",
    "easyedit_bos": "parity_methods.easyedit_bos",
}


class Adapter(Protocol):
    """Compares everything that was recorded of one method."""

    method: str

    def rows(self, stage: Stage) -> list[Row]:
        """A row per comparison, and one for whatever cannot be compared."""


def adapter(method: str) -> Adapter | None:
    """The adapter of a recorded method, None where there is none yet."""
    if method not in MODULES:
        return None
    found: Adapter = import_module(MODULES[method]).ADAPTER
    return found
