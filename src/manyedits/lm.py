"""The one scoring engine: how likely texts are to a model, and what it says.

Everything that measures a model goes through here, so that no two benchmarks can disagree about where a prompt ends.
Requests become rows of tokens, rows become trees of shared beginnings (``prefix.py``), and a tree is walked in batches
of similar length under a declared budget (``cache.py``): each shared beginning runs once, logits are computed only
where something is read, and continuations of one token that share a context are read from one forward pass. What a
``Plan`` holds depends on the items only, so a benchmark makes it once and scores it at every checkpoint.

Numbers agree with the harness's ``HFLM`` item by item (tests/test_lm.py). A dead model gives NaN, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyedits.cache import Rows, Runner, Step
from manyedits.decoding import Stopping, decode
from manyedits.encoding import Encoder, Pair, context_length
from manyedits.errors import UserError
from manyedits.prefix import Budget, Node, Placed, Read, Row, Tokens, absorb, batches, forest, shorten, unshared

VERSION = 1  # of the engine: part of a score's key, raised when a number could come out differently

# Logits of one batch hold at most this many numbers (256 MiB in 32 bit).
MOST_LOGITS = 2**26

# The cache of one batch takes about this many bytes, and holds at least and at most so many tokens. Declared, and never
# a matter of free memory: the same items make the same batches on every machine of a kind.
CACHE_BYTES = {"cpu": 2**30}
CACHE_BYTES_ELSEWHERE = 2**33
LEAST_TOKENS, MOST_TOKENS = 2048, 32768


class Model(Protocol):
    """What the engine needs of a model. ``EditableModel`` has it; ``prompt_adapter``, ``adapters`` and ``reading`` are
    used where they exist."""

    @property
    def hf(self) -> PreTrainedModel:
        """A causal language model of transformers."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""


class TokenScores(NamedTuple):
    """Per token of a continuation: log-probability, and whether it is the likeliest. NaN and false for a dead model."""

    logprobs: Tensor
    hits: Tensor

    def total(self) -> tuple[float, bool]:
        """Log-probability of the whole, and whether greedy generation would say it."""
        return float(self.logprobs.double().sum()), bool(self.hits.all())


class Generated(NamedTuple):
    """What a model said after a prompt, and how many tokens of the prompt did not fit and were left out."""

    text: str
    tokens: tuple[int, ...]
    cut: int


@dataclass(frozen=True)
class Plan:
    """Pairs ready to be scored: the rows to run, where each pair's tokens are noted, how much of each was cut off."""

    pairs: tuple[Pair, ...]
    roots: tuple[Node, ...]
    bounds: tuple[tuple[int, int], ...]
    cuts: tuple[int, ...]
    whole: bool  # rows are run whole, for adapters

    @property
    def slots(self) -> int:
        """How many tokens are judged."""
        return self.bounds[-1][1] if self.bounds else 0


class Seen(NamedTuple):
    """A batch that was run: its nodes, the logits that they asked for, and the cache that it left."""

    nodes: Sequence[Node]
    logits: Tensor
    place: Mapping[tuple[int, int], int]  # (node, position) -> row of the logits
    rows: Rows | None

    def reads(self) -> list[tuple[int, Read]]:
        """What was asked for, with the row of the logits to read it from."""
        return [(self.place[i, read.position], read) for i, node in enumerate(self.nodes) for read in node.reads]


Visit = Callable[[Seen], None]


