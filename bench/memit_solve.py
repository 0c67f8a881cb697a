"""Claim: solving for one MEMIT edit at d_ff 3072 takes a twentieth of the dense 64-bit solve.

Plain: `(w C + k k^T)^-1 k` with the whole 3072 x 3072 system for every edit, in float64, as the reference does. Fast:
`C` factored once per layer, and per edit two triangular solves and a 1 x 1 system (Woodbury). The factorisation is done
once per model and layer whatever the number of edits, so the claim excludes it; the second line includes it, and says
after how many edits the factored form is 20 times ahead with everything counted.

    python -m bench.memit_solve [--runs 5]
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from bench.plain_edit import memit_solve
from bench.setting import cpu_seconds, paired, report
from manyedits.methods.solve import Factored

WIDTH, WEIGHT, ASKED, REPEATS = 3072, 20_000.0, 20.0, 20


def moment(width: int) -> Tensor:
    """A second moment with a spectrum over four orders of magnitude, as those of real keys have."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2 * width, width, generator=generator) * torch.logspace(0, -2, width)
    return keys.T @ keys / (2 * width)


def main() -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    covariance = moment(WIDTH)
    keys = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    factored = Factored(covariance)
    ours, dense = factored.spread(keys.T, WEIGHT), memit_solve(keys, covariance, WEIGHT)
    error = f"{float((ours - dense).abs().max() / dense.abs().max()):.0e}"
    pairs = paired(
        lambda: memit_solve(keys, covariance, WEIGHT),
        lambda: [factored.spread(keys.T, WEIGHT) for _ in range(REPEATS)],
        given.runs,
        (1, REPEATS),
    )
    facts = {"width": WIDTH, "batch": 1, "relative_error": error}
    alone = report("MEMIT batch-1 solve, factorisation excluded", ASKED, pairs, **facts)
    return [alone, with_factorisation(covariance, keys, given.runs, facts, alone)]


def with_factorisation(
    covariance: Tensor, keys: Tensor, runs: int, facts: dict[str, Any], alone: dict[str, Any]
) -> dict[str, Any]:
    """The same with everything counted, for 100 edits: one factorisation and 100 small solves."""
    count = 100
    pairs = paired(
        lambda: memit_solve(keys, covariance, WEIGHT),
        lambda: many(covariance, keys, count),
        runs,
        (1, count),
    )
    once = cpu_seconds(lambda: Factored(covariance))
    spare = alone["plain_cpu_s"] / ASKED - alone["fast_cpu_s"]
    after = math.ceil(once / spare) if spare > 0 else None
    line = {**facts, "edits": count, "factorisation_cpu_s": round(once, 3), "edits_until_asked": after}
    return report("MEMIT batch-1 solves, factorisation included once in 100 edits", None, pairs, **line)


def many(covariance: Tensor, keys: Tensor, count: int) -> None:
    """One factorisation and as many small solves."""
    factored = Factored(covariance)
    for _ in range(count):
        factored.spread(keys.T, WEIGHT)


if __name__ == "__main__":
    main()
