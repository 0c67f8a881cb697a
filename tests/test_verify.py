"""Whatever is altered in a finished run is found, wherever in a file it is; what a stopped run leaves is not a fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import experiments
from manyedits import rundir, runner
from manyedits.config import Options, Study
from manyedits.progress import Silent
from manyedits.rundir import RunDir
from manyedits.verify import verify


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return experiments.study(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A good run, with its cache beside it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MANYEDITS_CACHE", str(folder / "cache"))
        runner.run(study, Options(out=folder / "run"), Silent())
        yield folder / "run"


@contextmanager
def altered(path: Path, change: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """A file with other content, or without it, while inside."""
    content = path.read_bytes()
    new = change(content)
    path.unlink() if new is None else path.write_bytes(new)
    try:
        yield
    finally:
        path.write_bytes(content)


def flipped(position: int, mask: int = 1) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


@pytest.mark.parametrize("mask", [1, 0x80])
def test_no_byte_of_the_journal_can_be_altered(finished: Path, mask: int) -> None:
    journal = finished / "journal.jsonl"
    size = len(journal.read_bytes())
    for position in [*range(0, size, size // 25), size - 2, size - 1]:
        with altered(journal, flipped(position, mask)):
            problems = verify(finished, Options())
        assert problems and "journal.jsonl" in problems[0], position
        assert "step" in problems[0] or "line" in problems[0], position


@pytest.mark.parametrize("name", ["changes/000001", "changes/000006", "snapshots/000003", "snapshots/000006"])
def test_no_byte_of_a_tensor_file_can_be_altered(finished: Path, name: str) -> None:
    path = finished / f"{name}.safetensors"
    size = len(path.read_bytes())
    for position in [0, 9, size // 3, size // 2, size - 1]:
        with altered(path, flipped(position)):
            problems = verify(finished, Options())
        assert len(problems) == 1 and path.name in problems[0] and f"step {int(path.stem)} " in problems[0]
    with altered(path, lambda content: None):
        assert "is missing" in verify(finished, Options())[0]


def test_a_line_that_was_taken_away_is_missed(finished: Path) -> None:
    journal = finished / "journal.jsonl"
    for gone in (0, 2, 5):
        lines = journal.read_bytes().splitlines(keepends=True)
        with altered(journal, lambda content, gone=gone, lines=lines: b"".join(lines[:gone] + lines[gone + 1 :])):
            assert "journal.jsonl" in verify(finished, Options())[0]


def test_a_line_of_another_run_is_refused(finished: Path) -> None:
    lines = (finished / "journal.jsonl").read_bytes().splitlines(keepends=True)
    with altered(finished / "journal.jsonl", lambda content: b"".join([lines[1], lines[0], *lines[2:]])):
        assert "belongs to another experiment" in verify(finished, Options())[0]


def test_a_score_of_another_state_is_named(finished: Path) -> None:
    path = RunDir(finished).score(3, "edits")
    with altered(path, lambda content: json.dumps({**json.loads(content), "state": "0" * 64}).encode()):
        problems = verify(finished, Options())
    assert len(problems) == 1 and "000003" in problems[0] and "another state" in problems[0]


def test_facts_that_changed_since_are_noticed(finished: Path, study: Study) -> None:
    path = Path(str(study.cells[0].data.path))
    with altered(path, lambda content: content.replace(b"French", b"Danish")):
        assert "belongs to another experiment" in verify(finished, Options())[0]


def test_what_a_stopped_run_leaves_is_no_fault(
    study: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = rundir.append_line

    class Stopped(BaseException):
        pass

    def torn(path: Path, row: dict[str, object]) -> None:
        if row.get("step") == 5:
            path.write_bytes(path.read_bytes() + b'{"change": "0000')
            raise Stopped
        append(path, row)

    monkeypatch.setattr(rundir, "append_line", torn)
    with pytest.raises(Stopped):
        runner.run(study, Options(out=tmp_path / "run"), Silent())
    assert verify(tmp_path / "run", Options()) == []


def test_a_run_on_a_random_model_holds_too(study: Study, finished: Path, tmp_path: Path) -> None:
    home = study.home
    model = {"random": "gpt2", "tokenizer": str(home / "model-gpt2"), "n_embd": 32, "n_layer": 3, "n_head": 4}
    runner.run(experiments.study(home, model=model), Options(out=tmp_path / "run"), Silent())
    assert verify(tmp_path / "run", Options()) == []
