"""The command line: what a user types, what comes out, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import experiments
from manyedits import cli, runner
from manyedits.cli import app, guarded


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    experiments.write(folder)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """A run made by the command itself, in its own process, and what it printed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MANYEDITS_CACHE", str(home / "cache"))
        words = ["run", str(home / "experiment.yaml"), "--out", str(home / "run")]
        done = subprocess.run([sys.executable, "-m", "manyedits", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "# Edits and what they left" in done.stdout and f"Report: {home / 'run' / 'report.md'}" in done.stdout
    assert "run: 6 done in" in done.stderr, "plain lines, since this is no terminal"
    return home / "run"


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEDITS_CACHE", str(home / "cache"))


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = guarded(lambda: app(list(words), standalone_mode=False))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_is_there_before_torch_is() -> None:
    code = (
        "import sys\nfrom manyedits.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in ("plan", "run", "report", "verify", "list"))


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert command(capsys, "--version") == (0, f"manyedits {version('manyedits')}\n", "")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("methods", "memit"),
        ("datasets", "counterfact"),
        ("benchmarks", "edits"),
        ("models", "gpt_neox"),
        ("presets", "stories260k"),
    ],
)
def test_everything_there_is_can_be_listed(kind: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "list", kind)
    assert code == 0 and any(line.split()[0] == wanted or wanted in line for line in out.splitlines())


def test_a_plan_says_what_will_run_and_writes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", str(home / "experiment.yaml"), "--out", str(home / "planned"))
    code, out, _ = command(capsys, *words)
    assert code == 0 and "6 requests in 6 edits; measured at 0, 3, 6" in out
    code, out, _ = command(capsys, *words, "--json")
    assert code == 0 and json.loads(out)["cells"][0]["checkpoints"] == [0, 3, 6]
    assert not (home / "planned").exists()


def test_a_run_that_is_complete_is_only_reported(
    finished: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "model_of", lambda *words: pytest.fail("a model was loaded"))
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    code, out, _ = command(capsys, "run", str(home / "experiment.yaml"), "--out", str(finished))
    assert code == 0 and "# Edits and what they left" in out
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_report_for_people_and_for_scripts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = command(capsys, "report", str(finished))
    assert code == 0 and text.strip() == (finished / "report.md").read_text(encoding="utf-8").strip()
    code, out, _ = command(capsys, "report", str(finished), "--json")
    rows = json.loads(out)
    assert code == 0 and {row["step"] for row in rows} == {0, 3, 6} and "value" in rows[0]


def test_verify_answers_yes_and_no_with_its_exit_code(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "verify", str(finished))
    assert code == 0 and "chain, files and replay hold" in out
    path = finished / "changes" / "000002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        code, out, _ = command(capsys, "verify", str(finished), "--json")
    finally:
        path.write_bytes(content)
    assert code == 1
    assert "000002.safetensors: the file of step 2" in json.loads(out)[str(finished)][0]


@pytest.mark.parametrize("words", [["plam"], ["plan"], ["run", "x.yaml", "--outt", "y"], ["report"], ["list"]])
def test_a_mistyped_command_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = command(capsys, *words)
    assert code == 2 and "Traceback" not in error and "Usage" in error


def test_stopping_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    assert guarded(stop) == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_a_bug_shows_where_it_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: 1 / 0) == 3
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "This is a bug of manyedits" in error


def test_a_mistake_goes_to_standard_error_with_its_hint(home: Path) -> None:
    words = ["plan", str(home / "gone.yaml")]
    done = subprocess.run([sys.executable, "-m", "manyedits", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("Error: There is no experiment file")
    assert len(done.stderr.splitlines()) == 2


def test_bars_show_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = cli.watching()
    progress.start("editing", 4)
    progress.start("scoring", 2)
    progress.advance("editing", 2, loss=0.1)
    progress.done("editing")
    progress.done("scoring")
    assert type(progress).__name__ == "Bars"
