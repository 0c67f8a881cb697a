"""The edits benchmark against recorded figures of the reference's evaluation, and on models that are dead."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from manyedits.benchmarks.base import Setting
from manyedits.benchmarks.edits import Edits
from manyedits.benchmarks.text import contained, exact, ngram_entropy, repetition
from manyedits.changes import Dense
from manyedits.data.counterfact import counterfact
from manyedits.data.reading import read_records
from manyedits.model import EditableModel


def golden(shared: Path) -> Path:
    return shared / "golden" / "gpt2-tiny"


def edited_by(model: EditableModel, described: str, folder: Path) -> None:
    """Make the change that the recording names: `edited: WEIGHT += FILE[TENSOR]`, in the stored orientation."""
    if described != "unedited":
        weight, _, place = described.removeprefix("edited: ").partition(" += ")
        file, _, name = place.rstrip("]").partition("[")
        delta = load_file(folder / file)[name]
        model.apply(Dense(weight, delta.T if delta.shape != model.weight(weight).shape else delta))


@pytest.mark.parametrize("edited", [False, True])
def test_figures_are_those_of_the_reference(shared: Path, edited: bool) -> None:
    """Per record: success, difference and correctness, on the unedited model and on edited ones."""
    folder = golden(shared)
    recorded = json.loads((folder / "metrics.json").read_text())["records"]
    rows = [r for r in recorded if (r["model"] != "unedited") is edited]
    requests = {r.id: r for r in (counterfact(*record) for record in read_records(folder / "requests.json"))}
    model = EditableModel.load(folder)
    assert len(rows) >= 3
    for row in rows:
        benchmark = Edits()
        benchmark.prepare(model, Setting(requests=(requests[str(row["case_id"])],)))
        edited_by(model, row["model"], folder)
        compare(row, {s.metric: s.value for s in benchmark.run(model, 0)})
        model.reset()


def compare(row: dict[str, Any], found: dict[str, float | None]) -> None:
    for theirs, mine in (("rewrite", "efficacy"), ("paraphrase", "paraphrase"), ("neighborhood", "neighbourhood")):
        if row["rome"][f"{theirs}_prompts_probs"]:
            assert found[mine] == pytest.approx(row["summary"][f"{theirs}_success"], abs=1e-4)
            assert found[f"{mine}_difference"] == pytest.approx(row["summary"][f"{theirs}_diff"], abs=1e-4)
            correct = row["memit"][f"{theirs}_prompts_correct"]
            assert found[f"{mine}_argmax"] == pytest.approx(sum(correct) / len(correct))
    pairs = row["rome"]["attribute_prompts_probs"]
    gaps = [math.exp(-p["target_new"]) - math.exp(-p["target_true"]) for p in pairs]
    if gaps:
        assert found["attribute_difference"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)


def test_ngram_entropy_is_that_of_the_reference(shared: Path) -> None:
    recorded = json.loads((golden(shared) / "metrics.json").read_text())["n_gram_entropy"]
    compared = [row for row in recorded if ngram_entropy(row["text"]) is not None]
    assert len(compared) >= 3
    for row in compared:
        assert ngram_entropy(row["text"]) == pytest.approx(row["value"], abs=1e-4)


def test_earlier_edits_are_asked_at_every_step() -> None:
    model, benchmark = tiny.model("gpt2"), Edits()
    benchmark.prepare(model, Setting(requests=tuple(tiny.requests(5))))
    for step, asked in ((0, 5), (1, 1), (3, 3), (5, 5)):
        items = {s.item for s in benchmark.run(model, step) if s.metric == "efficacy"}
        assert len(items) == asked
    assert benchmark.digest(3) != benchmark.digest(5)


def test_the_unedited_model_keeps_its_own_answers() -> None:
    model, benchmark = tiny.model("llama"), Edits()
    benchmark.prepare(model, Setting(requests=tuple(tiny.requests(5))))
    own = [s.value for s in benchmark.run(model, 0) if s.metric == "neighbourhood_own"]
    assert own and all(value == 1.0 for value in own)


def test_a_dead_model_is_unscored_and_not_zero() -> None:
    model, benchmark = tiny.model("gpt2"), Edits()
    benchmark.prepare(model, Setting(requests=tuple(tiny.requests(4))))
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.fill_(math.nan)
    scores = {s.metric: s for s in benchmark.score(benchmark.run(model, 0))}
    assert scores["efficacy"].value is None and scores["efficacy"].unscored == 4
    assert scores["efficacy_argmax"].value is None


@pytest.mark.parametrize(
    ("said", "wanted", "begins", "holds"),
    [
        (" French.", "French", True, True),
        (" Frenchman", "French", False, False),
        (" the language French", "French", False, True),
        ("", "French", False, False),
        (" FRENCH, of course", "French", True, True),
        (" Old  Greek and", "old greek", True, True),
        ("Østberg's", "Østberg", True, True),
    ],
)
def test_answers_are_found_as_whole_words(said: str, wanted: str, begins: bool, holds: bool) -> None:
    assert exact(said, wanted) is begins
    assert contained(said, wanted) is holds


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0.0
    assert repetition([1] * 20) == pytest.approx(1 - 1 / 17)
    assert repetition([1, 2]) is None
