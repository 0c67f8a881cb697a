"""Invented words: harmless by construction, distinct, drawn from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Iterator

ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "st",
    "t",
    "v",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou", "ee")
CODAS = ("", "n", "l", "r", "s", "m", "th", "nd", "rk", "x")

#: Words with a meaning in the exercises; no invented word may be one of them.
RESERVED = frozenset({"and", "or", "not", "so", "is", "the", "of", "in", "a", "to", "no", "yes", "bad", "good", "true"})


class Words:
    """A source of words that never gives one twice."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._given = set(RESERVED)

    def name(self, syllables: int = 2) -> str:
        """A capitalised word."""
        return self.word(syllables).capitalize()

    def word(self, syllables: int = 2) -> str:
        """A lower-case word."""
        for word in self._candidates(syllables):
            if word not in self._given:
                self._given.add(word)
                return word
        raise AssertionError("the source is endless")

    def names(self, count: int, syllables: int = 2) -> list[str]:
        """Several capitalised words."""
        return [self.name(syllables) for _ in range(count)]

    def words(self, count: int, syllables: int = 2) -> list[str]:
        """Several lower-case words."""
        return [self.word(syllables) for _ in range(count)]

    def _candidates(self, syllables: int) -> Iterator[str]:
        pick = self._generator.choice
        while True:
            parts = [
                pick(ONSETS) + pick(VOWELS) + (pick(CODAS) if i == syllables - 1 else "") for i in range(syllables)
            ]
            yield "".join(parts)
