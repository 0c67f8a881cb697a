"""The world's facts as requests, and its text for second moments."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache

from manyedits.data import Request
from manyedits.data.corpus import Corpus
from manyedits.errors import UserError
from manyedits.registry import near_miss
from manyedits.world.documents import base_documents
from manyedits.world.facts import World
from manyedits.world.tasks import exercises

POOLS = ("edit", "kept", "editor")
TEXTS = 12_000  # sentences of the corpus
GROUP = 8  # sentences of one text


def requests(pool: str = "edit", seed: int = 0) -> list[Request]:
    """The facts of a pool as requests. Raises ``UserError`` for an unknown pool."""
    if pool not in POOLS:
        raise UserError(f"The world has no pool `{pool}`.{near_miss(pool, POOLS)}", f"Known: {', '.join(POOLS)}.")
    world = World.make(seed)
    return [world.request(fact) for fact in world.pool(pool)]


def edit_requests() -> list[Request]:
    """The facts to edit: what results are reported on."""
    return requests("edit")


def editor_requests() -> list[Request]:
    """The facts for training learned editors, and for choosing parameters."""
    return requests("editor")


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    """What the models read, without the facts' answers being weighted: sentences in groups."""
    documents = base_documents(exercises(), seed=7, scale=0.5)
    random.Random(7).shuffle(documents)
    sentences = [f"{d.prompt} {d.answer} ." for d in documents[:TEXTS]]
    texts = [" ".join(sentences[i : i + GROUP]) for i in range(0, len(sentences), GROUP)]
    return Corpus(lambda: iter(texts), hashlib.sha256("\n".join(texts).encode()).hexdigest())
