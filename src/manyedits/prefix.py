"""What many sequences of tokens share, as a tree: each part is run through the model once.

A benchmark asks for thousands of continuations of contexts that begin alike: the same few-shot examples, then the same
question with four answers. Sorted, such rows form a tree. A node is a run of tokens with what is to be read from it;
its children continue it from the cache that it left. Rows that are the beginning of other rows cost nothing at all.

Everything here is a function of the rows and of a declared budget, so the same items always make the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Tokens = tuple[int, ...]

# A shared run of tokens becomes a node only if it is this long and saves this many tokens: each level of the tree costs
# a forward pass of its own and a copy of the cache.
SHORTEST = 8
LEAST_SAVED = 24


class Read(NamedTuple):
    """The logits after the token at ``position`` are to be read for ``target``, and the result noted at ``slot``."""

    position: int
    target: int
    slot: int


@dataclass
class Row:
    """A sequence to run, what to read from it, and where its prompt ends (index of the last prompt token)."""

    tokens: Tokens
    prompt_end: int
    reads: list[Read] = field(default_factory=list)


@dataclass
class Node:
    """Tokens that one or many rows have in common, beginning at position ``start`` of those rows."""

    tokens: Tokens
    start: int
    prompt_end: int
    reads: list[Read] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    def columns(self) -> list[int]:
        """The distinct columns of this run that are read, ascending."""
        return sorted({read.position - self.start for read in self.reads})


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])


def absorb(rows: Sequence[Row]) -> list[Row]:
    """Rows without those that are the beginning of another one, which takes over what they read."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda r: r.tokens, reverse=True):
        if kept and kept[-1].tokens[: len(row.tokens)] == row.tokens:
            kept[-1].reads.extend(row.reads)
        else:
            kept.append(Row(row.tokens, row.prompt_end, list(row.reads)))
    return kept[::-1]


def forest(rows: Sequence[Row]) -> list[Node]:
    """The trees of rows that share their beginnings wherever that is worth a forward pass of its own.

    A row that ends where others go on keeps that end as the end of a node.
    """
    roots: list[Node] = []
    waiting = [(sorted(rows, key=lambda r: r.tokens), 0, roots)] if rows else []
    while waiting:
        group, start, siblings = waiting.pop()
        if len(group) == 1:
            siblings.append(_node(group, start, len(group[0].tokens)))
            continue
        shared = common_length(group[0].tokens, group[-1].tokens)
        if shared - start >= SHORTEST:
            node = _node(group, start, shared)
            siblings.append(node)
            start, siblings = shared, node.children
            group = [row for row in group if len(row.tokens) > shared]
        waiting.extend((part, start, siblings) for part in _parts(group, shared))
    return [kept for root in roots for kept in _worthwhile(root)]


def _worthwhile(node: Node) -> list[Node]:
    """A tree without shared runs that save too little: those are run with each of their children instead."""
    node.children = [kept for child in node.children for kept in _worthwhile(child)]
    saved = len(node.tokens) * (len(node.children) - 1)
    if not node.children or saved >= LEAST_SAVED or any(read.position == node.stop - 1 for read in node.reads):
        return [node]
    node.children[0].reads += node.reads
    for child in node.children:
        child.tokens, child.start = node.tokens + child.tokens, node.start
    return node.children


def _node(group: Sequence[Row], start: int, stop: int) -> Node:
    reads = [read for row in group for read in row.reads if start <= read.position < stop]
    return Node(group[0].tokens[start:stop], start, group[0].prompt_end, reads)


def _parts(group: Sequence[Row], position: int) -> Iterator[list[Row]]:
    """Sorted rows by the token at a position; those that end there first, each by itself."""
    parts: dict[int, list[Row]] = {}
    for row in group:
        if len(row.tokens) == position:
            yield [row]
        else:
            parts.setdefault(row.tokens[position], []).append(row)
    yield from parts.values()


def unshared(rows: Sequence[Row]) -> list[Node]:
    """One node per row, for models whose adapters must see every row whole."""
    return [Node(row.tokens, 0, row.prompt_end, list(row.reads)) for row in rows]


def shorten(nodes: Sequence[Node], most_reads: int) -> list[Node]:
    """Nodes cut into chains so that none reads more columns than allowed: logits over a vocabulary are large."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        columns = node.columns()
        if len(columns) > most_reads:
            _cut(node, columns[most_reads])
        waiting.extend(node.children)
    return list(nodes)


def _cut(node: Node, column: int) -> None:
    position = node.start + column
    rest = Node(node.tokens[column:], position, node.prompt_end, [r for r in node.reads if r.position >= position])
    rest.children = node.children
    node.reads = [r for r in node.reads if r.position < position]
    node.tokens, node.children = node.tokens[:column], [rest]


class Placed(NamedTuple):
    """A node, and the row of its parent's batch whose cache it continues."""

    parent: int
    node: Node


class Budget(NamedTuple):
    """How large a batch may be: cached tokens, positions with logits, and tokens yet to be generated per row."""

    tokens: int
    reads: int
    room: int = 0

    def allows(self, rows: int, longest: int, reads: int) -> bool:
        """Whether so many rows of at most so many tokens with so many reads fit."""
        return rows * (longest + self.room) <= self.tokens and reads <= self.reads


def batches(nodes: Sequence[Placed], budget: Budget) -> Iterator[list[Placed]]:
    """Nodes in batches of similar length, longest first; a node too large for the budget stands alone."""
    batch: list[Placed] = []
    before = run = reads = 0
    for placed in sorted(nodes, key=lambda p: (-len(p.node.tokens), -p.node.start, p.node.tokens)):
        columns = len(placed.node.columns())
        longest = max(before, placed.node.start) + max(run, len(placed.node.tokens))
        if batch and not budget.allows(len(batch) + 1, longest, reads + columns):
            yield batch
            batch, before, run, reads = [], 0, 0, 0
        batch.append(placed)
        before, run = max(before, placed.node.start), max(run, len(placed.node.tokens))
        reads += columns
    if batch:
        yield batch
