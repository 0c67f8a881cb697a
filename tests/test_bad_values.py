"""What no key can hold, mistakes of form and content in one message, devices, and run directories that were altered."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import experiments
from manyedits import loading, runner
from manyedits.cli import app, guarded
from manyedits.config import Options, load_study
from manyedits.errors import UserError
from manyedits.progress import Silent
from manyedits.report.markdown import markdown
from manyedits.results import rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    experiments.write(folder)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """A good run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MANYEDITS_CACHE", str(home / "cache"))
        runner.run(experiments.study(home), Options(out=home / "run"), Silent())
    return home / "run"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    code = guarded(lambda: app(list(words), standalone_mode=False))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.err


def refused(capsys: pytest.CaptureFixture[str], home: Path, text: str, *words: str) -> str:
    """The message of a file that neither `plan` nor `run` takes; no weight is loaded for it."""
    path = home / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loading, "_weights", lambda *args: pytest.fail("weights were loaded"))
        found = [command(capsys, verb, str(path), *words) for verb in ("plan", "run")]
    assert [code for code, _ in found] == [2, 2], found
    assert found[0][1] == found[1][1]
    return found[0][1]


# --- form and content at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"sead": 1, "method": "memitt", "benchmarks": ["editz"]}, ["`sead`", "`memitt`", "`editz`"]),
        ({"dtype": "int3", "data": {"name": "owm", "path": "x"}}, ["`dtype`", "no data set `owm`"]),
        ({"batch": 0, "model": "./nowhere"}, ["`batch`", "no model folder `./nowhere`"]),
        ({"data": {"name": "own", "lmit": 1}, "benchmarks": ["editz"]}, ["`data.lmit`", "`editz`"]),
    ],
)
def test_mistakes_of_form_and_of_content_come_together(
    change: dict[str, Any], wanted: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, home, yaml.safe_dump(experiments.content(home, **change)))
    assert f"{len(wanted)} mistakes" in message and all(words in message for words in wanted)


@pytest.mark.parametrize("wrong", [{"statistics": 3}, {"statistcs": {"corpus": "x"}, "statistics": None}])
def test_what_hangs_on_a_mistake_is_no_second_one(
    wrong: dict[str, Any], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, home, yaml.safe_dump(experiments.content(home, **wrong)))
    assert "mistakes" not in message and "statist" in message


def test_a_model_that_is_neither_text_nor_mapping_is_one_mistake(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`model` is 3." in refused(capsys, home, yaml.safe_dump(experiments.content(home, model=3)))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("seed: !!binary /w==", "`seed` is b'\\xff', a bytes"),
        ("seed: 2024-01-01", "a date"),
        ("method: {name: rome, preset: tiny, layer: !!binary /w==}", "`method.layer`"),
        ("method: {name: rome, preset: !!set {a, b}}", "a set"),
        ('model: "a\\0b"', "`model` holds a character that no text has"),
        ('data: {name: own, path: "a\\0b"}', "`data.path` holds"),
        ('statistics: {corpus: "\\ud800"}', "`statistics.corpus` holds"),
        ('benchmarks: [edits, "\\ud800"]', "`benchmarks.1` holds"),
        ('"se\\ud800ed": 1', "ud800ed' holds a character"),
        (f"seed: {2**64}", "`seed` is"),
        (f"threads: {10**20}", "`threads` is"),
        ("threads: 4096", "`threads` is 4096"),
        (f"model: {'a' * 5000}", "names no model"),
        ("extra: &a [*a]", "line"),
    ],
)
def test_a_value_that_no_key_can_hold(line: str, wanted: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = experiments.content(home)
    rest.pop(line.split(":")[0], None)
    message = refused(capsys, home, yaml.safe_dump(rest) + line + "\n")
    assert wanted in message and "mistakes" not in message


def test_an_empty_key_means_its_default(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = experiments.content(home, seed=None, dtype=None, limit_items=None)
    content["data"].update(seed=None, limit=None, order=None)
    whole = experiments.write(home, "whole.yaml")
    (home / "empty.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert load_study(home / "empty.yaml").cells == load_study(whole).cells
    assert "`model` is missing" in refused(capsys, home, yaml.safe_dump({**content, "model": None}))


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta"])
@pytest.mark.parametrize("verb", ["plan", "run", "verify"])
def test_a_device_that_is_not_here(verb: str, device: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = command(capsys, verb, str(home / "experiment.yaml"), "--device", device)
    assert code == 2 and f"The device `{device}` cannot be used" in error


def test_a_data_folder_that_is_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = command(capsys, "run", str(home / "experiment.yaml"), "--data-dir", str(home / "gone"))
    assert code == 2 and "There is no folder" in error and "--data-dir" in error


def test_stopping_a_command_says_how_to_go_on(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", stop)
    code, error = command(capsys, "run", str(home / "experiment.yaml"))
    assert code == 130 and "Run the same command again to go on" in error


# --- run directories that were altered --------------------------------------------------------------------------------

ODD = st.sampled_from([None, True, -1, 10**30, float("nan"), "x", "", [], {}, [[]], {"a": 1}])


def altered(value: Any, draw: Callable[[Any], Any]) -> Any:
    """A copy with one place replaced by something odd, or removed."""
    value = copy.deepcopy(value)
    places = list(every_place(value))
    if not places:
        return draw(ODD)
    *path, last = draw(st.sampled_from(places))
    holder = value
    for key in path:
        holder = holder[key]
    if draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = draw(ODD)
    return value


def every_place(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place inside a nested value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in below:
        yield (*path, key)
        yield from every_place(part, (*path, key))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_altered_runs_are_reported_or_refused(data: st.DataObject, finished: Path) -> None:
    files = ["resolved.json", "journal.jsonl", "scores/000000/edits.json", "scores/000006/edits.json"]
    path = finished / data.draw(st.sampled_from(files))
    content = path.read_text(encoding="utf-8")
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    chosen = data.draw(st.integers(0, len(lines) - 1))
    lines[chosen] = json.dumps(altered(json.loads(lines[chosen]), data.draw))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        rows(finished)
        markdown([finished])
    except UserError as error:
        assert path.name in error.what
    finally:
        path.write_text(content, encoding="utf-8")


def test_a_folder_of_another_kind_among_the_scores_is_passed_over(finished: Path) -> None:
    before = rows(finished)
    shutil.copytree(finished / "scores" / "000000", finished / "scores" / "old")
    try:
        assert rows(finished) == before
    finally:
        shutil.rmtree(finished / "scores" / "old")
