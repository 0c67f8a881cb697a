"""Claim: the value search takes a third of the plain form's CPU time at layer 5 of GPT-2 small, a quarter at layer 8.

Plain: every step runs all 12 layers over all tokens of 12 rows and makes all their logits (`bench/plain.py`), one
request after the other. Fast: both requests at once, from the layer after the edited one on, over what stands from the
lookup position on, logits where the loss reads them. Eleven contexts, 20 evaluations, no early stop.

    python -m bench.value_search [--layers 5 8] [--runs 5] [--steps 20]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.plain import GPT2, Fact, Options, make_rows, search_value
from bench.setting import CONTEXTS, FACTS, gpt2_small, paired, report, tokenizer
from manyedits.data import Request
from manyedits.methods.base import ValueParams
from manyedits.methods.value import find_values
from manyedits.model import EditableModel

ASKED = {5: 3.0, 8: 4.0}


def plain_losses(model: EditableModel, layer: int, steps: int) -> Tensor:
    """Losses of the plain form, (requests, steps, 4)."""
    options = Options(steps=steps, enough=0.0)
    site = GPT2.mlp.format(layer)
    rows = [make_rows(model.tokenizer, fact, CONTEXTS, options.where) for fact in FACTS]
    return torch.stack([search_value(model.hf, site, each, options).losses for each in rows])


def fast_losses(model: EditableModel, layer: int, steps: int) -> Tensor:
    """The same by the package."""
    requests = [request(number, fact) for number, fact in enumerate(FACTS)]
    params = ValueParams(steps=steps, stop_below=0.0)
    return find_values(model, requests, layer, model.mlp_out(layer), CONTEXTS, params).losses


def request(number: int, fact: Fact) -> Request:
    return Request(id=str(number), subject=fact.subject, prompt=fact.prompt, target=fact.target)


def measure(model: EditableModel, layer: int, steps: int, runs: int) -> dict[str, Any]:
    plain, fast = partial(plain_losses, model, layer, steps), partial(fast_losses, model, layer, steps)
    few = plain_losses(model, layer, 3), fast_losses(model, layer, 3)
    difference = float((few[0] - few[1]).abs().max() / few[0].abs().max())
    pairs = paired(plain, fast, runs, (len(FACTS), len(FACTS)))
    facts = {"layer": layer, "requests": len(FACTS), "steps": steps, "relative_error_of_losses": f"{difference:.0e}"}
    return report(f"value search at layer {layer}", ASKED.get(layer), pairs, **facts)


def main() -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=sorted(ASKED))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = EditableModel.wrap(gpt2_small(), tokenizer())
    return [measure(model, layer, given.steps, given.runs) for layer in given.layers]


if __name__ == "__main__":
    main()
