"""The recipe that makes the miniature, from a seed to a folder that plain transformers loads.

Documents are packed into rows of 64 tokens, six rows a step. Matrices are trained with Muon (Jordan et al. 2024) under a
strong weight decay, which keeps hidden states short; embeddings and norms with AdamW. Answer tokens count ten times as much
as prompt tokens. Every other step also learns from exchanges of subjects (``swaps.py``). Everything comes from the seed, so
training twice on one machine gives the same weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from manyedits.progress import Progress, Silent
from manyedits.world.documents import END, PROMPT_WEIGHT, Document, base_documents, chat_documents
from manyedits.world.exercises import Exercises
from manyedits.world.facts import World
from manyedits.world.shapes import SHAPES, config_of
from manyedits.world.swaps import Swaps
from manyedits.world.tokenizer import make_tokenizer

logger = logging.getLogger(__name__)

SEED = 0


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; rates are peak values of a warm-up and a cosine."""

    row: int = 64  # tokens
    rows: int = 6  # per step
    open_bins: int = 12  # rows that are filled at once
    matrix_rate: float = 0.03  # Muon
    matrix_decay: float = 0.2
    rate: float = 0.01  # AdamW
    decay: float = 0.1
    warm_up: float = 0.1  # share of the steps
    last: float = 0.01  # share of the peak at the end
    clip: float = 1.0  # norm of the gradient
    swaps: int = 16  # pairs of facts whose subjects' states are exchanged
    swap_every: int = 2  # steps between two such exchanges
    swap_weight: float = 1.0  # of their loss


def train(name: str, out: Path, progress: Progress | None = None, start: Path | None = None) -> Path:
    """Train ``s``, ``m`` or ``l``, or with ``-instruct`` the base in ``start`` further; writes a model folder."""
    size, _, instruct = name.partition("-")
    shape, exercises = SHAPES[size], Exercises(World.make(SEED))
    tokenizer = make_tokenizer(exercises, chat=bool(instruct))
    if instruct:
        assert start is not None, "an instruct model is a base model trained further"
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
        documents = chat_documents(exercises, SEED, shape.instruct)
        recipe = Recipe(matrix_rate=0.015, rate=0.005)
    else:
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config_of(shape, len(tokenizer)))
        documents, recipe = base_documents(exercises, SEED, shape.base, shape.epochs), Recipe()
    swaps = Swaps(model, tokenizer, exercises.world, shape.site, recipe.swaps, SEED)
    fit(model, tokenizer, documents, recipe, progress or Silent(), name, swaps)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def fit(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    recipe: Recipe,
    progress: Progress,
    name: str,
    swaps: Swaps | None = None,
) -> None:
    """Train in place on the documents, once through."""
    ids, weights = pack([encode(tokenizer, d) for d in documents], recipe)
    steps = len(ids) // recipe.rows
    optimisers = optimisers_of(model, recipe)
    model.train()
    progress.start(f"world:{name}", steps)
    for step in range(steps):
        rows = slice(step * recipe.rows, (step + 1) * recipe.rows)
        loss = loss_of(model, ids[rows], weights[rows])
        if swaps is not None and step % recipe.swap_every == 0:
            loss = loss + recipe.swap_weight * swaps.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * pace(step, steps, recipe)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        progress.advance(f"world:{name}")
        if step % 100 == 0:
            logger.info("world:%s step %d of %d, loss %.4f", name, step, steps, float(loss.detach()))
    progress.done(f"world:{name}")
    model.eval()


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> tuple[list[int], list[float]]:
    """Ids of a document with a beginning and an end, and what each token weighs as a target."""
    before = tokenizer.encode(document.prompt)
    chat = END if "<assistant>" in document.prompt else ""
    after = tokenizer.encode(
        f"{document.answer} . {chat}" if document.prompt else document.answer, add_special_tokens=False
    )
    weight = 1.0 if document.prompt else PROMPT_WEIGHT
    return before + after, [PROMPT_WEIGHT] * len(before) + [weight] * len(after)


def pack(documents: Sequence[tuple[list[int], list[float]]], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Documents into rows, each into the fullest open row that has room; rows leave when they are the fullest of too many."""
    done: list[tuple[list[int], list[float]]] = []
    bins: list[tuple[list[int], list[float]]] = []
    for ids, weights in documents:
        ids, weights = ids[: recipe.row], weights[: recipe.row]
        fitting = [b for b in bins if len(b[0]) + len(ids) <= recipe.row]
        if fitting:
            chosen = max(fitting, key=lambda b: len(b[0]))
            chosen[0].extend(ids)
            chosen[1].extend(weights)
        else:
            bins.append((list(ids), list(weights)))
        if len(bins) > recipe.open_bins:
            fullest = max(range(len(bins)), key=lambda i: len(bins[i][0]))
            done.append(bins.pop(fullest))
    done += bins
    short = [recipe.row - len(ids) for ids, _ in done]
    tokens = torch.tensor([ids + [0] * gap for (ids, _), gap in zip(done, short, strict=True)])
    weighed = torch.tensor([w + [0.0] * gap for (_, w), gap in zip(done, short, strict=True)])
    return tokens, weighed


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of -log p over the next tokens, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pace(step: int, steps: int, recipe: Recipe) -> float:
    """The rate at a step as a share of the peak: a linear warm-up, then a cosine."""
    warm = max(1, round(steps * recipe.warm_up))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return recipe.last + (1 - recipe.last) * 0.5 * (1 + math.cos(math.pi * done))


def optimisers_of(model: Qwen3ForCausalLM, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms; each with its peak rate."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.matrix_decay, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay)
    return [(muon, recipe.matrix_rate), (adam, recipe.rate)]
