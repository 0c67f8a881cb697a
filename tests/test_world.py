"""The miniature: its world, its exercises, its tokenizer, its recipe, and the models that are shipped."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from manyedits.benchmarks.harness_tasks import load, suite
from manyedits.data.sets import SOURCES, load_requests
from manyedits.errors import UserError
from manyedits.model import tensors_digest
from manyedits.tokens import lookup_rows
from manyedits.world import models
from manyedits.world.check import Row, as_table
from manyedits.world.data import POOLS, corpus, requests
from manyedits.world.documents import base_documents, chat_documents
from manyedits.world.exercises import Exercises
from manyedits.world.facts import PHRASINGS, World
from manyedits.world.shapes import Shape, config_of
from manyedits.world.swaps import Swaps
from manyedits.world.tasks import exercises
from manyedits.world.tokenizer import make_tokenizer
from manyedits.world.training import Recipe, fit

MEMORY = {"facts", "truth"}  # tasks that are memory by meaning


@pytest.fixture(scope="module")
def world() -> World:
    return exercises().world


def test_pools_are_disjoint_and_large_enough(world: World) -> None:
    pools = {name: world.pool(name) for name in POOLS}
    assert len(pools["edit"]) >= 1000 and len(pools["kept"]) >= 250 and len(pools["editor"]) >= 300
    keys = [(f.subject, f.relation) for facts in pools.values() for f in facts]
    assert len(keys) == len(set(keys)) == len(world.facts)


def test_every_relation_has_five_phrasings_and_every_fact_withholds_one(world: World) -> None:
    assert all(len(set(forms)) >= 5 for forms in PHRASINGS.values())
    for fact in world.facts:
        assert fact.held != 0 and fact.held not in fact.trained
        assert len(fact.trained) == len(fact.phrasings) - 1


def test_the_last_word_of_a_subject_is_nobody_elses(world: World) -> None:
    last = [s.split()[-1] for subjects in world.subjects.values() for s in subjects]
    assert len(last) == len(set(last))


@pytest.mark.parametrize("pool", POOLS)
def test_every_record_is_valid(pool: str, world: World) -> None:
    for request in requests(pool):
        start, end = request.subject_span
        assert request.text[start:end] == request.subject
        assert request.target != request.old_target
        assert request.target in world.objects[str(request.relation)]
        assert len(request.paraphrases) == 4 and all(request.subject in p for p in request.paraphrases)
        assert all(probe.target == request.old_target for probe in request.neighbours)
        assert all(request.subject not in probe.prompt for probe in (*request.neighbours, *request.attributes))


def test_neighbours_are_never_edited(world: World) -> None:
    edited = {f.prompt(0) for f in world.pool("edit")}
    probed = [p.prompt for r in requests("edit") for p in (*r.neighbours, *r.attributes)]
    assert probed and not edited & set(probed)


def test_no_test_item_is_trained_on() -> None:
    read = {d.prompt for d in base_documents(exercises(), 0, 1.0)}
    read |= {d.prompt.removeprefix("<user> ").removesuffix(" <assistant>") for d in chat_documents(exercises(), 0, 0.5)}
    for name, items in exercises().tests.items():
        seen = sum(item.prompt in read for item in items)
        assert seen == 0 or name in MEMORY, f"{seen} items of {name} occur in training"


def test_kept_facts_withhold_their_phrasing_in_training(world: World) -> None:
    read = {(d.prompt, d.answer) for d in base_documents(exercises(), 0, 1.0)}
    assert not any((f.prompt(f.held), f.object) in read for f in world.facts)


def test_every_task_has_enough_distinct_items() -> None:
    for name, items in exercises().tests.items():
        assert len({item.prompt for item in items}) >= 250, name
        assert all(item.answer not in item.wrong for item in items)


def test_a_hundred_seeds_give_a_hundred_worlds() -> None:
    first = {World.make(seed).facts[0].subject for seed in range(100)}
    assert len(first) >= 99
    for seed in (3, 77):
        assert all(len(items) >= 250 for items in Exercises(World.make(seed)).tests.values())
    assert World.make(5).facts == World.make(5).facts


def test_arithmetic_and_logic_are_right() -> None:
    for item in exercises().tests["boolean"]:
        assert item.final == str(_from_the_left(item.prompt))
    for item in exercises().tests["words"]:
        for equation in item.answer.split(" so ")[0].split(" , "):
            left, right = equation.split(" = ")
            assert eval(left) == int(right)
    for item in exercises().tests["compare"]:
        first, second = item.prompt.removeprefix("larger of ").removesuffix(" :").split(" or ")
        assert item.answer == max(first, second)


def _from_the_left(prompt: str) -> bool:
    words = prompt.removesuffix(" is").split()
    values, operators = [], []
    while words:
        word = words.pop(0)
        if word in ("and", "or"):
            operators.append(word)
        else:
            values.append((word if word != "not" else words.pop(0)) == ("True" if word != "not" else "False"))
    total = values[0]
    for operator, value in zip(operators, values[1:], strict=True):
        total = (total and value) if operator == "and" else (total or value)
    return total


def test_the_tokenizer_gives_a_text_back_and_finds_subjects(world: World) -> None:
    tokenizer = make_tokenizer(exercises())
    for fact in world.facts[:50]:
        text = f"{fact.prompt(0)} {fact.object} ."
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode(" speaks", add_special_tokens=False) == tokenizer.encode("speaks", add_special_tokens=False)
    request = requests("edit")[0]
    ((ids, _),) = lookup_rows(tokenizer, [request], ["{}"], "subject_last")
    assert tokenizer.decode(ids[-1]) == request.subject.split()[-1]


def test_the_chat_template_opens_the_answer() -> None:
    tokenizer = make_tokenizer(exercises(), chat=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert text == "<user> x <assistant>"


@pytest.mark.parametrize("name", ["world", "world-instruct"])
def test_the_suites_load_in_the_harness(name: str) -> None:
    for spec in suite(name):
        loaded = load(spec)
        (task,) = loaded.tasks.values()
        assert len(list(task.test_docs())) >= 250


def test_training_twice_gives_the_same_weights() -> None:
    digests = []
    for _ in range(2):
        tokenizer = make_tokenizer(exercises())
        torch.manual_seed(0)
        from transformers import Qwen3ForCausalLM

        shape = Shape(width=32, inner=48, layers=2, heads=2, base=1.0, epochs=1, instruct=1.0, site=0)
        model = Qwen3ForCausalLM(config_of(shape, len(tokenizer)))
        swaps = Swaps(model, tokenizer, exercises().world, 0, 4, 0)
        recipe = Recipe(rows=2, swaps=4)
        documents = list(itertools.islice(base_documents(exercises(), 0, 0.1), 150))
        fit(model, tokenizer, documents, recipe, _Quiet(), "tiny", swaps)
        digests.append(tensors_digest(model.state_dict()))
    assert digests[0] == digests[1]


class _Quiet:
    def start(self, name: str, total: int) -> None: ...

    def advance(self, name: str, n: int = 1, **facts: object) -> None: ...

    def done(self, name: str) -> None: ...


def test_an_unknown_pool_or_model_has_a_near_miss() -> None:
    with pytest.raises(UserError, match=r"no pool `edits`. Did you mean `edit`"):
        requests("edits")
    with pytest.raises(UserError, match=r"no model `world:x`"):
        models.path_of("world:x")


def test_damaged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"something else")
    (tmp_path / "digests.json").write_text(json.dumps({"m": "0" * 64}))
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="are damaged"):
        models.path_of("world:m")


def test_the_worlds_facts_are_a_data_set_without_a_file() -> None:
    assert {"world", "world-editor"} <= set(SOURCES.names())
    whole = load_requests("world", None, seed=3)
    assert load_requests("world", None, seed=3, limit=20) == whole[:20]
    assert load_requests("world", None, seed=4)[:20] != whole[:20]


def test_the_corpus_is_the_worlds_own_text() -> None:
    texts = list(corpus().texts())
    assert len(texts) > 1000 and texts == list(corpus().texts())
    generator = random.Random(0)
    known = set(make_tokenizer(exercises()).get_vocab())
    assert all(word in known for text in generator.sample(texts, 20) for word in text.split())


def test_a_missed_bound_is_marked() -> None:
    rows = [Row("m", "a", 0.9, 0.95, False, 10), Row("m", "b", 0.04, 0.1, True, 10)]
    table = as_table(rows)
    assert "**0.900** (missed: >= 0.95)" in table and "1 of 2 bounds hold" in table
