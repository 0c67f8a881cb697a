"""The search for a target vector: what should stand at the subject's token so that the model gives the new answer.

ROME (Meng et al. 2022, arXiv:2202.05262, eq. 4) and MEMIT (Meng et al. 2023, arXiv:2210.07229, eq. 16) look for a vector
``delta``, added at one layer and one token, that minimises

    mean over contexts of -log p(target) / |target|  +  kl_weight * KL(p_now || p_before)  +  weight_decay * |delta| / |v|^2

with Adam, and keep |delta| within ``clamp * |v|``, where ``v`` is what stood there before. Here the search runs for
many requests at once, and only over what changes: text before the lookup position never does, so its keys and values
are computed once; layers up to the edited one never do, so they do not run; logits are computed where the loss reads
them. A request whose loss is small enough leaves the batch. The mathematics is that of one request at a time.

PMET looks for several vectors at once, at several modules of one block; there that block runs too. A decay and a clamp
then belong to each vector, and vectors lie side by side in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from manyedits.data import Request
from manyedits.hooks import Tail, by_token, hooked_output, narrowed_head, watching
from manyedits.methods.base import Recorder, ValueParams
from manyedits.methods.search_rows import Rows, cut, entries, groups, interleave
from manyedits.model import EditableModel
from manyedits.tokens import Located, fact_rows, pad, subject_rows

#: Away from the CPU, finished requests are looked for every so many steps, since looking waits for the device.
STEPS_BETWEEN_LOOKS = 5


@dataclass(frozen=True)
class Values:
    """What a search found, a row per request. With several sites, their vectors lie side by side."""

    delta: Tensor  # (n, sites * hidden), 32 bit
    initial: Tensor  # (n, sites * hidden): what stood at the sites before
    losses: Tensor  # (n, steps, 4): total, nll, kl, weight decay before each optimiser step; NaN after the last

    @property
    def target(self) -> Tensor:
        """The vectors that should stand at the sites, (n, sites * hidden)."""
        return self.initial + self.delta


@dataclass(frozen=True)
class Place:
    """Modules of one block to whose output vectors are added.

    What is added to the MLP's output arrives as it is in the block's, so the layers after it are all that must run; vectors
    ``inside`` need the block itself.
    """

    layer: int
    sites: tuple[str, ...]
    inside: bool = False


@dataclass(frozen=True)
class Easing:
    """What PMET's release does with a request once its target is the likeliest answer in all contexts."""

    weight: float  # of the likelihood in the next step
    kl: float  # the request is finished when its KL term is at most this, nats


def find_values(
    model: EditableModel,
    requests: Sequence[Request],
    layer: int,
    site: str,
    contexts: Sequence[str],
    params: ValueParams,
    recorder: Recorder | None = None,
) -> Values:
    """Target vectors for requests at one layer; ``contexts`` hold the bare "{}" first.

    ``site`` is the path of the module whose output is the initial vector: the MLP's way out (ROME) or the block (MEMIT).
    """
    return find_values_at(model, requests, Place(layer, (site,)), contexts, params, recorder=recorder)


def find_values_at(
    model: EditableModel,
    requests: Sequence[Request],
    place: Place,
    contexts: Sequence[str],
    params: ValueParams,
    easing: Easing | None = None,
    recorder: Recorder | None = None,
) -> Values:
    """Target vectors for requests at a place, one for each of its sites."""
    found = [
        _Search(model, group, place, contexts, params, easing, recorder).run()
        for group in groups(model, requests, contexts)
    ]
    return Values(*(torch.cat([getattr(v, name) for v in found]) for name in ("delta", "initial", "losses")))