class Engine:
    """Scores and generates. ``token_budget``: cached tokens of a batch; ``max_length``: the model's context."""

    def __init__(self, model: Model, token_budget: int | None = None, max_length: int | None = None) -> None:
        self.model = model
        self.hf = model.hf
        self.max_length = max_length or context_length(model.hf.config, model.tokenizer)
        self.token_budget = token_budget or default_budget(model.hf)
        self.truncated = 0  # requests so far that did not fit and lost tokens on the left
        self._attends = attends(model.hf)
        self._runner = Runner(model, self.max_length)

    @property
    def encoder(self) -> Encoder:
        """Text to tokens, as the model's prompt method has it now."""
        return Encoder(self.model.tokenizer, getattr(self.model, "prompt_adapter", None))

    # --- likelihoods ------------------------------------------------------------------------------------------------

    def plan(self, asked: Iterable[Pair | tuple[Sequence[int], Sequence[int]]]) -> Plan:
        """What to run for pairs of context and continuation ids; too long contexts lose tokens on the left."""
        pairs = tuple(p if isinstance(p, Pair) else Pair(tuple(p[0]), tuple(p[1])) for p in asked)
        whole = self._whole()
        rows: dict[tuple[Tokens, int], Row] = {}
        bounds, cuts, slot = [], [], 0
        for pair in pairs:
            tokens, cut = self._fitted(pair)
            first = len(tokens) - len(pair.continuation)  # the column that foretells the first token
            if pair.continuation:
                row = rows.setdefault((tokens, first if whole else 0), Row(tokens, first))
                row.reads += [Read(first + i, token, slot + i) for i, token in enumerate(pair.continuation)]
            bounds.append((slot, slot + len(pair.continuation)))
            cuts.append(cut)
            slot += len(pair.continuation)
        return Plan(pairs, tuple(self._trees(list(rows.values()), whole)), tuple(bounds), tuple(cuts), whole)

    def _fitted(self, pair: Pair) -> tuple[Tokens, int]:
        """The tokens to run for a pair, and how many had to go."""
        if len(pair.continuation) > self.max_length:
            raise UserError(
                f"A continuation of {len(pair.continuation)} tokens does not fit the model's context of "
                f"{self.max_length}.",
                "Leave the item out or use a model with a longer context.",
            )
        tokens = pair.context + pair.continuation
        cut = max(0, len(tokens) - (self.max_length + 1))
        return tokens[cut:-1], cut

    def _whole(self) -> bool:
        """Whether rows must be run whole: for adapters other than that of prompts, and states that are no attention."""
        return not self._attends or any(site != "prompt" for site in getattr(self.model, "adapters", ()))

    def _trees(self, rows: list[Row], whole: bool) -> list[Node]:
        return unshared(rows) if whole else shorten(forest(absorb(rows)), self._most_reads)

    @property
    def _most_reads(self) -> int:
        return max(1, MOST_LOGITS // int(self.hf.get_output_embeddings().weight.shape[0]))

    def score(self, plan: Plan) -> list[TokenScores]:
        """Each pair's tokens, in the plan's order."""
        if plan.whole != self._whole():
            plan = self.plan(plan.pairs)
        self.truncated += sum(cut > 0 for cut in plan.cuts)
        logprobs, hits = torch.full((plan.slots,), torch.nan), torch.zeros(plan.slots, dtype=torch.bool)

        def judge(seen: Seen) -> None:
            if not (reads := seen.reads()):
                return
            where, slots = [at for at, _ in reads], [read.slot for _, read in reads]
            target = torch.tensor([read.target for _, read in reads], device=seen.logits.device)
            values = seen.logits[where, target] - seen.logits.logsumexp(dim=-1)[where]
            found = values.isfinite()
            logprobs[slots] = values.where(found, torch.nan).cpu()
            hits[slots] = ((seen.logits.argmax(dim=-1)[where] == target) & found).cpu()

        self._walk(plan.roots, judge)
        bounds = zip(plan.pairs, plan.bounds, strict=True)
        return [self._scores(pair, logprobs[a:b], hits[a:b]) for pair, (a, b) in bounds]

    @staticmethod
    def _scores(pair: Pair, logprobs: Tensor, hits: Tensor) -> TokenScores:
        if pair.judgeable:
            return TokenScores(logprobs, hits)
        return TokenScores(torch.full((1,), torch.nan), torch.zeros(1, dtype=torch.bool))

    def token_scores(self, pairs: Iterable[Pair | tuple[Sequence[int], Sequence[int]]]) -> list[TokenScores]:
        """Log-probability and argmax match of every continuation token, for pairs of ids."""
        return self.score(self.plan(pairs))

    def loglikelihood(self, pairs: Iterable[Pair | tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For pairs of ids: log-probability of the continuation, and whether greedy generation would say it.

        An empty continuation is certain: (0.0, True).
        """
        return [scores.total() for scores in self.token_scores(pairs)]

    def loglikelihood_texts(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The same for texts, cut into tokens as the harness does; text without tokens of its own is NaN."""
        encoder = self.encoder
        return self.loglikelihood([encoder.pair(context, continuation) for context, continuation in pairs])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context; each token is foretold once."""
        encoder = self.encoder
        windows = [encoder.windows(text, self.max_length) for text in texts]
        values = iter(self.loglikelihood([window for text in windows for window in text]))
        return [sum(next(values)[0] for _ in text) for text in windows]

    def next_logprobs(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of the token after each context: (contexts, vocabulary), 32 bit, on the CPU."""
        self.truncated += sum(len(context) > self.max_length for context in contexts)
        rows = _last_reads([tuple(context[-self.max_length :]) for context in contexts])
        found: dict[int, Tensor] = {}

        def note(seen: Seen) -> None:
            logprobs = seen.logits.log_softmax(dim=-1).cpu()
            found.update({read.slot: logprobs[at] for at, read in seen.reads()})

        self._walk(self._trees(rows, self._whole()), note)
        return torch.stack([found[i] for i in range(len(contexts))])

    # --- generation -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[str], stops: Sequence[str] = (), max_new_tokens: int = 256) -> list[str]:
        """What the model says after each prompt, greedily, up to the first stop string."""
        encoder = self.encoder
        return [g.text for g in self.generate_tokens([encoder.prompt(p) for p in prompts], stops, max_new_tokens)]

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[str] = (), max_new_tokens: int = 256
    ) -> list[Generated]:
        """The same for prompts as ids; those that leave no room for the answer lose tokens on the left."""
        if not self._attends:
            raise UserError(
                f"{type(self.hf).__name__} keeps more than keys and values of what it read: it can be scored here, but "
                "not asked to write.",
                "Leave out benchmarks with generated answers.",
            )
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {self.max_length}.",
                "Set a smaller `max_new_tokens`.",
            )
        cut = [tuple(prompt[-room:]) for prompt in prompts]
        lost = [max(0, len(prompt) - room) for prompt in prompts]
        self.truncated += sum(n > 0 for n in lost)
        stopping = Stopping.of(self.encoder, self.hf, stops, max_new_tokens)
        tokens = self._continuations(cut, stopping)
        return [Generated(stopping.text(t), tuple(t), n) for t, n in zip(tokens, lost, strict=True)]

    def _continuations(self, prompts: Sequence[Tokens], stopping: Stopping) -> list[list[int]]:
        said: dict[int, list[int]] = {}

        def speak(seen: Seen) -> None:
            ending = [i for i, node in enumerate(seen.nodes) if node.reads]
            if not ending:
                return
            first = seen.logits[[seen.place[i, seen.nodes[i].stop - 1] for i in ending]]
            answers = decode(self._runner, cast(Rows, seen.rows), ending, first, stopping)
            for i, tokens in zip(ending, answers, strict=True):
                said.update({read.slot: tokens for read in seen.nodes[i].reads})

        rows = _last_reads(prompts)
        roots = unshared(rows) if self._whole() else forest(rows)
        self._walk(roots, speak, room=stopping.limit)
        return [said[i] for i in range(len(prompts))]

    # --- the walk ---------------------------------------------------------------------------------------------------

    def _walk(self, roots: Sequence[Node], visit: Visit, room: int = 0) -> None:
        """Run trees in batches, let ``visit`` read each; a batch's children go on from its cache before the next batch.

        A cache is let go as soon as the last of its children has been run.
        """
        budget = Budget(self.token_budget, self._most_reads, room)
        waiting: list[tuple[list[list[Placed]], Rows | None]] = [
            (list(batches([Placed(0, root) for root in roots], budget))[::-1], None)
        ]
        while waiting:
            left, parents = waiting.pop()
            if not left:
                continue
            batch = left.pop()
            if left:
                waiting.append((left, parents))
            below = [Placed(i, child) for i, placed in enumerate(batch) for child in placed.node.children]
            seen = self._run(parents, batch, keep=bool(below or room))
            visit(seen)
            waiting.append((list(batches(below, budget))[::-1], seen.rows))

    def _run(self, parents: Rows | None, batch: Sequence[Placed], keep: bool) -> Seen:
        nodes = [placed.node for placed in batch]
        reads = [(i, column) for i, node in enumerate(nodes) for column in node.columns()]
        ends = [node.prompt_end - node.start for node in nodes]
        step = Step([node.tokens for node in nodes], [placed.parent for placed in batch], reads, ends)
        logits, rows = self._runner.run(parents, step, keep)
        place = {(i, nodes[i].start + column): at for at, (i, column) in enumerate(reads)}
        return Seen(nodes, logits, place, rows)


def _last_reads(sequences: Sequence[Tokens]) -> list[Row]:
    """A row per distinct sequence, read at its last token; the slot is the place in the sequence of sequences."""
    rows: dict[Tokens, Row] = {}
    for i, tokens in enumerate(sequences):
        last = len(tokens) - 1
        rows.setdefault(tokens, Row(tokens, last)).reads.append(Read(last, -1, i))
    return list(rows.values())


def attends(hf: PreTrainedModel) -> bool:
    """Whether all that a model remembers of a text are keys and values, over all of it or over a sliding window."""
    kinds = set(getattr(hf.config.get_text_config(decoder=True), "layer_types", None) or ())
    return kinds <= {"full_attention", "sliding_attention"} and not getattr(hf, "_is_stateful", False)


def default_budget(hf: PreTrainedModel) -> int:
    """Cached tokens of a batch, by the size that a token takes in this model's cache."""
    config = hf.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    a_token = 2 * int(config.num_hidden_layers) * int(kept) * int(size) * hf.dtype.itemsize
    total = CACHE_BYTES.get(hf.device.type, CACHE_BYTES_ELSEWHERE)
    return min(max(total // a_token, LEAST_TOKENS), MOST_TOKENS)
