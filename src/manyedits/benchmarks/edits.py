"""Did the edits take, are they still there, and what did they disturb next to them.

At every checkpoint *every earlier edit* is asked again, so that forgetting is seen and not only success at the moment of
editing. At step 0 all requests of the run are asked, as the baseline. Figures come in two forms that are often mixed up
and are named apart here:

* by probability: which of two answers is likelier, as mean log-probability per token (ROME and MEMIT);
* by argmax: whether every token of the answer is the likeliest one, the answer's earlier tokens given (EasyEdit).

Neighbourhood is reported in both published forms: the true answer likelier than the new one (MEMIT), and the answer
equal to the unedited model's own (EasyEdit).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from manyedits.benchmarks.base import Benchmark, Sample, Setting, content_digest
from manyedits.data import Request
from manyedits.lm import Engine, TokenScores
from manyedits.encoding import Pair
from manyedits.model import EditableModel

#: How many tokens of the unedited model's own answer a neighbour must keep.
ANSWER_TOKENS = 3


@dataclass(frozen=True)
class _Question:
    """One prompt about one request: answers to score, and how they become a judgement.

    ``wanted`` should be likelier than ``other``; ``other`` is None where the request names no old answer.
    """

    request: int
    metric: str
    wanted: Pair
    other: Pair | None


class Edits(Benchmark):
    """Efficacy, paraphrase and neighbourhood of every earlier edit."""

    name = "edits"
    version: ClassVar[int] = 1

    def prepare(self, model: EditableModel, setting: Setting) -> None:
        self.requests = setting.requests
        self.engine = Engine(model)
        encoder = self.engine.encoder
        self.questions = [
            _Question(
                i,
                metric,
                encoder.pair(prompt, f" {wanted}"),
                None if other is None else encoder.pair(prompt, f" {other}"),
            )
            for i, request in enumerate(self.requests)
            for metric, prompt, wanted, other in _asked(request)
        ]
        self.own = self._own_answers()

    def _own_answers(self) -> list[tuple[int, Pair]]:
        """What the unedited model says after each neighbour's prompt, as a continuation to find again."""
        prompts = [(q.request, q.wanted.context) for q in self.questions if q.metric == "neighbourhood"]
        said = self.engine.generate_tokens([context for _, context in prompts], max_new_tokens=ANSWER_TOKENS)
        return [
            (owner, Pair(context, answer.tokens, bool(answer.tokens)))
            for (owner, context), answer in zip(prompts, said, strict=True)
        ]

    def digest(self, step: int) -> str:
        asked = self.requests[: step or len(self.requests)]
        return content_digest([self.name, self.version, ANSWER_TOKENS, [request.content() for request in asked]])

    def run(self, model: EditableModel, step: int) -> list[Sample]:
        until = step or len(self.requests)
        asked = [q for q in self.questions if q.request < until]
        own = [(owner, pair) for owner, pair in self.own if owner < until]
        pairs = [p for q in asked for p in (q.wanted, q.other) if p is not None] + [pair for _, pair in own]
        scores = iter(self.engine.token_scores(pairs))
        judged = [judgement for q in asked for judgement in _judge(q, scores)]
        judged += [(owner, "neighbourhood_own", float(next(scores).hits.all())) for owner, _ in own]
        return self._by_request(judged)

    def _by_request(self, judged: Sequence[tuple[int, str, float | None]]) -> list[Sample]:
        """One sample per request and metric: the mean over its prompts, as the papers average."""
        gathered: dict[tuple[int, str], list[float | None]] = {}
        for owner, metric, value in judged:
            gathered.setdefault((owner, metric), []).append(value)
        return [
            Sample(self.requests[owner].id, metric, _mean(values), detail={"place": owner + 1, "prompts": len(values)})
            for (owner, metric), values in gathered.items()
        ]


def _asked(request: Request) -> Iterator[tuple[str, str, str, str | None]]:
    """Metric, prompt, the answer that should be likelier, the other one."""
    yield "efficacy", request.text, request.target, request.old_target
    for prompt in request.paraphrases:
        yield "paraphrase", prompt, request.target, request.old_target
    for probe in request.neighbours:
        yield "neighbourhood", probe.prompt, probe.target, request.target


def _judge(question: _Question, scores: Iterator[TokenScores]) -> Iterator[tuple[int, str, float | None]]:
    wanted = next(scores)
    yield question.request, f"{question.metric}_argmax", float(wanted.hits.all())
    better = None
    if question.other is not None:
        gap = float(wanted.logprobs.double().mean() - next(scores).logprobs.double().mean())
        better = None if gap != gap else float(gap > 0)
    yield question.request, question.metric, better


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
