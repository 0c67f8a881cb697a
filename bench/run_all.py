"""Run every bench, one after the other, each in a process of its own; a JSON line per claim.

    python -m bench.run_all [--runs 5]

Exit status 1 when a claim was not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

BENCHES = ("memit_solve", "second_moments", "value_search")
ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(name: str, runs: int) -> list[str]:
    """The JSON lines of one bench."""
    command = [sys.executable, "-m", f"bench.{name}", "--runs", str(runs)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="paired runs per claim; the median counts")
    given = parser.parse_args()
    lines = []
    for name in BENCHES:
        for line in run(name, given.runs):
            lines.append(json.loads(line))
            print(line, flush=True)
    return int(any(line["reached"] is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
