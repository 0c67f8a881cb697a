"""A report in Markdown: for every figure a table of runs by number of edits, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from manyedits import results, rundir
from manyedits.results import Row, RunInfo


def write_markdown(path: Path, folders: Sequence[Path]) -> None:
    """Write the report of these runs to a file."""
    rundir.write_atomic(path, markdown(folders).encode())


def markdown(folders: Sequence[Path]) -> str:
    """The report of these runs as text. Runs on different models are told apart."""
    infos = [results.run_info(folder) for folder in folders]
    found = [row for folder in folders for row in results.rows(folder)]
    labels = _labels(infos)
    parts = ["# Edits and what they left", "", *_runs(infos, labels), *_missing(infos, labels)]
    for benchmark in dict.fromkeys(row.benchmark for row in found):
        parts += ["", f"## {benchmark}", ""]
        for metric in dict.fromkeys(row.metric for row in found if row.benchmark == benchmark):
            chosen = [row for row in found if (row.benchmark, row.metric) == (benchmark, metric)]
            parts += [f"**{metric}**", "", *_table(chosen, infos, labels), ""]
    parts += ["Value ± standard error (n). A dash: not measured. `unscored`: every item could not be judged."]
    return "\n".join(parts) + "\n"


def _labels(infos: Sequence[RunInfo]) -> dict[Path, str]:
    """What each run is called; runs that would be called the same get the name of their folder."""
    known = Counter((info.label, info.model) for info in infos)
    return {
        info.folder: info.label + (f" [{info.folder.name}]" if known[info.label, info.model] > 1 else "")
        for info in infos
    }


def _runs(infos: Sequence[RunInfo], labels: dict[Path, str]) -> Iterator[str]:
    yield "| run | model | data | edits | seconds per edit | experiment |"
    yield "|---|---|---|---|---|---|"
    for info in infos:
        rate = f"{info.seconds / info.edited:.3f}" if info.edited else "-"
        data = info.experiment["data"]["name"]
        yield f"| {labels[info.folder]} | {info.model} | {data} | {info.edited} | {rate} | `{info.digest[:8]}` |"


def _missing(infos: Sequence[RunInfo], labels: dict[Path, str]) -> Iterator[str]:
    for info in infos:
        gaps = results.missing(info)
        if gaps:
            named = ", ".join(f"{name} at {step}" for step, name in gaps[:6]) + (", ..." if len(gaps) > 6 else "")
            yield f"\n*{labels[info.folder]}: not measured yet: {named}.*"


def _table(rows: Sequence[Row], infos: Sequence[RunInfo], labels: dict[Path, str]) -> Iterator[str]:
    steps = sorted({row.step for row in rows})
    cells = {(row.run, row.step): row for row in rows}
    yield "| edits | " + " | ".join(str(step) for step in steps) + " |"
    yield "|---" * (len(steps) + 1) + "|"
    for info in infos:
        shown = [_cell(cells.get((str(info.folder), step))) for step in steps]
        yield f"| {labels[info.folder]} ({info.model}) | " + " | ".join(shown) + " |"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.value is None:
        return f"unscored ({row.unscored})"
    error = f" ± {row.error:.3f}" if row.error is not None else ""
    gaps = f", {row.unscored} unscored" if row.unscored else ""
    return f"{row.value:.3f}{error} ({row.n}{gaps})"
