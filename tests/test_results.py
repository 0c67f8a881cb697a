"""Figures out of run directories: from files alone, of unfinished runs too, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyedits import rundir
from manyedits.config import Experiment
from manyedits.errors import UserError
from manyedits.report.markdown import markdown, write_markdown
from manyedits.results import find_runs, is_complete, missing, rows, run_info
from manyedits.rundir import RunDir

STEPS = [0, 3, 6]


def written(folder: Path, edited: int = 6, scored: int = 3, **changes: Any) -> Path:
    """A run directory as a run would leave it, with invented figures."""
    run = RunDir(folder)
    cell = Experiment(
        **{
            "model": "/models/tiny",
            "method": "rome",
            "data": {"name": "own", "path": "facts.jsonl"},
            "checkpoints": STEPS,
            **changes,
        }
    )
    facts = {"digest": cell.digest(), "experiment": cell.facts(), "steps": STEPS, "benchmarks": ["edits"]}
    run.begin("model: /models/tiny\n", facts, {"device": "cpu"})
    for step in range(1, edited + 1):
        rundir.append_line(run.journal, {"step": step, "seconds": 0.5})
    for step in STEPS[:scored]:
        scores = [
            {"metric": "efficacy", "value": step / 6, "error": 0.1, "n": 6, "unscored": 0, "extra": {}},
            {"metric": "fluency", "value": None, "error": None, "n": 0, "unscored": 6, "extra": {}},
        ]
        content = {"benchmark": "edits", "version": 1, "key": "k", "state": "s", "scores": scores, "step": step}
        rundir.write_json(run.score(step, "edits"), content)
    return folder


def test_a_run_says_what_it_is(tmp_path: Path) -> None:
    info = run_info(written(tmp_path / "run", batch=2, data={"name": "own", "path": "f", "seed": 4}))
    assert (info.edited, info.seconds, info.steps, info.benchmarks) == (6, 3.0, STEPS, ["edits"])
    assert (info.label, info.model) == ("rome, batch 2, seed 4", "tiny")


def test_rows_hold_every_figure(tmp_path: Path) -> None:
    found = rows(written(tmp_path / "run"))
    assert [(row.step, row.metric) for row in found] == [(s, m) for s in STEPS for m in ("efficacy", "fluency")]
    assert [row.value for row in found if row.metric == "efficacy"] == [0.0, 0.5, 1.0]
    assert {row.unscored for row in found if row.metric == "fluency"} == {6}


def test_what_is_missing_is_known_and_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", edited=4, scored=2)
    info = run_info(folder)
    assert missing(info) == [(6, "edits")] and not is_complete(info)
    assert "not measured yet: edits at 6" in markdown([folder])
    other = written(tmp_path / "other")
    assert not is_complete(run_info(other)), "the report is still to be written"
    write_markdown(other / "report.md", [other])
    assert is_complete(run_info(other))


def test_a_report_has_a_table_per_figure(tmp_path: Path) -> None:
    text = markdown([written(tmp_path / "a"), written(tmp_path / "b", scored=2, method="memit")])
    assert "| rome (tiny) | 0.000 ± 0.100 (6) | 0.500 ± 0.100 (6) | 1.000 ± 0.100 (6) |" in text
    assert "| memit (tiny) | 0.000 ± 0.100 (6) | 0.500 ± 0.100 (6) | - |" in text
    assert "unscored (6)" in text
    for table in text.split("\n\n"):
        bars = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(bars) <= 1, "every line of a table has as many cells"


def test_runs_that_differ_in_parameters_are_told_apart(tmp_path: Path) -> None:
    methods = [{"name": "rome", "layer": layer} for layer in (0, 1)]
    folders = [written(tmp_path / f"rome-layer{m['layer']}", scored=2, method=m) for m in methods]
    text = markdown(folders)
    for folder in folders:
        assert text.count(f"| rome [{folder.name}] (tiny) |") == 2
        assert f"*rome [{folder.name}]: not measured yet" in text


def test_runs_are_found_here_and_one_level_below(tmp_path: Path) -> None:
    one, other = written(tmp_path / "study" / "a"), written(tmp_path / "study" / "b")
    assert find_runs([tmp_path / "study"]) == [one, other] == find_runs([one, other, one])
    with pytest.raises(UserError, match="no run directory and holds none"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match=r"is no run directory: it has no resolved\.json"):
        run_info(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"experiment": {}}', '{"experiment": 3, "digest": ""}', "{"])
def test_a_foreign_folder_is_one_sentence(tmp_path: Path, content: str) -> None:
    folder = written(tmp_path / "run")
    (folder / "resolved.json").write_text(content)
    with pytest.raises(UserError, match=r"resolved\.json"):
        run_info(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense", '{"scores": []}'])
def test_a_broken_score_is_named(tmp_path: Path, content: str) -> None:
    folder = written(tmp_path / "run")
    path = RunDir(folder).score(3, "edits")
    path.write_text(content)
    with pytest.raises(UserError, match=r"000003/edits\.json cannot be read") as caught:
        rows(folder)
    assert "run again" in caught.value.hint


def test_figures_survive_json(tmp_path: Path) -> None:
    row = rows(written(tmp_path / "run"))[0]
    assert json.loads(json.dumps(vars(row)))["run"] == str(tmp_path / "run")
