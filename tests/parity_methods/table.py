"""Rows of the comparison, the tolerances, and the account: nothing that was recorded may be silently missing.

The tolerances are those that the recordings ask for, relative to the tensor's largest entry. The checks are numbered as
there, each isolating one thing: 1 lookup index, 2 covariance, 3 what is read from the unedited model, 4 the objective
before any optimiser step, 5 the optimiser, 6 the closed form fed with recorded inputs, 7 end to end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from golden import relative_error

FORWARD = 1e-5
GRADIENT = 1e-4
CLOSED = 1e-6
CLOSED_FLOAT32 = 2e-4
LOOP = 1e-3
EQUAL = 0.0

OK, OVER, MISSING, FAILED = "ok", "OVER", "MISSING IN OURS", "COMPARISON FAILED"
BROKEN, SKIPPED = "reference broken: ", "not compared: "


@dataclass(frozen=True)
class Case:
    """A recorded run. `requests` are those it edits; `earlier` those that the model carried already."""

    method: str
    variant: str
    name: str
    prefix: str
    requests: tuple[int, ...]
    earlier: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    check: int
    method: str
    variant: str
    case: str
    tensor: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None

    @property
    def failed(self) -> bool:
        return self.kind in (OVER, MISSING, FAILED)

    @property
    def kind(self) -> str:
        """The verdict without its reason."""
        return self.verdict.split(":")[0]


@dataclass(frozen=True)
class Rule:
    """How a tensor is compared: `tensor` is a pattern for its whole name inside its case.

    `edited` is the tolerance where the model carries earlier edits: those went through an optimiser loop each.
    `part` cuts the same piece out of both sides, `label` names it.
    """

    tensor: str
    check: int
    tolerance: float
    edited: float | None = None
    part: Callable[[Tensor], Tensor] | None = None
    label: str = ""

    def matches(self, tensor: str) -> bool:
        return re.fullmatch(self.tensor, tensor) is not None

    def allowed(self, case: Case) -> float:
        return self.edited if self.edited is not None and case.earlier else self.tolerance

    def cut(self, tensor: Tensor) -> Tensor:
        return self.part(tensor) if self.part else tensor


@dataclass(frozen=True)
class Broken:
    """What the reference itself broke, in which checks, and why."""

    variant: str
    tensor: str
    checks: frozenset[int]
    reason: str

    def covers(self, variant: str, tensor: str, check: int) -> bool:
        pattern = re.fullmatch(self.variant, variant) and re.fullmatch(self.tensor, tensor)
        return pattern is not None and check in self.checks


class Table:
    """Collects the rows of one recorded method and knows which of its tensors have none yet."""

    def __init__(self, method: str, recorded: Mapping[str, Tensor], broken: Iterable[Broken] = ()) -> None:
        self.method, self.recorded, self.broken = method, recorded, tuple(broken)
        self.rows: list[Row] = []
        self._seen: set[str] = set()

    def compare(self, case: Case, tensor: str, rule: Rule, ours: Tensor | None) -> None:
        """One comparison of a recorded tensor with ours, under a rule."""
        key = case.prefix + tensor
        self._seen.add(key)
        label = tensor + rule.label
        reason = self.reason(case, tensor, rule.check)
        if reason is not None:
            self.tell(case, rule.check, label, BROKEN + reason)
        elif ours is None:
            self.tell(case, rule.check, label, MISSING)
        else:
            error = relative_error(rule.cut(ours), rule.cut(self.recorded[key]))
            self.judge(case, rule.check, label, error, rule.allowed(case))

    def judge(self, case: Case, check: int, label: str, error: float, tolerance: float) -> None:
        """A comparison whose error is known already. NaN is over every tolerance."""
        self.tell(case, check, label, OK if error <= tolerance else OVER, error, tolerance)

    def skip(self, case: Case, check: int, tensor: str, reason: str) -> None:
        """A recorded tensor that is not compared, with the reason."""
        self._seen.add(case.prefix + tensor)
        self.tell(case, check, tensor, SKIPPED + reason)

    def excuse(self, case: Case, check: int, tensor: str, reason: str) -> None:
        """A recorded tensor that the reference broke in this case, with the reason."""
        self._seen.add(case.prefix + tensor)
        self.tell(case, check, tensor, BROKEN + reason)

    def close(self) -> list[Row]:
        """All rows, after naming every recorded tensor that no rule spoke of."""
        for key in self.recorded:
            if key not in self._seen:
                self.tell(Case(self.method, "-", "-", "", ()), 7, key, SKIPPED + "no rule for this tensor")
        return self.rows

    def reason(self, case: Case, tensor: str, check: int) -> str | None:
        """Why the reference's tensor cannot be compared in a check, None where it can."""
        return next((b.reason for b in self.broken if b.covers(case.variant, tensor, check)), None)

    def tell(
        self,
        case: Case,
        check: int,
        tensor: str,
        verdict: str,
        error: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Write one row down."""
        self.rows.append(Row(check, case.method, case.variant, case.name, tensor, verdict, error, tolerance))


def summary(rows: Iterable[Row]) -> Counter[str]:
    """How many rows there are of each kind of verdict."""
    return Counter(row.kind for row in rows)
