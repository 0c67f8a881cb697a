"""The search for a target vector: what should stand at the subject's token so that the model gives the new answer.

ROME (Meng et al. 2022, arXiv:2202.05262, eq. 4) and MEMIT (Meng et al. 2023, arXiv:2210.07229, eq. 16) look for a vector
``delta``, added at one layer and one token, that minimises

    mean over contexts of -log p(target) / |target|  +  kl_weight * KL(p_now || p_before)  +  weight_decay * |delta| / |v|^2

with Adam, and keep |delta| within ``clamp * |v|``, where ``v`` is what stood there before. Here the search runs for
many requests at once, and only over what changes: text before the lookup position never does, so its keys and values
are computed once; layers up to the edited one never do, so they do not run; logits are computed where the loss reads
them. A request whose loss is small enough leaves the batch. The mathematics is that of one request at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from manyedits.data import Request
from manyedits.hooks import Tail, by_token, hooked_output, narrowed_head, select_cache
from manyedits.methods.base import Recorder, ValueParams
from manyedits.model import EditableModel
from manyedits.tokens import Located, fact_rows, pad, subject_rows

#: Tokens that one search holds at once; requests are cut into groups by it, so groups depend on the requests alone.
TOKENS_AT_ONCE = 16_384

#: Away from the CPU, finished requests are looked for every so many steps, since looking waits for the device.
STEPS_BETWEEN_LOOKS = 5


@dataclass(frozen=True)
class Values:
    """What a search found, a row per request."""

    delta: Tensor  # (n, hidden), 32 bit
    initial: Tensor  # (n, hidden): what stood at the site before
    losses: Tensor  # (n, steps, 4): total, nll, kl, weight decay before each optimiser step; NaN after the last

    @property
    def target(self) -> Tensor:
        """The vectors that should stand at the site, (n, hidden)."""
        return self.initial + self.delta


def find_values(
    model: EditableModel,
    requests: Sequence[Request],
    layer: int,
    site: str,
    contexts: Sequence[str],
    params: ValueParams,
    recorder: Recorder | None = None,
) -> Values:
    """Target vectors for requests at one layer.

    ``site`` is the path of the module whose output is the initial vector: the MLP's way out (ROME) or the block (MEMIT).
    Since the MLP's output is added to the stream, what is added to either is added to the block's output, and the
    layers from ``layer + 1`` on are all that runs. ``contexts`` hold the bare "{}" first.
    """
    found = [
        _Search(model, group, layer, site, contexts, params, recorder).run()
        for group in _groups(model, requests, contexts)
    ]
    return Values(*(torch.cat([getattr(v, name) for v in found]) for name in ("delta", "initial", "losses")))


def _groups(model: EditableModel, requests: Sequence[Request], contexts: Sequence[str]) -> Iterator[list[Request]]:
    """Cut requests into groups that hold at most TOKENS_AT_ONCE tokens, never fewer than one request."""
    prefix = sum(len(model.tokenizer(c)["input_ids"]) for c in contexts)
    group: list[Request] = []
    held = 0
    for request in requests:
        own = len(model.tokenizer(f"{request.text} {request.target}")["input_ids"])
        tokens = prefix + own * (len(contexts) + 1)
        if group and held + tokens > TOKENS_AT_ONCE:
            yield group
            group, held = [], 0
        group.append(request)
        held += tokens
    if group:
        yield group


@dataclass
class _Rows:
    """The part of a batch that a step runs: hidden states from the lookup position on, and where the loss reads.

    Rows of one request stand together: its contexts, then its KL row. ``owner`` (rows,) is the request's place in the
    group; ``entry_*`` describe one read logit each: its row, column, request, token and weight.
    """

    hidden: Tensor  # (rows, columns, hidden)
    mask: Tensor  # (rows, cached + columns)
    positions: Tensor  # (rows, columns)
    cache: DynamicCache | None
    owner: Tensor
    entry_row: Tensor
    entry_column: Tensor
    entry_token: Tensor
    entry_weight: Tensor
    kl_row: Tensor  # (requests,)

    def keep(self, alive: Tensor) -> _Rows:
        """The rows of some requests; ``alive`` (requests,) is true for those that stay."""
        stay = alive[self.owner]
        rows = stay.nonzero().squeeze(1)
        new_row = torch.cumsum(stay.long(), 0) - 1
        new_owner = torch.cumsum(alive.long(), 0) - 1
        entries = stay[self.entry_row]
        return _Rows(
            self.hidden[rows],
            self.mask[rows],
            self.positions[rows],
            None if self.cache is None else select_cache(self.cache, rows),
            new_owner[self.owner[rows]],
            new_row[self.entry_row[entries]],
            self.entry_column[entries],
            self.entry_token[entries],
            self.entry_weight[entries],
            new_row[self.kl_row[alive]],
        )


class _Search:
    """One group of requests, searched together."""

    def __init__(
        self,
        model: EditableModel,
        requests: Sequence[Request],
        layer: int,
        site: str,
        contexts: Sequence[str],
        params: ValueParams,
        recorder: Recorder | None,
    ) -> None:
        self.model, self.params, self.recorder = model, params, recorder
        self.count = len(requests)
        self.tail = Tail(model.hf, model.arch.blocks, layer + 1, model.arch.final_norm, as_tuple=model.returns_tuple())
        facts = fact_rows(model.tokenizer, requests, contexts, params.fact_token)
        essence = subject_rows(model.tokenizer, requests, params.kl_prompt, params.fact_token)
        self.rows, self.initial = self._look_once(
            _interleave(facts, essence, len(contexts)), len(contexts), layer, site
        )

    def run(self) -> Values:
        """Optimise until every request is finished or the steps are used up."""
        state = _Adam.start(self._step_sizes(), self.initial.shape)
        delta = torch.zeros_like(self.initial)
        alive = torch.ones(self.count, dtype=torch.bool, device=delta.device)
        here, rows, before = alive.nonzero().squeeze(1), self.rows, None
        losses = torch.full((self.count, self.params.steps, 4), torch.nan, device=delta.device)
        path = torch.full((self.count, self.params.steps - 1, delta.shape[1]), torch.nan) if self.recorder else None
        for step in range(self.params.steps):
            terms, gradient, after = self._evaluate(rows, delta[here], self.initial[here], before)
            before = after if before is None else before
            running = alive[here]
            losses[here, step] = torch.where(running[:, None], terms, torch.nan)
            if step == 0 and self.recorder is not None:
                self.recorder.add("grad_step0", gradient)
            if step == self.params.steps - 1:
                break
            alive[here] = running = running & (terms[:, 0] >= self.params.stop_below)
            moved = state.step(here, delta[here], gradient)
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

    def _looks_now(self, step: int) -> bool:
        return self.model.device.type == "cpu" or (step + 1) % STEPS_BETWEEN_LOOKS == 0

    def _step_sizes(self) -> Tensor:
        if self.params.step_unit == "absolute":
            return torch.full((self.count, 1), self.params.step_size, device=self.initial.device)
        return self.params.step_size * self.initial.norm(dim=1, keepdim=True)

    def _clamped(self, delta: Tensor, initial: Tensor) -> Tensor:
        """Scale a delta that is too long back to ``clamp`` times the initial vector's norm."""
        limit = self.params.clamp * initial.norm(dim=1, keepdim=True)
        length = delta.norm(dim=1, keepdim=True)
        return torch.where(length > limit, delta * (limit / length), delta)

    def _evaluate(
        self, rows: _Rows, delta: Tensor, initial: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss terms (n, 4), the gradient (n, hidden), and log-probabilities (n, vocabulary) at the KL rows."""
        delta = delta.detach().requires_grad_(True)
        with torch.enable_grad():
            first = rows.hidden[:, :1] + delta[rows.owner, None].to(rows.hidden.dtype)
            hidden = torch.cat([first, rows.hidden[:, 1:]], dim=1)
            at_row = torch.cat([rows.entry_row, rows.kl_row])
            at_column = torch.cat([rows.entry_column, torch.zeros_like(rows.kl_row)])
            logits = self.tail(hidden, rows.mask, rows.positions, rows.cache, at_row, at_column)
            scores = torch.log_softmax(logits.float(), dim=1)
            terms = self._terms(rows, scores, delta, initial, before)
            (gradient,) = torch.autograd.grad(terms[:, 0].sum(), delta)
        return terms.detach(), gradient, scores[len(rows.entry_row) :].detach()

    def _terms(self, rows: _Rows, scores: Tensor, delta: Tensor, initial: Tensor, before: Tensor | None) -> Tensor:
        entries = len(rows.entry_row)
        chosen = scores[torch.arange(entries, device=scores.device), rows.entry_token] * rows.entry_weight
        nll = torch.zeros(len(delta), device=delta.device).index_add(0, rows.owner[rows.entry_row], -chosen)
        now = scores[entries:]
        before = now.detach() if before is None else before
        kl = self.params.kl_weight * (now.exp() * (now - before)).sum(dim=1)
        # The norm's gradient at zero is taken as zero, as the reference's is.
        decay = self.params.weight_decay * delta.norm(dim=1) / initial.norm(dim=1) ** 2
        return torch.stack([nll + kl + decay, nll, kl, decay], dim=1)

    def _look_once(self, facts: Located, contexts: int, layer: int, site: str) -> tuple[_Rows, Tensor]:
        """The one full forward: hidden states after the layer, the site's output, keys and values of the prefixes."""
        device, group = self.model.device, contexts + 1
        batch = pad(facts.rows, self.model.tokenizer)
        lookup = torch.tensor(facts.lookup, device=device)
        seen = self._capture(batch.ids.to(device), batch.mask.to(device), self.model.block(layer), site, lookup)
        bare = torch.arange(0, len(facts.rows), group, device=device)
        rows = _cut(seen, batch.mask.to(device), lookup)
        owner = torch.arange(self.count, device=device).repeat_interleave(group)
        entries = _entries(facts, contexts, device)
        return _Rows(*rows, owner, *entries, bare + contexts), seen["site"][bare].float()

    def _capture(self, ids: Tensor, mask: Tensor, block: str, site: str, lookup: Tensor) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        row = torch.arange(len(ids), device=ids.device)

        def at_lookup(out: Tensor) -> Tensor:
            seen["site"] = by_token(out, len(ids))[row, lookup]
            return out

        def whole(out: Tensor) -> Tensor:
            seen["block"] = out
            return out

        hf = self.model.hf
        with (
            torch.no_grad(),
            hooked_output(hf.get_submodule(block), whole),
            hooked_output(hf.get_submodule(site), at_lookup),
            narrowed_head(hf, row[:1], row[:1]),
        ):
            cache = DynamicCache()
            hf(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        seen["cache"] = cache
        return seen


def _interleave(facts: Located, essence: Located, contexts: int) -> Located:
    """One request after another: its context rows, then its KL row."""
    merged = Located([], [], [], [])
    for i in range(len(essence.rows)):
        for source, part in ((facts, slice(i * contexts, (i + 1) * contexts)), (essence, slice(i, i + 1))):
            merged.rows.extend(source.rows[part])
            merged.lookup.extend(source.lookup[part])
            merged.target_ids.extend(source.target_ids[part])
            merged.logits_at.extend(source.logits_at[part])
    return merged


def _cut(seen: dict[str, Any], mask: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor, Tensor, DynamicCache | None]:
    """Hidden states from each row's lookup position on, with mask, positions and the cache of what stands before.

    The cache keeps its columns; those at and after a row's own lookup position are masked, a hole between its prefix
    and its suffix.
    """
    hidden = seen["block"]
    before = int(lookup.max())
    longest = int((mask.sum(dim=1) - lookup).max())
    columns = torch.arange(longest, device=mask.device)
    positions = (lookup[:, None] + columns).clamp(max=mask.shape[1] - 1)
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    real = mask[rows, positions] * (lookup[:, None] + columns < mask.shape[1])
    prefix = (torch.arange(before, device=mask.device) < lookup[:, None]).to(mask.dtype)
    cache = select_cache(seen["cache"], columns=before) if before else None
    return hidden[rows, positions], torch.cat([prefix, real], dim=1), positions, cache


def _entries(facts: Located, contexts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column counted from the lookup position, token and weight of every logit that the likelihood reads."""
    listed = [
        (row, column - facts.lookup[row], token, 1.0 / (len(tokens) * contexts))
        for row, tokens in enumerate(facts.target_ids)
        for column, token in zip(facts.logits_at[row], tokens, strict=True)
    ]
    row, column, token, weight = zip(*listed, strict=True)
    at_row, at_column, wanted = (torch.tensor(part, device=device) for part in (row, column, token))
    return at_row, at_column, wanted, torch.tensor(weight, device=device)


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
