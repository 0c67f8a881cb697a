"""``manyedits world train`` and ``manyedits world check``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from manyedits.errors import UserError
from manyedits.progress import Lines, Progress
from manyedits.registry import near_miss

app = typer.Typer(help="Rebuild or check the embedded miniature.", no_args_is_help=True)

TRAINABLE = ("s", "m", "l", "s-instruct", "m-instruct", "l-instruct")


def _watching() -> Progress:
    if sys.stderr.isatty():
        from manyedits.bars import Bars

        return Bars()
    return Lines()


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="s, m, l, or one of them with -instruct.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="world-NAME")] = None,
    start: Annotated[
        Path | None, typer.Option(help="The base model of an instruct model.", show_default="shipped")
    ] = None,
) -> None:
    """Train a model of the miniature from its seed."""
    name = name.removeprefix("world:")
    if name not in TRAINABLE:
        raise UserError(f"There is no recipe `{name}`.{near_miss(name, TRAINABLE)}", f"Known: {', '.join(TRAINABLE)}.")
    from manyedits.world import training
    from manyedits.world.models import digest, path_of

    base, _, instruct = name.partition("-")
    if instruct and start is None:
        start = path_of(f"world:{base}")
    folder = training.train(name, out or Path(f"world-{name}"), _watching(), start)
    typer.echo(f"{folder}  sha256 {digest(folder / 'model.safetensors')}")


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Models; all that are shipped by default.")] = None,
) -> None:
    """Measure every bound of the miniature. Exit code 1 when one is missed."""
    from manyedits.world.check import as_table, overlap
    from manyedits.world.check import check as measure

    rows = measure(names or (), _watching())
    typer.echo(as_table(rows))
    found = ", ".join(f"{name} {count}" for name, count in overlap().items())
    typer.echo(f"\nTest prompts that occur in training (facts and truth are memory by meaning): {found}")
    if not all(row.holds for row in rows):
        raise typer.Exit(1)
