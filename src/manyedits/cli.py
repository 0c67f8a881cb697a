"""The command line: one function per command, each parses, calls and prints."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from manyedits.config import Options
from manyedits.errors import UserError
from manyedits.progress import Lines, Progress
from manyedits.world.commands import app as world

app = typer.Typer(
    help="What is left of a language model after many edits?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(world, name="world")

ExperimentFile = Annotated[Path, typer.Argument(help="The experiment, a YAML file.", show_default=False)]
Runs = Annotated[list[Path], typer.Argument(help="Run directories, or folders that hold some.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Where the run directories go.", show_default="runs/NAME-DIGEST")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
DataDir = Annotated[Path | None, typer.Option(help="Local folder with benchmark files.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a model's own code run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]


#: The exit code of a stopped command. The parser turns Ctrl-C into it without a word.
STOPPED = 130

#: What the parser raises for a wrong option; typer names only its subclass.
USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def say(text: str, error: bool = False) -> None:
    """The one way in which the command line prints."""
    typer.echo(text, err=error)


def main() -> NoReturn:
    """Run a command; what the user can mend ends with one message and exit code 2, a bug with its traceback and 3."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "transformers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(guarded(lambda: app(standalone_mode=False)))


def guarded(command: Callable[[], Any]) -> int:
    """The exit code of a command: 0 done, 1 the answer is no, 2 the user can mend it, 3 a bug, 130 stopped."""
    try:
        code = command()
        if code == STOPPED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except UserError as error:
        say(f"Error: {error.what}" + (f"\n{error.hint}" if error.hint else ""), error=True)
        return 2
    except typer.Exit as done:
        return done.exit_code
    except USAGE_ERROR as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("\nStopped. Run the same command again to go on.", error=True)
        return STOPPED
    except Exception:  # a bug of ours: show where it happened
        import traceback

        traceback.print_exc()
        say("This is a bug of manyedits; please report it with the lines above.", error=True)
        return 3


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """What is left of a language model after many edits?"""
    if version:
        from importlib.metadata import version as installed

        say(f"manyedits {installed('manyedits')}")
        raise typer.Exit


def watching() -> Progress:
    """Bars on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        from manyedits.bars import Bars

        return Bars()
    return Lines()


@app.command()
def plan(experiment: ExperimentFile, out: Out = None, device: Device = "cpu", as_json: Json = False) -> None:
    """Check an experiment and say what will run, with how much memory and disk. Loads no weights."""
    from manyedits.checks import check_options, read_study
    from manyedits.planning import as_text, plan_study

    options = Options(out=out, device=device)
    check_options(options)
    planned = plan_study(read_study(experiment), options)
    say(json.dumps(planned, indent=1, default=str) if as_json else as_text(planned))


@app.command()
def run(
    experiment: ExperimentFile,
    out: Out = None,
    device: Device = "cpu",
    data_dir: DataDir = None,
    trust_remote_code: Trust = False,
) -> None:
    """Edit, measure, report. Can be stopped at any moment; run it again to go on."""
    from manyedits import runner
    from manyedits.checks import check_options, read_study
    from manyedits.report.markdown import markdown

    options = Options(out=out, device=device, data_dir=data_dir, trust_remote_code=trust_remote_code)
    check_options(options)
    study = read_study(experiment)
    folders = runner.run(study, options, watching())
    say(markdown(folders))
    say(f"Report: {study.out(options) / 'report.md'}")


@app.command()
def report(runs: Runs, as_json: Json = False) -> None:
    """Tables out of run directories, finished or not."""
    from dataclasses import asdict

    from manyedits.report.markdown import markdown
    from manyedits.results import find_runs, rows

    folders = find_runs(runs)
    if as_json:
        say(json.dumps([asdict(row) for folder in folders for row in rows(folder)], indent=1))
    else:
        say(markdown(folders))


@app.command()
def verify(runs: Runs, device: Device = "cpu", as_json: Json = False) -> None:
    """Check chain, files and replay of run directories. Exit code 1 when something does not hold."""
    from manyedits.checks import check_options
    from manyedits.results import find_runs
    from manyedits.verify import verify as check

    options = Options(device=device)
    check_options(options)
    found = {str(folder): check(folder, options) for folder in find_runs(runs)}
    if as_json:
        say(json.dumps(found, indent=1))
    else:
        for folder, problems in found.items():
            say("\n".join(f"{folder}: {p}" for p in problems) or f"{folder}: chain, files and replay hold.")
    if any(found.values()):
        raise typer.Exit(1)


@app.command("list")
def list_(kind: Annotated[str, typer.Argument(help="methods, models, datasets, benchmarks or presets.")]) -> None:
    """What there is: methods, models, datasets, benchmarks, presets."""
    from manyedits.listing import listed

    say(listed(kind))


if __name__ == "__main__":
    main()
