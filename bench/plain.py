"""The value search of ROME and MEMIT in its plainest form: the oracle of the fast one.

Written from the papers' equations on a bare Hugging Face model, one request at a time: every step runs every layer over
every token of every row and makes all the logits. It shares no code with the package on purpose, so that the two can
only agree by both being right; it is also what the speed of the fast form is measured against.

The objective, for a vector `delta` added to a module's output at one token of every row (Meng et al. 2022, eq. 4)::

    mean over rows of -log p(target | row) / tokens of the target
    + kl_factor * KL(p_now || p_before)   at that token of the row "{subject} is a"
    + decay * |delta| / |start|^2         start: the module's output for the bare prompt
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

KL_PROMPT = "{} is a"
IGNORED = -100


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its parts; `{}` stands for the layer."""

    block: str
    mlp: str
    mlp_out: str


GPT2 = Names("transformer.h.{}", "transformer.h.{}.mlp", "transformer.h.{}.mlp.c_proj")
LLAMA = Names("model.layers.{}", "model.layers.{}.mlp", "model.layers.{}.mlp.down_proj")


@dataclass(frozen=True)
class Fact:
    """What shall be written: `prompt` holds one "{}" for the subject, `target` has no leading space."""

    prompt: str
    subject: str
    target: str


@dataclass(frozen=True)
class Options:
    """Of the search. `where` names the token: subject_last, subject_first, subject_first_after_last or last."""

    where: str = "subject_last"
    steps: int = 20
    step_size: float = 0.5
    decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    enough: float = 0.05


@dataclass(frozen=True)
class Rows:
    """The padded batch of one request: a row per context, and the row of the KL term last."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Search:
    """What the search found. `losses` has a row per evaluation: total, nll, kl, decay, before that step's update."""

    losses: Tensor
    grad_step0: Tensor
    delta_steps: Tensor
    start: Tensor
    target: Tensor


def in_context(fact: Fact, context: str) -> tuple[str, int, int]:
    """The text of the prompt inside a context, and the characters at which its subject starts and ends."""
    before, _, after = context.partition("{}")
    head, _, tail = fact.prompt.partition("{}")
    start = len(before) + len(head)
    return before + head + fact.subject + tail + after, start, start + len(fact.subject)


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text with what the tokenizer puts in front of it, and the characters each one covers."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    return encoding["input_ids"], [(int(start), int(end)) for start, end in encoding["offset_mapping"]]


def position(offsets: Sequence[tuple[int, int]], start: int, end: int, where: str) -> int:
    """The token at which the fact is edited. A token may carry the space in front of its word."""
    real = [index for index, (left, right) in enumerate(offsets) if right > left]
    subject = [index for index in real if offsets[index][1] > start and offsets[index][0] < end]
    after = [index for index in real if offsets[index][0] >= end]
    choice = {"subject_first": subject[0], "subject_last": subject[-1], "last": real[-1]}
    choice["subject_first_after_last"] = after[0] if after else subject[-1]
    return choice[where]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of unequal length as one tensor, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def target_ids(tokenizer: Any, text: str, target: str) -> list[int]:
    """The ids of the target as it stands after a text: what one more space and the target add to the text's own ids."""
    before = list(tokenizer(text)["input_ids"])
    whole = list(tokenizer(f"{text} {target}")["input_ids"])
    if whole[: len(before)] != before:
        raise ValueError(f"the tokens of {text!r} change when {target!r} follows")
    return whole[len(before) :]


