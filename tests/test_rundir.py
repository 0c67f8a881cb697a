"""Writes appear whole, lines are never half read, one edits at a time, and other experiments are kept out."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manyedits import rundir
from manyedits.errors import UserError
from manyedits.rundir import RunDir


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    rundir.write_atomic(path, b"old")

    def stop(*words: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(UserError, match=f"The disk is full: {path}"):
        rundir.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [rundir.write_atomic, rundir.append_line])
def test_a_file_in_the_way_is_one_sentence(tmp_path: Path, write: Any) -> None:
    (tmp_path / "file").write_text("x")
    content = {"a": 1} if write is rundir.append_line else b"x"
    with pytest.raises(UserError, match="cannot be written") as caught:
        write(tmp_path / "file" / "below", content)
    assert "--out" in caught.value.hint


def test_a_torn_line_is_dropped_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert rundir.read_lines(path) == []
    for i in range(2):
        rundir.append_line(path, {"i": i})
    with open(path, "ab") as file:
        file.write(b'{"i": 2, "text": "half')
    assert [row["i"] for row in rundir.read_lines(path)] == [0, 1]
    rundir.append_line(path, {"i": 3})
    assert [row["i"] for row in rundir.read_lines(path)] == [0, 1, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_a_file_that_is_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"i"')
    assert rundir.read_lines(path) == []
    rundir.append_line(path, {"i": 0})
    assert rundir.read_lines(path) == [{"i": 0}]


@pytest.mark.parametrize("broken", [b"{]", b"12", b"[1]", b"\xff", b"", b"[" * 100_000])
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"i": 0}\n' + broken + b'\n{"i": 2}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl, line 2: not JSON"):
        rundir.read_lines(path)


def test_text_of_any_kind_survives_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    row = {"text": "a\u2028b\x85c\nd\re\U0001f600"}
    rundir.append_line(path, row)
    rundir.append_line(path, row)
    assert rundir.read_lines(path) == [row, row]


def test_tensors_give_the_same_bytes_however_they_are_handed_over(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    rundir.save_tensors(tmp_path / "one", tensors, {"x": "1", "y": "2"})
    turned = {name: tensors[name].contiguous() for name in ("a", "b")}
    rundir.save_tensors(tmp_path / "two", turned, {"y": "2", "x": "1"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read, facts = rundir.load_tensors(tmp_path / "one")
    assert facts == {"x": "1", "y": "2"}
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x02}q\x00."])
def test_a_file_without_tensors_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.safetensors cannot be read"):
        rundir.load_tensors(path)
    with pytest.raises(UserError, match=r"gone cannot be read"):
        rundir.load_tensors(tmp_path / "gone")


def test_names_inside_a_run_directory() -> None:
    run = RunDir(Path("run"))
    assert run.change(7) == Path("run/changes/000007.safetensors")
    assert run.snapshot(500) == Path("run/snapshots/000500.safetensors")
    assert run.score(0, "suite:a/b") == Path("run/scores/000000/suite_a_b.json")
    assert run.samples(0, "edits") == Path("run/samples/000000/edits.jsonl.gz")


def test_a_second_process_may_not_edit_but_the_next_one_may(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from manyedits.errors import UserError\n"
        "from manyedits.rundir import RunDir\n"
        "try:\n"
        "    with RunDir(Path(sys.argv[1])).editing(): print('in')\n"
        "except UserError as error: print(error)"
    )

    def attempt() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True
        ).stdout

    with RunDir(tmp_path / "run").editing():
        assert "is being edited by another process now" in attempt()
    assert attempt() == "in\n"


def test_the_lock_is_let_go_when_editing_fails(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.editing():
        raise ZeroDivisionError
    with run.editing():
        pass


def test_a_run_directory_belongs_to_one_experiment(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.begin("# mine\n", {"digest": "a", "experiment": {"seed": 0, "batch": 1}}, {})
    before = {p: p.read_bytes() for p in run.root.iterdir()}
    run.begin("# mine, with another comment\n", {"digest": "a", "experiment": {"seed": 0, "batch": 1}}, {"x": 1})
    with pytest.raises(UserError, match=r"another experiment \(it differs in seed"):
        run.begin("", {"digest": "b", "experiment": {"seed": 1, "batch": 1}}, {})
    assert {p: p.read_bytes() for p in run.root.iterdir()} == before
    assert run.experiment.read_text() == "# mine\n"
    run.resolved.write_text("[]")
    with pytest.raises(UserError, match=r"resolved\.json"):
        run.begin("", {"digest": "a", "experiment": {}}, {})


def test_provenance_names_versions_and_the_state_of_the_code(tmp_path: Path) -> None:
    facts = rundir.provenance("cpu", 3, 2)
    assert facts["versions"]["torch"] and facts["seed"] == 3 and facts["threads"] == 2
    assert rundir.code_state(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", "-C", str(tmp_path)]
    (tmp_path / "__init__.py").write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    state = rundir.code_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "__init__.py").write_text("changed = 1\n")
    state = rundir.code_state(tmp_path)
    assert state is not None and state["dirty"] is True
