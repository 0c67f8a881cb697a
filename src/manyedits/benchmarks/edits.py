"""Did the edits take, are they still there, and what did they disturb next to them.

At every checkpoint *every earlier edit* is asked again, so that forgetting is seen and not only success at the moment of
editing. At step 0 all requests of the run are asked, as the baseline. Figures come in forms that are often mixed up and
are named apart here:

* by probability (``efficacy``): which of two answers is likelier, as mean log-probability per token (ROME and MEMIT);
  ``_difference`` is the difference of the two, as probabilities;
* by argmax (``efficacy_argmax``): whether every token of the answer is the likeliest, earlier ones given (EasyEdit);
* by generation (``efficacy_said``, ``efficacy_contained``): what the model says by itself begins with the answer, or
  holds it.

Neighbourhood is reported in both published forms: the true answer likelier than the new one (MEMIT), and the answer
equal to the unedited model's own (EasyEdit).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from manyedits.benchmarks.base import Benchmark, Sample, Setting, content_digest
from manyedits.benchmarks.text import contained, exact, ngram_entropy
from manyedits.data import Request
from manyedits.encoding import Pair
from manyedits.lm import Engine, Generated, TokenScores
from manyedits.model import EditableModel

#: How many tokens of the unedited model's own answer a neighbour must keep.
OWN_TOKENS = 3
#: How many tokens more than the answer has are generated before it is looked for.
SPARE_TOKENS = 8
#: Free texts: their length in tokens, and of how many requests, spread over the sequence.
FREE_TOKENS, FREE_REQUESTS = 40, 30

Judgement = tuple[int, str, float | None]  # request, metric, value


@dataclass(frozen=True)
class _Question:
    """One prompt about one request: ``wanted`` should be likelier than ``other``, where the request names another."""

    request: int
    metric: str
    wanted: Pair
    other: Pair | None


class Edits(Benchmark):
    """Efficacy, paraphrase, neighbourhood, attributes and fluency of every earlier edit."""

    name = "edits"
    version: ClassVar[int] = 2

    def prepare(self, model: EditableModel, setting: Setting) -> None:
        self.requests = setting.requests
        engine = Engine(model)
        encoder = engine.encoder
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
        self.own = self._own_answers(engine)

    def _own_answers(self, engine: Engine) -> list[tuple[int, Pair]]:
        """What the unedited model says after each neighbour's prompt, as a continuation to find again."""
        asked = [(q.request, q.wanted.context) for q in self.questions if q.metric == "neighbourhood"]
        said = engine.generate_tokens([context for _, context in asked], max_new_tokens=OWN_TOKENS)
        return [
            (owner, Pair(context, answer.tokens, bool(answer.tokens)))
            for (owner, context), answer in zip(asked, said, strict=True)
        ]

    def digest(self, step: int) -> str:
        asked = [request.content() for request in self.requests[: step or len(self.requests)]]
        return content_digest([self.name, self.version, OWN_TOKENS, SPARE_TOKENS, FREE_TOKENS, FREE_REQUESTS, asked])

    def run(self, model: EditableModel, step: int) -> list[Sample]:
        until, engine = step or len(self.requests), Engine(model)
        judged = [*self._likelihoods(engine, until), *self._answers(engine, until)]
        return [*self._by_request(judged), *self._free_texts(engine, until)]

    def _likelihoods(self, engine: Engine, until: int) -> Iterator[Judgement]:
        asked = [q for q in self.questions if q.request < until]
        own = [(owner, pair) for owner, pair in self.own if owner < until]
        pairs = [p for q in asked for p in (q.wanted, q.other) if p is not None] + [pair for _, pair in own]
        scores = iter(engine.token_scores(_again(engine, pairs)))
        for question in asked:
            yield from _judge(question, scores)
        for (owner, _), found in zip(own, scores, strict=True):
            yield owner, "neighbourhood_own", _all_hit(found)

    def _answers(self, engine: Engine, until: int) -> Iterator[Judgement]:
        """What the model says by itself after the prompts of the fact and of its paraphrases."""
        asked = [q for q in self.questions if q.request < until and q.metric in ("efficacy", "paraphrase")]
        limit = max(len(q.wanted.continuation) for q in asked) + SPARE_TOKENS
        said = engine.generate_tokens([q.wanted.context for q in asked], max_new_tokens=limit)
        for question, answer in zip(asked, said, strict=True):
            target = self.requests[question.request].target
            yield question.request, f"{question.metric}_said", float(exact(answer.text, target))
            yield question.request, f"{question.metric}_contained", float(contained(answer.text, target))

    def _free_texts(self, engine: Engine, until: int) -> list[Sample]:
        """Entropy of what the model writes about subjects of edits spread over the sequence."""
        able = [i for i in range(until) if self.requests[i].generation]
        chosen = (
            [able[i * len(able) // FREE_REQUESTS] for i in range(FREE_REQUESTS)] if len(able) > FREE_REQUESTS else able
        )
        prompts = [engine.encoder.prompt(self.requests[i].generation[0]) for i in chosen]
        texts = engine.generate_tokens(prompts, max_new_tokens=FREE_TOKENS)
        return [_entropy_sample(self.requests[i], i, text) for i, text in zip(chosen, texts, strict=True)]

    def _by_request(self, judged: Sequence[Judgement]) -> list[Sample]:
        """One sample per request and metric: the mean over its prompts, as the papers average."""
        gathered: dict[tuple[int, str], list[float | None]] = {}
        for owner, metric, value in judged:
            gathered.setdefault((owner, metric), []).append(value)
        return [
            Sample(self.requests[owner].id, metric, _mean(values), detail={"place": owner + 1, "prompts": len(values)})
            for (owner, metric), values in gathered.items()
        ]


def _again(engine: Engine, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the context that a prompt method makes of it, where there is one."""
    adapter = engine.encoder.prompt_adapter
    if adapter is None:
        return list(pairs)
    return [pair._replace(context=engine.encoder.prompt(engine.encoder.decoded(list(pair.context)))) for pair in pairs]


def _asked(request: Request) -> Iterator[tuple[str, str, str, str | None]]:
    """Metric, prompt, the answer that should be likelier, the other one."""
    yield "efficacy", request.text, request.target, request.old_target
    for prompt in request.paraphrases:
        yield "paraphrase", prompt, request.target, request.old_target
    for probe in request.neighbours:
        yield "neighbourhood", probe.prompt, probe.target, request.target
    for probe in request.attributes:
        yield "attribute", probe.prompt, probe.target, request.old_target
    for probe in request.portability:
        yield "portability", probe.prompt, probe.target, None


def _judge(question: _Question, scores: Iterator[TokenScores]) -> Iterator[Judgement]:
    wanted = next(scores)
    yield question.request, f"{question.metric}_argmax", _all_hit(wanted)
    if question.other is None:
        yield question.request, question.metric, None
        return
    likely, other = _per_token(wanted), _per_token(next(scores))
    known = likely is not None and other is not None
    yield question.request, question.metric, float(likely > other) if known else None  # type: ignore[operator]
    yield question.request, f"{question.metric}_difference", _exp(likely) - _exp(other) if known else None


def _all_hit(scores: TokenScores) -> float | None:
    """Whether every token is the likeliest; None where the model gave no numbers."""
    return float(scores.hits.all()) if bool(scores.logprobs.isfinite().all()) else None


def _per_token(scores: TokenScores) -> float | None:
    mean = float(scores.logprobs.double().mean())
    return mean if mean == mean else None


def _exp(value: float | None) -> float:
    from math import exp

    return exp(value or 0.0)


def _entropy_sample(request: Request, place: int, said: Generated) -> Sample:
    flags = () if said.text.strip() else ("empty",)
    detail = {"place": place + 1, "prompt": request.generation[0], "text": said.text}
    return Sample(request.id, "ngram_entropy", ngram_entropy(said.text), flags, detail)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
