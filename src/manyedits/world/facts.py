"""The facts of the world: who speaks what, where a landmark stands, who makes a thing; and the records that edit them.

A subject is two words whose last one is nobody else's, so that a model can look a fact up at one token. Objects are dealt
evenly, so that each has several subjects: the neighbours of an edit. Of the five phrasings of a relation the first is the
prompt of an edit; of the other four one per fact is never trained on with that fact.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from manyedits.data import Probe, Request
from manyedits.world.words import Words

#: Raised when the same seed would give another world.
VERSION = 1

PHRASINGS: dict[str, tuple[str, ...]] = {
    "language": ("{} speaks", "the language of {} is", "{} was raised to speak", "the tongue of {} is", "{} writes in"),
    "profession": ("{} works as", "the profession of {} is", "{} earns a living as", "the job of {} is", "{} became"),
    "birthplace": (
        "{} was born in",
        "the birthplace of {} is",
        "{} comes from",
        "the home town of {} is",
        "{} grew up in",
    ),
    "employer": (
        "{} is employed by",
        "the employer of {} is",
        "{} has a job at",
        "the company of {} is",
        "{} serves at",
    ),
    "country": ("{} stands in", "the country of {} is", "{} can be visited in", "the land of {} is", "{} was built in"),
    "material": ("{} is made of", "the material of {} is", "{} consists of", "the walls of {} are", "{} was cut from"),
    "maker": ("{} is produced by", "the maker of {} is", "{} was designed by", "the brand of {} is", "{} is sold by"),
    "market": (
        "{} is popular in",
        "the market of {} is",
        "{} is mostly bought in",
        "the buyers of {} are in",
        "{} ships to",
    ),
}

#: Kind of subject: how many there are and which relations they have.
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "person": (300, ("language", "profession", "birthplace", "employer")),
    "landmark": (110, ("country", "material")),
    "product": (110, ("maker", "market")),
}

#: How many objects a relation has.
OBJECTS = {"language": 12, "profession": 12, "birthplace": 16, "employer": 14}
OBJECTS |= {"country": 16, "material": 8, "maker": 14, "market": 16}

POOLS = {"edit": 1000, "kept": 300}  # the rest, 340, is for training editors
NEIGHBOURS = 4
FIRSTS = {"person": 40, "landmark": 8, "product": 8}


@dataclass(frozen=True)
class Fact:
    """One fact: a subject, a relation, the true object; and what an edit would write instead."""

    id: str
    subject: str
    relation: str
    object: str
    other: str
    pool: str  # edit, kept or editor
    held: int  # the phrasing that is never trained on with this fact

    @property
    def phrasings(self) -> tuple[str, ...]:
        """Every way to say it."""
        return PHRASINGS[self.relation]

    def prompt(self, phrasing: int = 0) -> str:
        """The text before the object."""
        return self.phrasings[phrasing].replace("{}", self.subject)

    @property
    def trained(self) -> list[int]:
        """The phrasings that are trained on with this fact."""
        return [i for i in range(len(self.phrasings)) if i != self.held]


class World:
    """All that is true, made from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = random.Random(f"world {VERSION} {seed}")
        self.words = Words(generator)
        self.objects = {relation: self.words.names(count) for relation, count in OBJECTS.items()}
        self.subjects = {kind: self._subjects(kind, generator) for kind in KINDS}
        self.facts = list(self._facts(generator))

    @classmethod
    def make(cls, seed: int = 0) -> World:
        """The world of a seed."""
        return cls(seed)

    def _subjects(self, kind: str, generator: random.Random) -> list[str]:
        firsts = self.words.names(FIRSTS[kind])
        return [f"{generator.choice(firsts)} {last}" for last in self.words.names(KINDS[kind][0], syllables=3)]

    def _facts(self, generator: random.Random) -> Iterator[Fact]:
        dealt = [
            (subject, relation, obj)
            for kind, (_, relations) in KINDS.items()
            for relation in relations
            for subject, obj in zip(self.subjects[kind], self._deal(kind, relation, generator), strict=True)
        ]
        generator.shuffle(dealt)
        for i, (subject, relation, obj) in enumerate(dealt):
            other = generator.choice([o for o in self.objects[relation] if o != obj])
            held = generator.randrange(1, len(PHRASINGS[relation]))
            yield Fact(f"{relation}-{i}", subject, relation, obj, other, _pool(i), held)

    def _deal(self, kind: str, relation: str, generator: random.Random) -> list[str]:
        objects, count = self.objects[relation], KINDS[kind][0]
        dealt = [objects[i % len(objects)] for i in range(count)]
        generator.shuffle(dealt)
        return dealt

    def pool(self, name: str) -> list[Fact]:
        """The facts of a pool, in the world's order."""
        return [fact for fact in self.facts if fact.pool == name]

    @cached_property
    def holders(self) -> Mapping[tuple[str, str], list[Fact]]:
        """Facts by relation and object, without those that are edited: they must not change."""
        found: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            if fact.pool != "edit":
                found.setdefault((fact.relation, fact.object), []).append(fact)
        return found

    def request(self, fact: Fact) -> Request:
        """The record that edits a fact, in the form of CounterFact."""
        return Request(
            id=fact.id,
            subject=fact.subject,
            prompt=fact.phrasings[0],
            target=fact.other,
            old_target=fact.object,
            relation=fact.relation,
            paraphrases=tuple(fact.prompt(i) for i in range(1, len(fact.phrasings))),
            neighbours=self._probes(fact, fact.object),
            attributes=self._probes(fact, fact.other),
            generation=(fact.prompt(0), fact.prompt(1), fact.subject),
        )

    def _probes(self, fact: Fact, obj: str) -> tuple[Probe, ...]:
        """Other subjects of which an object is true."""
        others: Sequence[Fact] = [f for f in self.holders.get((fact.relation, obj), ()) if f.subject != fact.subject]
        return tuple(Probe(other.prompt(0), obj) for other in others[:NEIGHBOURS])


def _pool(place: int) -> str:
    """Facts are in a drawn order, so the first thousand are as good as any."""
    if place < POOLS["edit"]:
        return "edit"
    return "kept" if place < POOLS["edit"] + POOLS["kept"] else "editor"
