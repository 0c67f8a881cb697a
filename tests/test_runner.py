"""A whole run: resumed after a fault at every single write, after a kill, after a full disk; verified; never redone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import experiments
from manyedits import rundir, runner
from manyedits.config import Options, Study
from manyedits.errors import UserError
from manyedits.methods.rome import Rome
from manyedits.progress import Silent
from manyedits.results import rows
from manyedits.rundir import RunDir
from manyedits.scores import read_samples
from manyedits.trajectory import Trajectory
from manyedits.verify import verify


class PowerCut(BaseException):
    """Stands for anything that ends a process between two instructions."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYEDITS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(study: Study, out: Path) -> Path:
    runner.run(study, Options(out=out), Silent())
    return out


def outcome(folder: Path) -> dict[str, Any]:
    """All of a run that must not depend on how often it was stopped."""
    lines = rundir.read_lines(RunDir(folder).journal)
    return {
        "journal": [(line["step"], line["id"], line["digest"], line["change_digest"]) for line in lines],
        "scores": [(r.step, r.benchmark, r.metric, r.value, r.error, r.n) for r in rows(folder)],
        "snapshots": {p.name: p.read_bytes() for p in sorted((folder / "snapshots").glob("*.safetensors"))},
        "changes": {p.name: p.read_bytes() for p in sorted((folder / "changes").glob("*.safetensors"))},
        "samples": {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("samples/*/*"))},
    }