class _Search:
    """One group of requests, searched together."""

    def __init__(
        self,
        model: EditableModel,
        requests: Sequence[Request],
        place: Place,
        contexts: Sequence[str],
        params: ValueParams,
        easing: Easing | None,
        recorder: Recorder | None,
    ) -> None:
        self.model, self.place, self.params, self.easing, self.recorder = model, place, params, easing, recorder
        self.count = len(requests)
        first = place.layer if place.inside else place.layer + 1
        self.tail = Tail(model.hf, model.arch.blocks, first, model.arch.final_norm, as_tuple=model.returns_tuple())
        facts = fact_rows(model.tokenizer, requests, contexts, params.fact_token)
        essence = subject_rows(model.tokenizer, requests, params.kl_prompt, params.fact_token)
        self.rows, self.initial = self._look_once(interleave(facts, essence, len(contexts)), len(contexts))

    def run(self) -> Values:
        """Optimise until every request is finished or the steps are used up."""
        state = _Adam.start(self._step_sizes(), self.initial.shape)
        delta = torch.zeros_like(self.initial)
        weight = torch.ones(self.count, device=delta.device)
        alive = torch.ones(self.count, dtype=torch.bool, device=delta.device)
        here, rows, before = alive.nonzero().squeeze(1), self.rows, None
        losses = torch.full((self.count, self.params.steps, 4), torch.nan, device=delta.device)
        path = torch.full((self.count, self.params.steps - 1, delta.shape[1]), torch.nan) if self.recorder else None
        for step in range(self.params.steps):
            seen = self._evaluate(rows, delta[here], self.initial[here], weight[here], before)
            before = seen.scores if before is None else before
            running = alive[here]
            losses[here, step] = torch.where(running[:, None], seen.terms, torch.nan)
            if step == 0 and self.recorder is not None:
                self.recorder.add("grad_step0", seen.gradient)
            if step == self.params.steps - 1:
                break
            alive[here] = running = running & ~self._finished(seen)
            weight[here] = self._eased(seen)
            moved = state.step(here, delta[here], seen.gradient)
            if path is not None:
                path[here[running], step] = moved[running].cpu()
            delta[here] = torch.where(running[:, None], self._clamped(moved, self.initial[here]), delta[here])
            if self._looks_now(step) and not bool(running.all()):
                if not bool(running.any()):
                    break
                rows, before, here = rows.keep(running), before[running], here[running]
        if self.recorder is not None and path is not None:
            self.recorder.add("delta_steps", path)  # NaN from where a request had left
        return Values(delta, self.initial, losses)

    def _finished(self, seen: _Seen) -> Tensor:
        """Which requests need no further step, (n,)."""
        small = seen.terms[:, 0] < self.params.stop_below
        return small if self.easing is None else small | (seen.sure & (seen.terms[:, 2] <= self.easing.kl))

    def _eased(self, seen: _Seen) -> Tensor:
        """The likelihood's weight in the next step, (n,)."""
        full = torch.ones_like(seen.terms[:, 0])
        return full if self.easing is None else torch.where(seen.sure, self.easing.weight * full, full)

    def _looks_now(self, step: int) -> bool:
        return self.model.device.type == "cpu" or (step + 1) % STEPS_BETWEEN_LOOKS == 0

    def _step_sizes(self) -> Tensor:
        if self.params.step_unit == "absolute":
            return torch.full_like(self.initial, self.params.step_size)
        return (self.params.step_size * self._norms(self.initial)).expand_as(self._by_site(self.initial)).flatten(1)

    def _by_site(self, vectors: Tensor) -> Tensor:
        """(n, sites * hidden) as (n, sites, hidden)."""
        return vectors.unflatten(1, (len(self.place.sites), -1))

    def _norms(self, vectors: Tensor) -> Tensor:
        """Lengths (n, sites, 1)."""
        return self._by_site(vectors).norm(dim=2, keepdim=True)

    def _clamped(self, delta: Tensor, initial: Tensor) -> Tensor:
        """Scale deltas that are too long back to ``clamp`` times the initial vector's norm, each site by itself."""
        limit, length = self.params.clamp * self._norms(initial), self._norms(delta)
        parts = self._by_site(delta)
        return torch.where(length > limit, parts * (limit / length), parts).flatten(1)

    def _evaluate(self, rows: Rows, delta: Tensor, initial: Tensor, weight: Tensor, before: Tensor | None) -> _Seen:
        """The losses of one step, their gradient, and what the next step needs to know."""
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            at_row = torch.cat([rows.entry_row, rows.kl_row])
            at_column = torch.cat([rows.entry_column, torch.zeros_like(rows.kl_row)])
            logits = self._logits(rows, delta[rows.owner].to(rows.hidden.dtype), at_row, at_column)
            scores = torch.log_softmax(logits.float(), dim=1)
            chosen = scores[torch.arange(len(rows.entry_row), device=scores.device), rows.entry_token]
            now = scores[len(rows.entry_row) :]
            terms = self._terms(rows, chosen, now, delta, initial, weight, before)
            (gradient,) = torch.autograd.grad(terms[:, 0].sum(), delta)
        return _Seen(terms.detach(), gradient, now.detach(), self._sure(rows, scores, chosen, len(delta)))

    def _logits(self, rows: Rows, shift: Tensor, at_row: Tensor, at_column: Tensor) -> Tensor:
        """Logits (reads, vocabulary) with ``shift`` (rows, sites * hidden) added where the fact is looked up."""
        hidden = rows.hidden
        with ExitStack() as stack:
            if self.place.inside:
                parts = shift.chunk(len(self.place.sites), dim=1)
                for site, part in zip(self.place.sites, parts, strict=True):
                    module = self.model.hf.get_submodule(site)
                    stack.enter_context(hooked_output(module, partial(_shifted, shift=part)))
            else:
                hidden = _shifted(hidden, shift)
            return self.tail(hidden, rows.mask, rows.positions, rows.cache, at_row, at_column)

    def _terms(
        self,
        rows: Rows,
        chosen: Tensor,
        now: Tensor,
        delta: Tensor,
        initial: Tensor,
        weight: Tensor,
        before: Tensor | None,
    ) -> Tensor:
        """(n, 4): total, nll, kl, weight decay, from the log-probabilities of the targets and at the KL rows."""
        likelihood = torch.zeros(len(delta), device=delta.device)
        nll = weight * likelihood.index_add(0, rows.owner[rows.entry_row], -chosen * rows.entry_weight)
        before = now.detach() if before is None else before
        kl = self.params.kl_weight * (now.exp() * (now - before)).sum(dim=1)
        # The norm's gradient at zero is taken as zero, as the reference's is.
        decay = self.params.weight_decay * (self._norms(delta) / self._norms(initial) ** 2).sum(dim=(1, 2))
        return torch.stack([nll + kl + decay, nll, kl, decay], dim=1)

    def _sure(self, rows: Rows, scores: Tensor, chosen: Tensor, count: int) -> Tensor:
        """For which requests (n,) every target token is the likeliest where it is read; none where nobody asks."""
        if self.easing is None:
            return torch.zeros(count, dtype=torch.bool, device=scores.device)
        better = scores[: len(rows.entry_row)].max(dim=1).values > chosen
        missed = torch.zeros(count, device=scores.device).index_add(0, rows.owner[rows.entry_row], better.float())
        return missed == 0

    def _look_once(self, facts: Located, contexts: int) -> tuple[Rows, Tensor]:
        """The one full forward: hidden states where the tail starts, the sites' outputs, keys and values of prefixes."""
        device, group = self.model.device, contexts + 1
        batch = pad(facts.rows, self.model.tokenizer)
        lookup = torch.tensor(facts.lookup, device=device)
        seen = self._capture(batch.ids.to(device), batch.mask.to(device), lookup)
        bare = torch.arange(0, len(facts.rows), group, device=device)
        rows = cut(seen, batch.mask.to(device), lookup)
        owner = torch.arange(self.count, device=device).repeat_interleave(group)
        initial = torch.cat([seen[site][bare] for site in self.place.sites], dim=1)
        return Rows(*rows, owner, *entries(facts, contexts, device), bare + contexts), initial.float()

    def _capture(self, ids: Tensor, mask: Tensor, lookup: Tensor) -> dict[str, Any]:
        """The sites' outputs at the lookup positions, what enters the tail, and the cache, of whole texts."""
        seen: dict[str, Any] = {}
        row = torch.arange(len(ids), device=ids.device)
        hf, block = self.model.hf, self.model.hf.get_submodule(self.model.block(self.place.layer))

        def see(name: str, out: Tensor) -> None:
            seen[name] = out if name == "entry" else by_token(out, len(ids))[row, lookup]

        with torch.no_grad(), narrowed_head(hf, row[:1], row[:1]), ExitStack() as stack:
            stack.enter_context(watching(block, "in" if self.place.inside else "out", partial(see, "entry")))
            for site in self.place.sites:
                stack.enter_context(watching(hf.get_submodule(site), "out", partial(see, site)))
            seen["cache"] = DynamicCache()
            hf(input_ids=ids, attention_mask=mask, past_key_values=seen["cache"], use_cache=True)
        return seen


