"""Claim: 3-shot BBH takes half the CPU time of the harness's own model class.

Plain: ``HFLM`` at batch 16, which runs the three worked examples again for every item and keeps finished rows until
the last of a batch is done. Fast: the engine of ``lm.py``, which runs a task's examples once, appends to the cache in
place, and lets finished rows leave. Two tasks, 20 items each, 48 new tokens, real texts, GPT-2 small's shape. The
number of equal answers is printed; random weights make near ties, which rounding may decide either way.

    python -m bench.bbh_generation [--runs 1] [--items 20] [--tokens 48]
"""

from __future__ import annotations

import argparse

from bench.real_prompts import bbh, model, referee, request
from bench.setting import paired, report
from manyedits.lm import Engine

TASKS = ("date_understanding", "movie_recommendation")
STOPS = ("</s>", "Q", "\n\n")
ASKED = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=1, help="paired runs; the median counts")
    parser.add_argument("--items", type=int, default=20, help="items per task")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per item")
    given = parser.parse_args()
    scored, prompts = model(), bbh(TASKS, given.items)
    harness, engine, answers = referee(scored), Engine(scored), {}
    asked = [request("generate_until", p, {"until": list(STOPS), "max_gen_toks": given.tokens}) for p in prompts]

    def plain() -> None:
        answers["plain"] = harness.generate_until(asked, disable_tqdm=True)

    def fast() -> None:
        answers["fast"] = engine.generate(prompts, STOPS, given.tokens)

    timed = paired(plain, fast, given.runs)
    equal = sum(a == b for a, b in zip(answers["plain"], answers["fast"], strict=True))
    report("bbh_generation", ASKED, timed, items=2 * given.items, new_tokens=given.tokens, equal=equal)


if __name__ == "__main__":
    main()
