"""Claim: 5-shot MMLU takes a quarter of the CPU time of the harness's own model class.

Plain: ``HFLM`` at batch 16, which already reads the four letters of an item from one forward pass, but runs the five
examples again for every item and makes logits over the whole vocabulary for every token. Fast: the engine of ``lm.py``,
which runs a subject's examples once and makes logits for one token per item. Two subjects, 50 items each, real texts,
GPT-2 small's shape. Tokenisation is part of both sides; the largest difference of a log-probability is printed.

    python -m bench.mmlu_scoring [--runs 1] [--items 50]
"""

from __future__ import annotations

import argparse

from bench.real_prompts import mmlu, model, referee, request
from bench.setting import paired, report
from manyedits.lm import Engine

SUBJECTS = ("high_school_geography", "marketing")
ASKED = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=1, help="paired runs; the median counts")
    parser.add_argument("--items", type=int, default=50, help="items per subject")
    given = parser.parse_args()
    scored, pairs = model(), mmlu(SUBJECTS, given.items)
    harness, engine, answers = referee(scored), Engine(scored), {}
    asked = [request("loglikelihood", *pair) for pair in pairs]

    def plain() -> None:
        answers["plain"] = harness.loglikelihood(asked, disable_tqdm=True)

    def fast() -> None:
        answers["fast"] = engine.loglikelihood_texts(pairs)

    timed = paired(plain, fast, given.runs)
    report("mmlu_scoring", ASKED, timed, items=2 * given.items, difference=difference(**answers))


def difference(plain: list[tuple[float, bool]], fast: list[tuple[float, bool]]) -> float:
    """The largest difference of a log-probability."""
    return max(abs(a - b) for (a, _), (b, _) in zip(plain, fast, strict=True))


if __name__ == "__main__":
    main()