class Counter:
    """Counts the writes of a run and cuts the power at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut_at: int | None, fault: Callable[[Path], BaseException]):
        self.count, self.cut_at, self.fault = 0, cut_at, fault
        self.atomic, self.append = rundir.write_atomic, rundir.append_line
        monkeypatch.setattr(rundir, "write_atomic", self._write)
        monkeypatch.setattr(rundir, "append_line", self._append)

    def _due(self) -> bool:
        self.count += 1
        return self.count == self.cut_at

    def _write(self, path: Path, content: bytes) -> None:
        if self._due():
            raise self.fault(path)
        self.atomic(path, content)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self._due():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(json.dumps(row).encode()[:25])  # a torn line
            raise self.fault(path)
        self.append(path, row)


def test_a_fault_at_any_write_costs_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = experiments.study(home)
    monkeypatch.setenv("MANYEDITS_CACHE", str(tmp_path / "cache0"))
    with monkeypatch.context() as patched:
        counter = Counter(patched, None, lambda path: PowerCut())
        whole = outcome(run(study, tmp_path / "whole"))
    assert counter.count > 30
    for cut in range(1, counter.count + 1):
        monkeypatch.setenv("MANYEDITS_CACHE", str(tmp_path / f"cache{cut}"))
        out = tmp_path / f"cut{cut}"
        with monkeypatch.context() as patched:
            Counter(patched, cut, lambda path: PowerCut())
            with pytest.raises(PowerCut):
                run(study, out)
        kept = {p: p.read_bytes() for p in out.glob("changes/*.safetensors")} if out.exists() else {}
        lines = len(rundir.read_lines(RunDir(out).journal))
        assert outcome(run(study, out)) == whole, f"cut at write {cut}"
        assert lines <= len(whole["journal"])
        assert all(path.read_bytes() == content for path, content in kept.items()), "what was written is still there"


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    home: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = experiments.study(home)
    whole = outcome(run(study, tmp_path / "whole"))
    real = os.fsync
    calls = {"n": 0}

    def full(descriptor: int) -> None:
        calls["n"] += 1
        if calls["n"] == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="The disk is full"):
            run(study, tmp_path / "full")
    assert outcome(run(study, tmp_path / "full")) == whole
    assert not list((tmp_path / "full").rglob("*.tmp")), "no half-written files are left"


def test_a_killed_process_is_taken_up_again(home: Path, tmp_path: Path, cache: Path) -> None:
    experiment = experiments.write(home, "long.yaml", count=40, checkpoints=[0, 20, 40])
    from manyedits.config import load_study

    whole = outcome(run(load_study(experiment), tmp_path / "whole"))
    command = [sys.executable, "-m", "manyedits", "run", str(experiment), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "killed" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes().count(b"\n")
    assert before >= 5, "the process was killed while it was editing"
    assert outcome(run(load_study(experiment), tmp_path / "killed")) == whole


def test_editing_costs_the_largest_count_and_a_second_run_nothing(
    home: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = experiments.study(home, count=20, checkpoints=[0, 5, 10, 20])
    made: list[str] = []
    edit = Rome.edit
    monkeypatch.setattr(Rome, "edit", lambda self, model, requests: made.append("x") or edit(self, model, requests))
    out = run(study, tmp_path / "run")
    assert len(made) == 20
    scores = {p: p.stat().st_mtime_ns for p in out.glob("scores/*/*.json")}
    run(study, out)
    assert len(made) == 20
    assert {p: p.stat().st_mtime_ns for p in out.glob("scores/*/*.json")} == scores


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good run, with its cache beside it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MANYEDITS_CACHE", str(folder / "cache"))
        return run(experiments.study(home), folder / "run")


def test_a_good_run_verifies(finished: Path) -> None:
    assert verify(finished, Options()) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", ["changes/000002.safetensors", "snapshots/000003.safetensors", "journal.jsonl"])
def test_one_altered_byte_is_named_with_its_step(finished: Path, name: str, share: float) -> None:
    path = finished / name
    content = path.read_bytes()
    at = int(share * (len(content) - 2))
    altered = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    path.write_bytes(altered)
    try:
        problems = verify(finished, Options())
    finally:
        path.write_bytes(content)
    assert problems and name.split("/")[-1] in problems[0]
    assert "step" in problems[0] or "line" in problems[0]
    assert verify(finished, Options()) == []


def test_any_step_can_be_stood_at(finished: Path, home: Path) -> None:
    from manyedits.assembly import cell_of, method_of, model_of, requests_of, trajectory_of

    run_dir = RunDir(finished)
    cell = cell_of(run_dir)
    model = model_of(cell, Options())
    trajectory = trajectory_of(run_dir, cell, model, method_of(cell), requests_of(cell))
    for step in (6, 2, 5, 0, 3, 1, 4):
        digest = trajectory.at(step).digest()
        assert step == 0 or digest == trajectory.lines[step].digest
    with pytest.raises(UserError, match="Step 9 cannot be stood at"):
        trajectory.at(9)


def test_changes_that_are_too_large_to_keep_are_made_again(home: Path, tmp_path: Path, cache: Path) -> None:
    from manyedits.assembly import method_of, model_of, requests_of, supplies_of, trajectory_of

    cell = experiments.study(home).cells[0]
    digests = []
    for name, budget in (("kept", 2**30), ("remade", 0)):
        model, method = model_of(cell, Options()), method_of(cell)
        method.prepare(model, supplies_of(cell, Silent()))
        run_dir = RunDir(tmp_path / name)
        first = trajectory_of(run_dir, cell, model, method, requests_of(cell), budget=budget)
        first.at(3)
        first.snapshot()
        first.at(6)
        again = trajectory_of(run_dir, cell, model, method, requests_of(cell), budget=budget)
        digests.append((again.at(2).digest(), again.at(5).digest(), again.at(6).digest()))
        assert bool(list(run_dir.root.glob("changes/*"))) is (name == "kept")
    assert digests[0] == digests[1]


def test_another_experiment_is_refused(home: Path, finished: Path) -> None:
    other = experiments.study(home, checkpoints=[0, 2, 6])
    with pytest.raises(UserError, match="differs in checkpoints"):
        run(other, finished)


def test_a_second_editor_is_refused_and_readers_are_not(finished: Path, home: Path) -> None:
    with RunDir(finished).editing():
        with pytest.raises(UserError, match="edited by another process"):
            run(experiments.study(home), finished)
        assert rows(finished)
        assert verify(finished, Options()) == []


def test_scores_of_step_zero_are_shared_between_methods(home: Path, tmp_path: Path, cache: Path) -> None:
    methods = [
        {"name": "rome", "preset": "tiny", "value": {"steps": 2}},
        {"name": "ft-l", "preset": "tiny", "steps": 2},
    ]
    out = run(experiments.study(home, method=methods), tmp_path / "study")
    folders = sorted(p for p in out.iterdir() if p.is_dir())
    assert [p.name for p in folders] == ["ft-l", "rome"]
    keys = {json.loads((p / "scores/000000/edits.json").read_text())["key"] for p in folders}
    assert len(keys) == 1
    later = {json.loads((p / "scores/000006/edits.json").read_text())["key"] for p in folders}
    assert len(later) == 2
    assert read_samples(folders[0] / "samples/000006/edits.jsonl.gz")


def test_memory_does_not_grow_over_500_edits(home: Path, tmp_path: Path, cache: Path) -> None:
    import psutil

    from manyedits.assembly import method_of, model_of, requests_of, supplies_of, trajectory_of

    cell = experiments.study(home, count=500, conflicts="keep", checkpoints=[0, 500]).cells[0]
    model, method = model_of(cell, Options()), method_of(cell)
    method.prepare(model, supplies_of(cell, Silent()))
    trajectory: Trajectory = trajectory_of(RunDir(tmp_path / "run"), cell, model, method, requests_of(cell))
    steps = trajectory.steps()
    process = psutil.Process()
    trajectory.at(steps[len(steps) // 10])
    early = process.memory_info().rss
    trajectory.at(steps[-1])
    assert process.memory_info().rss < 1.05 * early
