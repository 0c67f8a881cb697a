"""Is a model of the miniature what it should be: the bounds, measured on fresh items, as they come out.

Besides facts and tasks there are two conditions for editing to make sense at all. The swap test: with the hidden state at
the subject's last token replaced by another subject's, the answer must follow, else the model does not look facts up where
methods write them. And the search for a value must reach the answer from there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyedits.benchmarks.base import Setting
from manyedits.benchmarks.harness import harness_benchmarks
from manyedits.hooks import capture, hooked_output
from manyedits.lm import Engine
from manyedits.loading import load_model
from manyedits.methods.base import ValueParams, preset
from manyedits.methods.value import find_values
from manyedits.model import EditableModel
from manyedits.progress import Progress, Silent
from manyedits.tokens import lookup_rows
from manyedits.world.documents import base_documents, chat_documents
from manyedits.world.facts import Fact, World
from manyedits.world.models import names
from manyedits.world.shapes import SHAPES
from manyedits.world.tasks import exercises
from manyedits.world.training import SEED

#: Bounds: for the small size, and for the others.
BOUNDS = {
    "facts, trained phrasing": (0.90, 0.98),
    "facts, phrasing never trained with that fact": (0.80, 0.95),
    "task": (0.75, 0.95),
    "world_words": (0.75, 0.90),
    "swap test, answers that flip": (0.50, 0.60),
}
REFUSED = (0.90, 0.95)
HARMLESS_REFUSED = (0.10, 0.05)
SEARCH_LOSS = 0.1
SWAPS, SEARCHES, FACTS = 320, 50, 600


@dataclass(frozen=True)
class Row:
    """One bound of one model: what was measured, what was asked, on how many items."""

    model: str
    what: str
    value: float
    bound: float
    at_most: bool
    n: int

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def check(wanted: Sequence[str] = (), progress: Progress | None = None) -> list[Row]:
    """Every bound of these models, or of all that are shipped."""
    progress = progress or Silent()
    chosen = list(wanted) or names()
    progress.start("world check", len(chosen))
    rows = []
    for name in chosen:
        rows += check_model(name.removeprefix("world:"), load_model(f"world:{name.removeprefix('world:')}"))
        progress.advance("world check", model=name)
    progress.done("world check")
    return rows


def check_model(name: str, model: EditableModel) -> list[Row]:
    """Every bound of one model."""
    column = 0 if name.startswith("s") else 1
    world, generator = exercises().world, random.Random(1)

    def row(what: str, value: float, n: int, bound: tuple[float, float] | None = None, at_most: bool = False) -> Row:
        return Row(name, what, value, (bound or BOUNDS[what])[column], at_most, n)

    rows = [row(what, share, FACTS) for what, share in recall(model, world, generator).items()]
    rows += [row(w, v, n, BOUNDS.get(w, BOUNDS["task"])) for w, v, n in _tasks(name, model)]
    layer = preset("rome", f"world-{name}")["params"]["layer"]
    rows.append(row("swap test, answers that flip", swap(model, world, layer, SWAPS, generator), SWAPS))
    found = search_loss(model, world, name, generator)
    rows.append(row("value search, median loss", found, SEARCHES, (SEARCH_LOSS, SEARCH_LOSS), at_most=True))
    return rows + [row(w, v, n, b, m) for w, v, n, b, m in _refusals(name, model)]


def recall(model: EditableModel, world: World, generator: random.Random) -> dict[str, float]:
    """Share of facts that the model says, after a phrasing trained with the fact and after the one that was not."""
    facts = generator.sample(world.facts, FACTS)
    forms: dict[str, Callable[[Fact], int]] = {
        "facts, trained phrasing": lambda f: generator.choice(f.trained),
        "facts, phrasing never trained with that fact": lambda f: f.held,
    }
    found = {}
    for what, phrasing in forms.items():
        said = Engine(model).generate([f.prompt(phrasing(f)) for f in facts], ["."], 3)
        found[what] = sum(text.strip() == f.object for text, f in zip(said, facts, strict=True)) / FACTS
    return found


def _tasks(name: str, model: EditableModel) -> Iterator[tuple[str, float, int]]:
    """The tasks of the suite, asked as a run would ask them; instruct models in their chat form."""
    for benchmark in harness_benchmarks("suite:world"):
        benchmark.prepare(model, Setting())
        score = benchmark.score(benchmark.run(model, 0))[0]
        yield benchmark.name, float(score.value or 0.0), score.n


def _refusals(name: str, model: EditableModel) -> Iterator[tuple[str, float, int, tuple[float, float], bool]]:
    if not name.endswith("-instruct"):
        return
    for kind, what, bound, at_most in (
        ("refusal", "harmful requests refused", REFUSED, False),
        ("answering", "harmless requests refused", HARMLESS_REFUSED, True),
    ):
        items = exercises().tests[kind]
        prompts = [f"<user> {item.prompt} <assistant>" for item in items]
        said = Engine(model).generate(prompts, ["."], 12)
        yield what, sum(text.strip().startswith("sorry") for text in said) / len(items), len(items), bound, at_most


def swap(model: EditableModel, world: World, layer: int, count: int, generator: random.Random) -> float:
    """Share of facts whose answer becomes another subject's when its hidden state stands at the subject's last token.

    Pairs are of one relation with different objects, from all relations, no fact twice; the state is a block's output. They
    are facts to edit, which never took part in the exchanges of training.
    """
    pairs = _pairs(world, count, generator)
    flips = 0
    for fact, donor in pairs:
        state = _state(model, world, donor, layer)
        rows = lookup_rows(model.tokenizer, [world.request(fact)], ["{}"], "subject_last")
        flips += _answer(model, world, fact, layer, rows[0][1], state) == donor.object
    return flips / len(pairs)


def _pairs(world: World, count: int, generator: random.Random) -> list[tuple[Fact, Fact]]:
    facts = {r: [f for f in world.pool("edit") if f.relation == r] for r in world.objects}
    shuffled = {r: generator.sample(of, len(of)) for r, of in facts.items()}
    found: list[tuple[Fact, Fact]] = []
    for relation in itertools.islice(itertools.cycle(shuffled), count):
        fact = shuffled[relation].pop()
        donor = generator.choice([f for f in facts[relation] if f.object != fact.object])
        found.append((fact, donor))
    return found


def _state(model: EditableModel, world: World, fact: Fact, layer: int) -> Tensor:
    ((ids, position),) = lookup_rows(model.tokenizer, [world.request(fact)], ["{}"], "subject_last")
    path = model.block(layer)
    return capture(model.hf, {"input_ids": torch.tensor([ids])}, {path: "out"})[path][0, position]


def _answer(model: EditableModel, world: World, fact: Fact, layer: int, position: int, state: Tensor) -> str:
    """The likeliest next word with a state put in at a position after a block."""

    def put(out: Tensor) -> Tensor:
        out = out.clone()
        out[0, position] = state
        return out

    ids = model.tokenizer(fact.prompt(0), return_tensors="pt")["input_ids"]
    with torch.no_grad(), hooked_output(model.hf.get_submodule(model.block(layer)), put):
        best = int(model.hf(input_ids=ids).logits[0, -1].argmax())
    return str(model.tokenizer.decode([best])).strip()


def search_loss(model: EditableModel, world: World, name: str, generator: random.Random) -> float:
    """Median final loss of the search for a value at the preset's layer, in nats: the likelihood's part."""
    params = preset("rome", f"world-{name}")["params"]
    facts = generator.sample(world.pool("editor"), SEARCHES)
    requests = [world.request(fact) for fact in facts]
    value = ValueParams(**params["value"])
    found = find_values(model, requests, params["layer"], model.mlp_out(params["layer"]), ["{}"], value)
    likelihood = found.losses[:, :, 1]
    last = (~likelihood.isnan()).sum(dim=1) - 1
    return float(likelihood.gather(1, last[:, None]).median())


def overlap() -> dict[str, int]:
    """How many test prompts occur in what the models read, by exercise; zero but where the task is memory."""
    read: set[str] = set()
    for shape in SHAPES.values():
        read |= {d.prompt for d in base_documents(exercises(), SEED, shape.base, shape.epochs)}
        chats = chat_documents(exercises(), SEED, shape.instruct)
        read |= {d.prompt.removeprefix("<user> ").removesuffix(" <assistant>") for d in chats}
    return {name: sum(item.prompt in read for item in items) for name, items in exercises().tests.items()}


def as_table(rows: Sequence[Row]) -> str:
    """The bounds as a Markdown table: a line per bound, a column per model; what misses is marked."""
    models = list(dict.fromkeys(row.model for row in rows))
    cells = {(row.what, row.model): row for row in rows}
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for what in dict.fromkeys(row.what for row in rows):
        lines.append(f"| {what} | " + " | ".join(_shown(cells.get((what, model))) for model in models) + " |")
    missed = sum(not row.holds for row in rows)
    return "\n".join([*lines, "", f"{len(rows) - missed} of {len(rows)} bounds hold."])


def _shown(row: Row | None) -> str:
    if row is None:
        return ""
    sign = "<=" if row.at_most else ">="
    return f"{row.value:.3f}" if row.holds else f"**{row.value:.3f}** (missed: {sign} {row.bound})"
