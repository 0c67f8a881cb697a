"""One sequence of edits to one model; any point of it can be stood at again.

The journal has a line per batch of requests, written after the batch's change file, so a line means "complete". A line
names its parent by hash: the chain covers the requests' contents, the method's parameters, the model and the seed, and a
line that does not belong is refused rather than mixed in. It also carries the digest of the edited state, which every
replay is compared with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyedits import rundir
from manyedits.changes import AnyChange, from_tensors, size, to_tensors
from manyedits.data import Request, request_from_dict
from manyedits.errors import UserError
from manyedits.methods.base import Edit, EditMethod
from manyedits.model import EditableModel
from manyedits.rundir import RunDir

logger = logging.getLogger(__name__)

#: Version of the journal and of the change files; part of every chain id.
FORMAT = 1

#: A batch whose changes take more bytes than this is not stored; it is made again from the last snapshot.
CHANGE_BUDGET = 64 * 2**20


class ReplayError(UserError):
    """A replayed state is not the one that was journaled."""


@dataclass(frozen=True)
class Line:
    """One line of the journal: a batch of requests that was applied."""

    step: int  # requests applied once this batch is in
    id: str
    parent: str
    requests: tuple[str, ...]
    digest: str  # of the edited state after the batch
    change: str | None  # the change file's name; None when the change was too large to keep
    change_digest: str | None  # sha256 of the change file's bytes
    seconds: float
    info: Mapping[str, float]

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str) -> Line:
        """A line as it was read; refused when its own sum does not hold."""
        facts = {name: value for name, value in row.items() if name != "sum"}
        if row.get("sum") != _sum(facts):
            raise ReplayError(f"{where}: the line of step {row.get('step')} was altered.", "Restore it from a copy.")
        return cls(**{**facts, "requests": tuple(facts["requests"])})

    def as_json(self) -> dict[str, Any]:
        """The line as it is written, with a sum over the rest of it."""
        facts = {**vars(self), "requests": list(self.requests), "info": dict(self.info)}
        return {**facts, "sum": _sum(facts)}


class Trajectory:
    """A model, a method and a sequence of requests, tied to a run directory."""

    def __init__(
        self,
        run: RunDir,
        model: EditableModel,
        method: EditMethod,
        requests: Sequence[Request],
        batch: int = 1,
        identity: Mapping[str, Any] | None = None,
        budget: int = CHANGE_BUDGET,
        told: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.run, self.model, self.method, self.requests, self.batch = run, model, method, requests, batch
        self.budget, self.told = budget, told
        self.root = _root_id(model, method, identity or {})
        self.position = 0
        self.snapshots = {row["step"]: row["digest"] for row in rundir.read_lines(run.snapshot_digests)}
        self.lines = {line.step: line for line in self._read()}
        model.reset()
        method.forget()

    # --- standing somewhere -----------------------------------------------------------------------------------------

    def at(self, step: int) -> EditableModel:
        """The model after ``step`` requests: replayed as far as the journal goes, edited from there."""
        self._check_step(step)
        self._go_near(step)
        while self.position < step:
            self._next()
        return self.model

    def steps(self) -> list[int]:
        """Every step that can be stood at: 0, each full batch, and the end."""
        whole = list(range(0, len(self.requests) + 1, self.batch))
        return whole if whole[-1] == len(self.requests) else [*whole, len(self.requests)]

    def _check_step(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            near = min(steps, key=lambda s: abs(s - step))
            raise UserError(
                f"Step {step} cannot be stood at: {len(self.requests)} requests go in {self.batch} at a time.",
                f"The nearest step is {near}.",
            )

    def _go_near(self, step: int) -> None:
        """Stay where the model stands if that is on the way; else start from the best snapshot, or from the base."""
        best = max((s for s in self.snapshots if s <= step and s in self.lines), default=0)
        if best <= self.position <= step:
            return
        self.model.reset()
        self.method.forget()
        self.position = 0
        if best:
            self._load_snapshot(best)

    def _next(self) -> None:
        chosen = self.requests[self.position : self.position + self.batch]
        step = self.position + len(chosen)
        line = self.lines.get(step)
        if line is None:
            self._edit(chosen, step)
        elif line.change is None:
            logger.info("step %d: the change was too large to keep, editing again", step)
            self._take(self.method.edit(self.model, chosen))
            self._compare(line)
        else:
            self._take(self._read_change(line))
            self._compare(line)
        self.position = step
        self.told(step)

    def _take(self, edit: Edit) -> None:
        for change in edit.changes:
            self.model.apply(change)
        self.method.recall(edit)

    def _compare(self, line: Line) -> None:
        digest = self.model.digest()
        if digest != line.digest:
            raise ReplayError(
                f"{self.run.root}: replaying step {line.step} gives the state {digest[:12]}, the journal says "
                f"{line.digest[:12]}.",
                "Was the run made on another kind of machine, with other library versions or another thread count? "
                "Its snapshots are exact; the steps between them are not reproduced here.",
            )

    # --- writing ----------------------------------------------------------------------------------------------------

    def _edit(self, chosen: Sequence[Request], step: int) -> None:
        started = time.perf_counter()
        edit = self.method.edit(self.model, chosen)
        self._take(edit)
        seconds = time.perf_counter() - started
        name, digest = self._write_change(edit, step)
        parent = self._parent(step - len(chosen))
        line = Line(
            step=step,
            id=self.chain_id(parent, chosen),
            parent=parent,
            requests=tuple(r.id for r in chosen),
            digest=self.model.digest(),
            change=name,
            change_digest=digest,
            seconds=seconds,
            info=dict(edit.info),
        )
        rundir.append_line(self.run.journal, line.as_json())
        self.lines[step] = line

    def _write_change(self, edit: Edit, step: int) -> tuple[str | None, str | None]:
        if size(edit.changes) > self.budget:
            return None, None
        tensors, described = to_tensors(edit.changes)
        tensors |= {f"state.{name}": tensor for name, tensor in edit.state.items()}
        path = self.run.change(step)
        rundir.save_tensors(path, tensors, {"changes": described})
        return path.name, file_digest(path.read_bytes())

    def snapshot(self) -> None:
        """Write the edited weights (32 bit), adapters, memory and the method's state at the present step."""
        if self.position == 0 or self.position in self.snapshots:
            return
        path = self.run.snapshot(self.position)
        line = self.lines[self.position]
        tensors = {f"master.{name}": t for name, t in self.model.masters().items()}
        tensors |= {f"state.{name}": t for name, t in self.method.state().items()}
        tensors |= {
            f"adapter.{site}.{name}": t for site, a in self.model.adapters.items() for name, t in a.tensors().items()
        }
        memory = [{"id": r.id, **r.content()} for r in self.model.memory]
        facts = {"id": line.id, "digest": line.digest, "memory": json.dumps(memory, sort_keys=True)}
        rundir.save_tensors(path, tensors, facts)
        self.snapshots[self.position] = file_digest(path.read_bytes())
        rundir.append_line(self.run.snapshot_digests, {"step": self.position, "digest": self.snapshots[self.position]})

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self) -> list[Line]:
        """The journal, every line checked against the chain."""
        lines = [Line.from_json(row, str(self.run.journal)) for row in rundir.read_lines(self.run.journal)]
        parent, step = self.root, 0
        for line in lines:
            chosen = self.requests[step : line.step]
            if line.parent != parent or line.id != self.chain_id(parent, chosen):
                raise UserError(
                    f"{self.run.journal}: step {line.step} belongs to another experiment, or its line was altered.",
                    "Run into another folder (`--out`), or restore the experiment file that made this one.",
                )
            parent, step = line.id, line.step
        return lines

    def _parent(self, step: int) -> str:
        return self.lines[step].id if step else self.root

    def chain_id(self, parent: str, requests: Sequence[Request]) -> str:
        """The id of the step that takes these requests in after ``parent``; contents count, the requests' ids do not."""
        contents = json.dumps([r.content() for r in requests], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(f"{parent}\n{contents}".encode()).hexdigest()

    def _read_change(self, line: Line) -> Edit:
        assert line.change is not None
        path = self.run.root / "changes" / line.change
        if not path.is_file():
            raise UserError(f"{path} is missing.", "Restore it, or delete the journal's lines from its step on.")
        if file_digest(path.read_bytes()) != line.change_digest:
            raise ReplayError(f"{path} (step {line.step}) is not the file that was written.", "Restore it from a copy.")
        tensors, facts = rundir.load_tensors(path)
        changes, state = _split(tensors, facts["changes"])
        return Edit(changes, state)

    def _load_snapshot(self, step: int) -> None:
        path, line = self.run.snapshot(step), self.lines[step]
        if not path.is_file() or file_digest(path.read_bytes()) != self.snapshots[step]:
            raise ReplayError(f"{path} (step {step}) is not the file that was written.", "Restore it from a copy.")
        tensors, facts = rundir.load_tensors(path)
        if facts["id"] != line.id:
            raise ReplayError(f"{path} is the snapshot of another experiment.", "Delete it; it is made again.")
        self.model.restore(_below("master.", tensors))
        for site, adapter in self.model.adapters.items():
            adapter.load(_below(f"adapter.{site}.", tensors))
        self.model.memory.extend(request_from_dict(row) for row in json.loads(facts["memory"]))
        self.method.recall(Edit((), _below("state.", tensors)))
        if self.model.digest() != line.digest:
            raise ReplayError(
                f"{path} (step {step}) is not the state that was journaled.", "Delete it; it is made again."
            )
        self.position = step


def _split(tensors: Mapping[str, Tensor], described: str) -> tuple[tuple[AnyChange, ...], dict[str, Tensor]]:
    own = {n: t for n, t in tensors.items() if not n.startswith("state.")}
    return from_tensors(own, described), _below("state.", tensors)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _root_id(model: EditableModel, method: EditMethod, identity: Mapping[str, Any]) -> str:
    facts = {
        "format": FORMAT,
        "model": model.fingerprint,
        "dtype": str(model.hf.dtype),
        "method": type(method).__name__,
        "params": method.params.model_dump(mode="json"),
        **identity,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(content: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()
