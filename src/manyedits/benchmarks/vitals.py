"""Vital signs: cheap figures that move before abilities do.

Perplexity on fixed text, the distance of next-token distributions from the unedited model's, the size of edited weights, and
what free generations look like: repeating, empty, or all alike. A model that answers everything alike can look safe and
accurate elsewhere; here it cannot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from manyedits.benchmarks.base import Benchmark, Sample, Setting, content_digest
from manyedits.benchmarks.text import ngram_entropy, repetition
from manyedits.lm import Engine, Generated
from manyedits.model import EditableModel

TEXTS = 60  # fixed texts, the first of the corpus
TEXT_WORDS = 60  # of each
PROMPT_WORDS = 6  # of each text, from which is generated
FREE_TOKENS = 32

#: Read where an experiment names no text: plain sentences of our own.
PLAIN = (
    "The train left the station a little after nine and reached the coast before noon.",
    "She put the letter on the table, opened the window and listened to the rain.",
    "Most birds build their nests in spring, when food for their young is easy to find.",
    "The committee will meet again next week to decide how the money should be spent.",
    "If you heat water long enough it turns into steam, and the steam fills the kitchen.",
    "He had never seen the old bridge by daylight, and it was smaller than he remembered.",
    "A good map shows not only where the roads are but also how steep the hills will be.",
    "They sold the house in the autumn and moved to a flat near the university.",
)


class Vitals(Benchmark):
    """Perplexity, distance from the base, weights, and free generations."""

    name = "vitals"
    version: ClassVar[int] = 1

    def prepare(self, model: EditableModel, setting: Setting) -> None:
        chosen = setting.texts[:TEXTS] or PLAIN
        self.texts = [" ".join(text.split()[:TEXT_WORDS]) for text in chosen]
        self.starts = [" ".join(text.split()[:PROMPT_WORDS]) for text in self.texts]
        engine = Engine(model)
        self.base = engine.next_logprobs(self._prompts(engine))

    def digest(self, step: int) -> str:
        return content_digest([self.name, self.version, self.texts, self.starts, FREE_TOKENS])

    def run(self, model: EditableModel, step: int) -> list[Sample]:
        engine = Engine(model)
        return [*self._perplexity(engine), *self._distance(engine), *_weights(model), *self._free(engine)]

    def _prompts(self, engine: Engine) -> list[tuple[int, ...]]:
        return [engine.encoder.prompt(start) for start in self.starts]

    def _perplexity(self, engine: Engine) -> Iterator[Sample]:
        """One figure over all tokens, since perplexity is no mean over texts."""
        total = sum(engine.loglikelihood_rolling(self.texts))
        tokens = sum(len(engine.encoder.ids(text)) for text in self.texts)
        mean = -total / tokens
        finite = math.isfinite(mean) and mean < 700  # exp() of more is no number
        yield Sample("texts", "perplexity", math.exp(mean) if finite else None, detail={"tokens": tokens})

    def _distance(self, engine: Engine) -> Iterator[Sample]:
        """KL(base || now) of the next token after each start, in nats."""
        now = engine.next_logprobs(self._prompts(engine))
        for start, before, after in zip(self.starts, self.base, now, strict=True):
            yield Sample(start, "kl_to_base", _kl(before, after))

    def _free(self, engine: Engine) -> Iterator[Sample]:
        texts = engine.generate_tokens(self._prompts(engine), max_new_tokens=FREE_TOKENS)
        for start, said in zip(self.starts, texts, strict=True):
            empty = not said.text.strip()
            detail = {"text": said.text}
            yield Sample(start, "repetition", repetition(said.tokens), ("empty",) if empty else (), detail)
            yield Sample(start, "free_entropy", ngram_entropy(said.text))
            yield Sample(start, "empty", float(empty))
        yield Sample("texts", "constant", _constant(texts), detail={"texts": len(texts)})


def _kl(before: Tensor, after: Tensor) -> float | None:
    value = float((before.double().exp() * (before.double() - after.double())).sum())
    return max(value, 0.0) if math.isfinite(value) else None


def _constant(texts: Sequence[Generated]) -> float:
    """Share of the commonest text: 1 when everything is answered alike."""
    return Counter(said.text.strip() for said in texts).most_common(1)[0][1] / len(texts)


def _weights(model: EditableModel) -> Iterator[Sample]:
    """Per edited matrix: its norm, its change and its largest singular value, as shares of the unedited one's."""
    for name, weight in model.masters().items():
        if weight.dim() == 2:
            base = model.base_weight(name)
            yield Sample(name, "norm_ratio", _ratio(weight.norm(), base.norm()))
            yield Sample(name, "change_ratio", _ratio((weight - base).norm(), base.norm()))
            yield Sample(name, "top_singular_ratio", _ratio(_largest(weight), _largest(base)))


def _ratio(value: Tensor, base: Tensor) -> float | None:
    ratio = float(value / base)
    return ratio if math.isfinite(ratio) else None


def _largest(weight: Tensor) -> Tensor:
    """The largest singular value, by a dozen power iterations from a fixed start."""
    vector = torch.ones(weight.shape[1], device=weight.device)
    for _ in range(12):
        vector = weight.T @ (weight @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    return (weight @ vector).norm()
