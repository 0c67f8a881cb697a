"""Requests of the harness as tokens, made once per run and answered at every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lm_eval.api.instance import Instance

from manyedits.benchmarks.harness_items import Decoding
from manyedits.benchmarks.harness_lm import generated
from manyedits.encoding import Pair
from manyedits.lm import Engine, Plan
from manyedits.prefix import Tokens

ROLLING = "loglikelihood_rolling"


class Answer(NamedTuple):
    """What came back for one request, and how many tokens of it did not fit."""

    value: Any
    cut: int


class Encoded(Protocol):
    """Requests of one kind as tokens, ready to be answered by any state of the model."""

    def answers(self, engine: Engine) -> dict[int, Answer]:
        """By the identity of the instance."""

    def too_long(self, context: int) -> list[tuple[int, int]]:
        """Identity of those that do not fit, and how much of the context their answer takes."""


@dataclass(frozen=True)
class Pairs:
    """Likelihoods: a continuation per request, or the windows of a long text, whose log-probabilities add up."""

    owners: tuple[int, ...]
    plan: Plan
    rolling: tuple[int, ...]  # requests whose answer is a sum over windows

    @classmethod
    def of(cls, engine: Engine, asked: Sequence[Instance]) -> Pairs:
        """Cut into tokens as the engine has it now."""
        owned = [(id(instance), pair) for instance in asked for pair in _pairs(engine, instance)]
        rolling = tuple(id(instance) for instance in asked if instance.request_type == ROLLING)
        return cls(tuple(owner for owner, _ in owned), engine.plan([pair for _, pair in owned]), rolling)

    def answers(self, engine: Engine) -> dict[int, Answer]:
        """(log-probability, whether greedy) per request; the log-probability alone where there are windows."""
        answers = dict.fromkeys(self.rolling, Answer(0.0, 0))
        for owner, scores, cut in zip(self.owners, engine.score(self.plan), self.plan.cuts, strict=True):
            total = scores.total()
            summed = answers[owner].value + total[0] if owner in answers else total
            answers[owner] = Answer(summed, cut)
        return answers

    def too_long(self, context: int) -> list[tuple[int, int]]:
        """Those whose context loses tokens."""
        cut = zip(self.owners, self.plan.pairs, self.plan.cuts, strict=True)
        return [(owner, len(pair.continuation) - 1) for owner, pair, lost in cut if lost]  # the last is never read


def _pairs(engine: Engine, instance: Instance) -> list[Pair]:
    if instance.request_type == ROLLING:
        return engine.encoder.windows(instance.args[0], engine.max_length)
    return [engine.encoder.pair(*instance.args[:2])]


@dataclass(frozen=True)
class Prompts:
    """Generated answers."""

    owners: tuple[int, ...]
    prompts: tuple[Tokens, ...]
    ways: tuple[Decoding, ...]

    @classmethod
    def of(cls, engine: Engine, asked: Sequence[Instance], cap: int | None) -> Prompts:
        """Cut into tokens as the engine has it now; answers end at ``cap`` tokens at the latest."""
        prompts = tuple(engine.encoder.prompt(instance.args[0]) for instance in asked)
        ways = tuple(Decoding.of(instance.args[1], cap) for instance in asked)
        return cls(tuple(id(instance) for instance in asked), prompts, ways)

    def answers(self, engine: Engine) -> dict[int, Answer]:
        """The answers' texts."""
        said = generated(engine, self.prompts, self.ways)
        return {owner: Answer(one.text, one.cut) for owner, one in zip(self.owners, said, strict=True)}

    def too_long(self, context: int) -> list[tuple[int, int]]:
        """Those that leave no room for their answer."""
        asked = zip(self.owners, self.prompts, self.ways, strict=True)
        return [(owner, way.limit) for owner, prompt, way in asked if len(prompt) + way.limit > context]
