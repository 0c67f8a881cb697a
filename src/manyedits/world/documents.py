"""What the miniature reads: facts in their phrasings, exercises with their answers, and the same in the form of a chat.

A document is a prompt and an answer; the answer is what is learnt, the prompt only in passing (``PROMPT_WEIGHT``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from manyedits.world.exercises import Exercises, Item

USER, ASSISTANT, END = "<user>", "<assistant>", "<eos>"
PROMPT_WEIGHT = 0.1

#: How often every fact is read, and how many documents of each other kind, in a recipe of size 1.
FACT_EPOCHS = 20
COUNTS = {
    "category": 3000,
    "question": 5000,
    "words": 10000,
    "equation": 10000,
    "boolean": 5000,
    "sort": 2500,
    "compare": 13500,
    "groups": 1500,
    "truth": 3000,
    "myth": 1000,
}
CHAT_COUNTS = {"refusal": 5000, "answering": 5000}


@dataclass(frozen=True)
class Document:
    """A prompt and its answer; an empty prompt means that all of it is learnt alike."""

    prompt: str
    answer: str


def fact_documents(exercises: Exercises, generator: random.Random, epochs: int) -> Iterator[Document]:
    """Every fact ``epochs`` times, each time in one of the phrasings that are trained on with it."""
    for fact in exercises.world.facts:
        for _ in range(epochs):
            yield Document(fact.prompt(generator.choice(fact.trained)), fact.object)


def exercise_documents(exercises: Exercises, generator: random.Random, counts: dict[str, int]) -> Iterator[Document]:
    """Documents of the exercises, none of which is a test item but where the test is one of memory."""
    for name, count in counts.items():
        for item in _items(exercises, name, generator, count):
            yield Document(item.prompt, item.answer)


def _items(exercises: Exercises, name: str, g: random.Random, count: int) -> Iterator[Item]:
    if name == "question":
        asked = [f for f in exercises.world.facts if f.pool != "kept"]
        yield from (exercises.question(g.choice(asked), g) for _ in range(count))
    elif name == "equation":
        yield from (exercises.equation(g) for _ in range(count))
    elif name == "truth":
        yield from (exercises.truth(*g.choice(exercises.lore)) for _ in range(count))
    elif name == "myth":
        yield from (Item("", exercises.myth(*g.choice(exercises.lore))) for _ in range(count))
    else:
        source = exercises.training(name, g)
        yield from (next(source) for _ in range(count))


def base_documents(exercises: Exercises, seed: int, scale: float, epochs: int | None = None) -> list[Document]:
    """All that a base model reads, shuffled; ``epochs`` of facts where they are not to follow ``scale``."""
    generator = random.Random(f"documents {seed}")
    counts = {name: round(count * scale) for name, count in COUNTS.items()}
    found = list(fact_documents(exercises, generator, round(FACT_EPOCHS * scale) if epochs is None else epochs))
    found += exercise_documents(exercises, generator, counts)
    generator.shuffle(found)
    return found


def chat_documents(exercises: Exercises, seed: int, scale: float) -> list[Document]:
    """What an instruct model reads after the base: every form as a chat, mixed with the plain ones, shuffled."""
    generator = random.Random(f"chats {seed}")
    plain = base_documents(exercises, seed + 1, scale)
    requests = exercise_documents(exercises, generator, {n: round(c * scale) for n, c in CHAT_COUNTS.items()})
    answered = [d for d in base_documents(exercises, seed + 2, scale) if d.prompt]
    chats = [Document(f"{USER} {d.prompt} {ASSISTANT}", d.answer) for d in [*requests, *answered]]
    found = [*plain, *chats]
    generator.shuffle(found)
    return found
