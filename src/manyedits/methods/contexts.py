"""Texts put before a prompt, so that what is written does not depend on standing at the beginning of a text.

The reference implementations let the model write them, from five openings, with top-k sampling. So do we, with a
generator seeded by the experiment, once per model, and the texts are kept as an artifact: the same model and seed give
the same contexts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyedits.methods.base import ContextParams, Supplies
from manyedits.model import EditableModel

OPENINGS = ("The", "Therefore", "Because", "I", "You")
TOP_K = 5


def context_groups(model: EditableModel, params: ContextParams, supplies: Supplies) -> tuple[tuple[str, ...], ...]:
    """Templates by type, the bare "{}" first; each other type is one entry of ``params.lengths``."""
    if params.texts is not None:
        return params.texts
    key = {"model": model.fingerprint, "lengths": params.lengths, "seed": supplies.seed, "top_k": TOP_K, "form": 1}
    written = supplies.artifacts.get_or_build_json("contexts", key, lambda: _write_all(model, params, supplies.seed))
    return (("{}",), *(tuple(group) for group in written))


def _write_all(model: EditableModel, params: ContextParams, seed: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [as_context(text) for text in write_texts(model, OPENINGS, tokens, count, generator)]
        for tokens, count in params.lengths
    ]


def as_context(text: str) -> str:
    """A written text as a template: on one line, without braces, ended by a full stop."""
    plain = " ".join(text.replace("{", " ").replace("}", " ").split())
    return f"{plain}. {{}}"


def write_texts(
    model: EditableModel, openings: tuple[str, ...], tokens: int, count: int, generator: torch.Generator
) -> list[str]:
    """``count`` texts of ``tokens`` new tokens, from the openings in turn, each next token one of the TOP_K likeliest."""
    texts = []
    for i in range(count):
        ids = model.tokenizer(openings[i % len(openings)], return_tensors="pt")["input_ids"].to(model.device)
        for _ in range(tokens):
            ids = torch.cat([ids, _sample(model, ids, generator)], dim=1)
        texts.append(model.tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def _sample(model: EditableModel, ids: Tensor, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        logits = model.hf(input_ids=ids, logits_to_keep=1, use_cache=False).logits[0, -1].float().cpu()
    best = logits.topk(min(TOP_K, len(logits)))
    drawn = torch.multinomial(best.values.softmax(0), 1, generator=generator)
    return best.indices[drawn].to(ids.device)[None]
