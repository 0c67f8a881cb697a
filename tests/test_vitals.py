"""Vital signs: their values on a healthy, an edited and a dead model."""

from __future__ import annotations

import math

import torch

import tiny
from manyedits.benchmarks.base import Score, Setting
from manyedits.benchmarks.vitals import Vitals
from manyedits.changes import Dense
from manyedits.lm import Engine
from manyedits.model import EditableModel

TEXTS = tuple(tiny.TEXT[:12])


def measured(model: EditableModel, benchmark: Vitals) -> dict[str, Score]:
    return {s.metric: s for s in benchmark.score(benchmark.run(model, 0))}


def ready(kind: str = "llama") -> tuple[EditableModel, Vitals]:
    model, benchmark = tiny.model(kind), Vitals()
    benchmark.prepare(model, Setting(texts=TEXTS))
    return model, benchmark


def test_the_unedited_model_is_at_no_distance_from_itself() -> None:
    model, benchmark = ready()
    scores = measured(model, benchmark)
    assert scores["kl_to_base"].value == 0.0
    assert "norm_ratio" not in scores
    engine = Engine(model)
    total = sum(engine.loglikelihood_rolling(benchmark.texts))
    tokens = sum(len(model.tokenizer(text)["input_ids"]) for text in benchmark.texts)
    assert math.isclose(scores["perplexity"].value or 0, math.exp(-total / tokens), rel_tol=1e-6)


def test_a_large_change_shows_in_distance_and_weights() -> None:
    model, benchmark = ready()
    name = f"{model.mlp_out(1)}.weight"
    base = model.weight(name).clone()
    model.apply(Dense(name, 2 * base))
    scores = measured(model, benchmark)
    assert (scores["kl_to_base"].value or 0) > 0
    for metric, wanted in (("norm_ratio", 3.0), ("change_ratio", 2.0), ("top_singular_ratio", 3.0)):
        assert math.isclose(scores[metric].value or 0, wanted, rel_tol=1e-4)


def test_a_dead_model_has_no_perplexity_and_says_one_thing() -> None:
    model, benchmark = ready("gpt2")
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.fill_(math.nan)
    scores = measured(model, benchmark)
    assert scores["perplexity"].value is None and scores["kl_to_base"].value is None
    assert scores["constant"].value == 1.0
