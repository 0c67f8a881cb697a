"""What the harness asks: prompts and continuations, rendered once per run, for a drawn part of a task's items.

The harness's own ``Task`` writes the prompts, so that figures compare with everybody else's; the loop over its items is
ours, so that they are rendered once and not at every checkpoint, and so that nothing is ever taken from its caches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from manyedits.encoding import Encoder
from manyedits.errors import UserError

# Answers are strata of a draw only if there are no more of them than this: letters yes, numbers no.
MOST_STRATA = 10

# The harness's own default, where a task names no limit of its answers.
DEFAULT_NEW_TOKENS = 256

Chat = Callable[..., str]


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated."""

    stops: tuple[str, ...]
    limit: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], cap: int | None = None) -> Decoding:
        """A task's ``generation_kwargs``, with our cap on the length. Always greedy: a figure must be repeatable."""
        known = normalize_gen_kwargs(dict(settings), DEFAULT_NEW_TOKENS)
        limit = int(known["max_gen_toks"])
        return cls(tuple(known["until"]), limit if cap is None else min(limit, cap))


@dataclass
class Item:
    """One document of a task and the requests that it becomes."""

    task: str
    doc_id: int
    instances: list[Instance] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Names the item in samples."""
        return f"{self.task}/{self.doc_id}"

    @property
    def doc(self) -> Any:
        """The document itself."""
        return self.instances[0].doc


# --- which items ----------------------------------------------------------------------------------------------------


def drawn(tasks: Mapping[str, Task], limit: int | None, seed: int) -> dict[str, list[int]]:
    """The documents of each task that are asked: all, or ``limit`` of them over all tasks, each in proportion."""
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    if limit is None or limit >= sum(sizes.values()):
        return {name: list(range(size)) for name, size in sizes.items()}
    shares = apportioned(sizes, limit)
    return {name: _stratified(tasks[name], share, random.Random(f"{seed}:{name}")) for name, share in shares.items()}


def apportioned(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` shared out in proportion to sizes, by largest remainder; parts that would get none are left out."""
    whole = sum(sizes.values())
    exact = {name: size * total / whole for name, size in sizes.items()}
    shares = {name: int(value) for name, value in exact.items()}
    rest = total - sum(shares.values())
    for name in sorted(exact, key=lambda n: (shares[n] - exact[n], n))[:rest]:
        shares[name] += 1
    return {name: share for name, share in shares.items() if share}


def _stratified(task: Task, count: int, draw: random.Random) -> list[int]:
    """Documents with the answers in the proportions of the whole task, where there are few different answers."""
    docs = task.eval_docs
    targets = [str(task.doc_to_target(docs[i])) for i in range(len(docs))]
    if len(set(targets)) > MOST_STRATA:
        targets = [""] * len(docs)
    strata: dict[str, list[int]] = {}
    for i, target in enumerate(targets):
        strata.setdefault(target, []).append(i)
    shares = apportioned({target: len(members) for target, members in strata.items()}, count)
    return sorted(i for target in sorted(shares) for i in draw.sample(strata[target], shares[target]))


# --- how they are asked ---------------------------------------------------------------------------------------------


def rendered(name: str, task: Task, chosen: Sequence[int], chat: Chat | None) -> list[Item]:
    """The chosen documents of a task as requests. The task keeps them too: its filters look for them there."""
    docs = task.eval_docs
    items = [Item(name, i, _instances(task, docs[i], i, chat)) for i in chosen]
    task._instances = [instance for item in items for instance in item.instances]
    return items


def _instances(task: Task, doc: Any, doc_id: int, chat: Chat | None) -> list[Instance]:
    context = context_of(task, doc, int(task.get_config("num_fewshot") or 0), chat)
    made = task.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(task.get_config("task"), doc_id, task.get_config("repeats") or 1),
        apply_chat_template=chat is not None,
        chat_template=chat,
    )
    return list(made) if isinstance(made, list) else [made]


def context_of(task: Task, doc: Any, shots: int, chat: Chat | None) -> Any:
    """What stands before the answer: examples and question; in chat form, the examples are earlier turns."""
    return task.fewshot_context(
        doc,
        num_fewshot=shots,
        system_instruction=None,
        apply_chat_template=chat is not None,
        fewshot_as_multiturn=chat is not None,
        chat_template=chat,
        gen_prefix=task.doc_to_prefix(doc),
    )


def check_fits(task: Task, item: Item, answer: int, encoder: Encoder, chat: Chat | None, context: int) -> None:
    """Raise if an item needs more than ``context`` tokens even without examples; ``answer`` of them are its answer."""
    question = context_of(task, item.doc, 0, chat)
    texts = question if isinstance(question, list) else [question]
    needed = max(len(encoder.ids(text)) for text in texts) + answer
    if needed > context:
        raise UserError(
            f"The question of item {item.name} does not fit: with its answer it takes {needed} tokens, the model's "
            f"context holds {context}.",
            "Leave the task out, or set a smaller `max_new_tokens` if its answer is generated.",
        )