def _shifted(out: Tensor, shift: Tensor) -> Tensor:
    """Activations with ``shift`` (rows, features) added at each row's first token, in the shape they came in."""
    tokens = by_token(out, len(shift))
    return torch.cat([tokens[:, :1] + shift[:, None], tokens[:, 1:]], dim=1).reshape(out.shape)


@dataclass(frozen=True)
class _Seen:
    """One evaluation of the loss of the requests that are still here."""

    terms: Tensor  # (n, 4)
    gradient: Tensor  # (n, sites * hidden)
    scores: Tensor  # (n, vocabulary): log-probabilities at the KL rows
    sure: Tensor  # (n,): whether the target is the likeliest answer in all contexts


@dataclass
class _Adam:
    """Adam (Kingma & Ba 2015) over rows that may leave: moments are kept for all, moved for those still here."""

    sizes: Tensor
    mean: Tensor
    square: Tensor
    count: int = 0
    decay: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    @classmethod
    def start(cls, sizes: Tensor, shape: torch.Size) -> _Adam:
        return cls(sizes, torch.zeros(shape, device=sizes.device), torch.zeros(shape, device=sizes.device))

    def step(self, here: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The rows ``here`` after one step."""
        self.count += 1
        first, second = self.decay
        self.mean[here] = self.mean[here].lerp(gradient, 1 - first)
        self.square[here] = self.square[here] * second + (1 - second) * gradient * gradient
        scale = self.sizes[here] / (1 - first**self.count)
        spread = (self.square[here].sqrt() / (1 - second**self.count) ** 0.5) + self.epsilon
        return value - scale * self.mean[here] / spread