def make_rows(tokenizer: Any, fact: Fact, contexts: Sequence[str], where: str) -> Rows:
    """Every context followed by all of the target but its last token, then the KL row."""
    ids, labels, positions = [], [], []
    for context in contexts:
        text, start, end = in_context(fact, context)
        tokens, offsets = encode(tokenizer, text)
        wanted = target_ids(tokenizer, text, fact.target)
        positions.append(position(offsets, start, end, where))
        ids.append(tokens + wanted[:-1])
        labels.append([IGNORED] * (len(tokens) - 1) + wanted)
    text, start, end = in_context(Fact(KL_PROMPT, fact.subject, fact.target), "{}")
    tokens, offsets = encode(tokenizer, text)
    positions.append(position(offsets, start, end, where))
    ids.append(tokens)
    labels.append([IGNORED] * len(tokens))
    mask = pad([[1] * len(row) for row in ids], 0)
    return Rows(pad(ids, 0), mask, pad(labels, IGNORED), torch.tensor(positions))


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """Runs `hook(module, args, output)` while the body runs."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def tensor_of(output: Any) -> Tensor:
    """The hidden states in what a module returned: some blocks return them inside a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def forward_with(model: PreTrainedModel, module: nn.Module, rows: Rows, delta: Tensor) -> tuple[Tensor, Tensor]:
    """All logits with `delta` added to the module's output, and that output before, both over all rows and tokens."""
    index = torch.arange(len(rows.ids)), rows.positions
    seen: list[Tensor] = []

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        given = tensor_of(output)
        # Some families run their MLP over rows and tokens laid end to end.
        hidden = given.reshape(*rows.ids.shape, given.shape[-1])
        seen.append(hidden.detach().clone())
        changed = hidden.index_put(index, hidden[index] + delta).reshape(given.shape)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    with hooked(module, add):
        logits = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits
    return logits, seen[0]


def likelihood_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the target per token of it, averaged over the rows that have one."""
    chosen = labels != IGNORED
    picked = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    per_row = -(picked * chosen).sum(1)[:-1] / chosen.sum(1)[:-1]
    return per_row.mean()


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(now || before) of two vectors of log-probabilities."""
    return (now.exp() * (now - before)).sum()


@dataclass
class Objective:
    """The loss as a function of `delta`. What it compares with, it reads at its first evaluation, where delta is 0."""

    model: PreTrainedModel
    module: nn.Module
    rows: Rows
    options: Options
    before: Tensor = field(default_factory=lambda: torch.empty(0))
    start: Tensor = field(default_factory=lambda: torch.empty(0))

    def terms(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Total, nll, kl times its factor, decay."""
        rows, options = self.rows, self.options
        logits, output = forward_with(self.model, self.module, rows, delta)
        now = torch.log_softmax(logits[-1, rows.positions[-1]], -1)
        if not len(self.start):
            self.before, self.start = now.detach().clone(), output[0, rows.positions[0]]
        nll = likelihood_loss(logits, rows.labels)
        kl = options.kl_factor * divergence(now, self.before)
        decay = options.decay * delta.norm() / self.start.norm() ** 2
        return nll + kl + decay, nll, kl, decay


def search_value(model: PreTrainedModel, module_name: str, rows: Rows, options: Options) -> Search:
    """Adam on `delta`, scaled back into a ball after each step; stops when the loss is small enough."""
    objective = Objective(model, model.get_submodule(module_name), rows, options)
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=options.step_size)
    losses, gradients, steps = [], [], []
    for step in range(options.steps):
        terms = objective.terms(delta)
        losses.append([term.item() for term in terms])
        if losses[-1][0] < options.enough or step == options.steps - 1:
            break
        gradients.append(torch.autograd.grad(terms[0], delta)[0])
        delta.grad = gradients[-1]
        optimizer.step()
        steps.append(delta.detach().clone())
        clamp(delta, options.clamp * objective.start.norm().item())
    return found(losses, gradients, steps, objective.start, delta.detach())


def found(
    losses: list[list[float]], gradients: list[Tensor], steps: list[Tensor], start: Tensor, delta: Tensor
) -> Search:
    """What the search saw, as tensors; without a single step the gradient and the steps are empty."""
    none = delta.new_empty(0, len(delta))
    first = gradients[0] if gradients else delta.new_empty(0)
    kept = torch.stack(steps) if steps else none
    return Search(torch.tensor(losses, dtype=torch.float64), first, kept, start, start + delta)


def clamp(delta: Tensor, radius: float) -> None:
    """Scales `delta` back to `radius` where it is longer; the optimiser's own state stays."""
    with torch.no_grad():
        norm = delta.norm().item()
        if norm > radius:
            delta *= radius / norm
