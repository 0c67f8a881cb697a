"""What the locate-then-edit methods have in common: run every recorded case with ours, then go through the rules."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyedits.methods.base import EditMethod, Recorder
from parity_methods.stage import Stage
from parity_methods.table import BROKEN, EQUAL, SKIPPED, Broken, Case, Row, Rule, Table

NAME = re.compile(
    r"(?:(?P<variant>[^.]+)\.)?(?P<case>(?P<kind>single|batch|second_batch|seq)(?P<number>\d*))\.(?P<tensor>.+)"
)

#: Requests of a first batch, where a second one was recorded.
FIRST = 8

Hparams = Mapping[str, Any]
Tensors = dict[str, Tensor]


def first_evaluation(losses: Tensor) -> Tensor:
    """The losses before any optimiser step, out of (steps, 4) or (requests, steps, 4)."""
    return losses[..., 0, :]


def case_of(method: str, key: str, default: str) -> tuple[Case, str] | None:
    """The case that a recorded tensor belongs to, and its name inside it. Without a variant it is the default one's.

    A sequence without a number is its end: it edits nothing more, and its model is edited. A second batch follows the
    first, of FIRST requests.
    """
    found = NAME.fullmatch(key)
    if found is None:
        return None
    prefix = key[: len(key) - len(found["tensor"])]
    number = int(found["number"]) if found["number"] else 0
    spans = {
        "single": ((number,), ()),
        "batch": (tuple(range(number)), ()),
        "second_batch": (tuple(range(FIRST, FIRST + number)), tuple(range(FIRST))),
        "seq": ((number,), tuple(range(number))) if found["number"] else ((), (0,)),
    }
    case = Case(method, found["variant"] or default, found["case"], prefix, *spans[found["kind"]])
    return case, found["tensor"]


class EditAdapter(ABC):
    """A method that records tensors per case. Subclasses say what is specific to it."""

    method: ClassVar[str]
    default: ClassVar[str]  # the variant of cases that name none
    broken: ClassVar[tuple[Broken, ...]] = ()
    counted: ClassVar[tuple[str, ...]] = (".steps",)  # scalars that are compared

    @abstractmethod
    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        """Ours, with a variant's parameters; not yet prepared."""

    @abstractmethod
    def rules(self, hparams: Hparams) -> Sequence[Rule]:
        """What is compared, and how closely."""

    @abstractmethod
    def named(self, recorded: Tensors) -> Tensors:
        """Our recorder's tensors under the recordings' names and shapes."""

    def closed_forms(self, stage: Stage, hparams: Hparams, theirs: Tensors) -> Iterator[tuple[str, Tensor, float]]:
        """Check 6: (tensor, ours, tolerance) of the closed form alone, from the case's own recorded tensors."""
        return iter(())

    def lookups(self, stage: Stage, hparams: Hparams, case: Case, theirs: Tensors) -> Iterator[tuple[str, int]]:
        """Check 1: (label, tokens by which our lookup position is off the one that the recorded tensors show)."""
        return iter(())

    def remembered(self, stage: Stage, method: EditMethod, case: Case) -> Tensors:
        """What was recorded of the state of the method or model that a case leaves behind."""
        return {}

    # --- what is the same for all -----------------------------------------------------------------------------------

    def rows(self, stage: Stage) -> list[Row]:
        golden = stage.golden
        recorded, hparams = golden.tensors(self.method), golden.hparams(self.method)
        table = Table(self.method, recorded, self.broken)
        for variant in self.variants(recorded):
            if variant in hparams:
                self.variant(stage, table, variant, hparams[variant])
        return [*table.close(), *self._other_scalars(golden.notes(self.method).get("scalars", {}))]

    def _other_scalars(self, scalars: Mapping[str, Any]) -> list[Row]:
        """What was recorded beside the tensors and is not compared: timings in one row, anything else by name."""
        timings = [key for key in scalars if key.endswith("time_s")]
        others = [key for key in scalars if key not in timings and not key.endswith(self.counted)]
        rows = [Row(7, self.method, "-", "-", key, SKIPPED + "no rule for this scalar") for key in others]
        if timings:
            rows.append(Row(7, self.method, "-", "-", f"(time_s of {len(timings)} cases)", SKIPPED + "a timing"))
        return rows

    def variants(self, recorded: Mapping[str, Tensor]) -> list[str]:
        """The variants that were recorded, in their order."""
        found = (case_of(self.method, key, self.default) for key in recorded)
        return list(dict.fromkeys(each[0].variant for each in found if each))

    def _cases(self, recorded: Mapping[str, Tensor], variant: str) -> dict[Case, list[str]]:
        """The cases of a variant with their tensors' names, a sequence in its order, its totals last."""
        cases: dict[Case, list[str]] = {}
        for key in recorded:
            found = case_of(self.method, key, self.default)
            if found and found[0].variant == variant:
                cases.setdefault(found[0], []).append(found[1])
        order = {"single": 0, "batch": 1, "second_batch": 2, "seq": 3}
        return dict(sorted(cases.items(), key=lambda item: self._rank(item[0], order)))

    @staticmethod
    def _rank(case: Case, order: Mapping[str, int]) -> tuple[int, float]:
        kind = case.name.rstrip("0123456789")
        number = case.name[len(kind) :]
        return order[kind], float(number) if number else float("inf")

    def variant(self, stage: Stage, table: Table, variant: str, hparams: Hparams) -> None:
        """Run and compare every case of one variant; the model is as it was afterwards."""
        method = self.make(stage, hparams)
        stage.model.reset()
        method.prepare(stage.model, stage.supplies)
        for case, names in self._cases(table.recorded, variant).items():
            if not case.earlier:
                stage.model.reset()
                method.forget()
            theirs = {name: table.recorded[case.prefix + name] for name in names}
            ours = self._run(stage, method, case) if case.requests else self._totals(stage, theirs)
            self._judge(stage, table, case, theirs, ours, hparams)
        stage.model.reset()

    def _run(self, stage: Stage, method: EditMethod, case: Case) -> Tensors:
        """Ours on one case. The edit stays in the model, for the next case of a sequence."""
        method.recorder = Recorder()
        before = stage.log_probabilities(case.requests)
        edit = method.edit(stage.model, stage.chosen(case.requests))
        for change in edit.changes:
            stage.model.apply(change)
        method.recall(edit)
        after = stage.log_probabilities(case.requests)
        ours = {**self._deltas(stage, edit.changes), **self.named(dict(method.recorder.tensors))}
        return {"logprob_before": before, "logprob_after": after, **ours, **self.remembered(stage, method, case)}

    def _deltas(self, stage: Stage, changes: Sequence[Any]) -> Tensors:
        """Changes of weights under both names in use: `delta_W` of one layer, `layer<i>.delta_W` of several."""
        named = {}
        for change in changes:
            layer = change.weight.removeprefix(stage.model.arch.blocks + ".").split(".")[0]
            named["delta_W"] = named[f"layer{layer}.delta_W"] = stage.stored(change.weight, change.delta())
        return named

    def _totals(self, stage: Stage, theirs: Tensors) -> Tensors:
        """What was recorded of the model at the end of a sequence; probabilities of the first so many requests."""
        model, ours = stage.model, {}
        if "logprob_final" in theirs:
            ours["logprob_final"] = stage.log_probabilities(range(len(theirs["logprob_final"])))
        for weight, master in model.masters().items():
            ours["W_final"] = stage.stored(weight, master)
            ours[f"delta_total.{weight}"] = stage.stored(weight, master - model.base_weight(weight))
        return ours

    def _judge(self, stage: Stage, table: Table, case: Case, theirs: Tensors, ours: Tensors, hparams: Hparams) -> None:
        for label, off in self.lookups(stage, hparams, case, theirs):
            table.judge(case, 1, label, float(off), EQUAL)
        for name in theirs:
            for rule in self.rules(hparams):
                if rule.matches(name):
                    table.compare(case, name, rule, fitted(name, ours.get(name), theirs[name]))
        for name, value, tolerance in self.closed_forms(stage, hparams, theirs):
            table.compare(case, name, Rule(name, 6, tolerance, label=" (closed form)"), value)
        self._steps(stage, table, case, ours)

    def _steps(self, stage: Stage, table: Table, case: Case, ours: Tensors) -> None:
        """The numbers of evaluations of the loss, which must be equal."""
        recorded = stage.golden.notes(self.method).get("scalars", {}).get(case.prefix + "steps")
        if recorded is None or "losses" not in ours:
            return
        rule = Rule("losses", 5, EQUAL)
        reason = table.reason(case, "losses", rule.check)
        if reason is not None:
            table.tell(case, rule.check, "steps", BROKEN + reason)
            return
        counted = (~ours["losses"][..., 0].isnan()).sum(-1).reshape(-1)
        expected = torch.tensor(recorded["value"]).reshape(-1)
        off = float((counted - expected).abs().max()) if counted.shape == expected.shape else float("inf")
        table.judge(case, rule.check, "steps", off, EQUAL)


def fitted(name: str, ours: Tensor | None, theirs: Tensor) -> Tensor | None:
    """Ours in the recording's shape: one request's row alone where only one was recorded, and without the rows that a
    search leaves empty after it stopped, where the recording has no such rows."""
    if ours is None:
        return None
    if ours.dim() == theirs.dim() + 1 and len(ours) == 1:
        ours = ours[0]
    if not name.startswith(("losses", "delta_steps")):
        return ours
    axis = theirs.dim() - 2
    if ours.dim() != theirs.dim() or ours.shape[axis] <= theirs.shape[axis]:
        return ours
    rest = ours.narrow(axis, theirs.shape[axis], ours.shape[axis] - theirs.shape[axis])
    return ours.narrow(axis, 0, theirs.shape[axis]) if bool(rest.isnan().all()) else ours


def without_padding(steps: Tensor, losses: Tensor) -> Tensor:
    """The steps that one request made, (steps, hidden): one fewer than its evaluations, (evaluations, 4)."""
    made = int((~losses[:, 0].isnan()).sum()) - 1
    return steps[:made]
