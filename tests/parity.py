"""Compare our editing methods with a folder of recorded outputs of the reference implementations.

    python tests/parity.py GOLDEN_DIR [--methods rome,memit]

Any architecture: the folder's config.json decides. Prints a row per comparison in the order in which a mistake is best
looked for (check 1 first: when an early check is over, the later ones are over for that reason), then a summary. What
the reference itself broke is printed as such and not compared; what cannot be compared says why. Exit status 1 when a
comparison is over its tolerance, 2 when there is no such folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from golden import Golden
from parity_methods import MODULES, Adapter, adapter
from parity_methods.stage import Stage
from parity_methods.table import FAILED, SKIPPED, Row, summary

CHECKS = {
    1: "lookup index",
    2: "second moments",
    3: "keys and outputs of the unedited model",
    4: "the objective before any step: first losses, first gradient",
    5: "the optimiser: steps, losses, targets",
    6: "the closed form alone, fed with the recorded inputs",
    7: "end to end",
}


def compare(golden: Golden, methods: Iterable[str] = ()) -> list[Row]:
    """All rows for the methods named, or for everything recorded, sorted by check."""
    stage = Stage(golden)
    rows: list[Row] = []
    for method in list(methods) or ["covariance", *(name for name in golden.methods if name != "covariance")]:
        rows += rows_of(stage, method)
    return sorted(rows, key=lambda row: row.check)


def rows_of(stage: Stage, method: str) -> list[Row]:
    """The rows of one recorded method; a single one where there is no adapter."""
    found = adapter(method)
    if found is not None:
        return guarded(found, stage)
    count = len(stage.golden.tensors(method))
    return [Row(7, method, "-", "-", f"({count} tensors)", SKIPPED + "no adapter for this method yet")]


def guarded(found: Adapter, stage: Stage) -> list[Row]:
    """The rows of an adapter; when it fails, that is one failed row, and the other methods are still compared."""
    try:
        return found.rows(stage)
    except Exception as error:
        logging.getLogger(__name__).exception("comparing %s failed", found.method)
        return [Row(7, found.method, "-", "-", "(all)", f"{FAILED}: {type(error).__name__}: {error}")]


def line(row: Row) -> str:
    error = "" if row.error is None else f"{row.error:.1e}"
    tolerance = "" if row.tolerance is None else f"{row.tolerance:.0e}"
    place = f"{row.method:<12} {row.variant:<8} {row.case:<10} {row.tensor:<34}"
    return f"{row.check} {place} {error:>8} {tolerance:>6}  {row.verdict}"


def report(rows: Sequence[Row]) -> str:
    """The table, a heading before each check, and the count of every verdict."""
    lines = []
    for check, what in CHECKS.items():
        lines += ["", f"{check}. {what}", *(line(row) for row in rows if row.check == check)]
    counts = summary(rows)
    worst = [f"  {line(row)}" for row in rows if row.failed]
    total = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return "\n".join([*lines, "", f"{len(rows)} rows: {total}", *worst])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="a folder of recorded outputs: config.json, <method>.safetensors, ..."
    )
    parser.add_argument("--methods", default="", help=f"comma-separated; known: {', '.join(MODULES)}")
    given = parser.parse_args(arguments)
    if not (given.folder / "config.json").is_file() or not (given.folder / "requests.json").is_file():
        print(
            f"{given.folder} is no folder of recorded outputs: config.json or requests.json is missing", file=sys.stderr
        )
        return 2
    torch.set_num_threads(1)
    rows = compare(Golden(given.folder), [name for name in given.methods.split(",") if name])
    print(report(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
