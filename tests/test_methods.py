"""The contract, over every registered method: pure, effective, exactly undone, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import contract
import tiny
from manyedits.changes import from_tensors, to_tensors
from manyedits.data import Request
from manyedits.lm import Engine
from manyedits.methods import METHODS
from manyedits.model import EditableModel
from manyedits.rundir import RunDir
from manyedits.trajectory import Trajectory

TWO_ROWS = list(contract.combinations(["gpt2", "llama"]))
OTHERS = [c for c in contract.combinations(tiny.ALL) if c not in TWO_ROWS]


def likelihood(model: EditableModel, requests: Sequence[Request]) -> float:
    """Mean log-probability of the requests' targets."""
    engine = Engine(model)
    pairs = [engine.encoder.pair(r.text, f" {r.target}") for r in requests]
    return sum(total for total, _ in engine.loglikelihood(pairs)) / len(pairs)


@pytest.mark.parametrize(("name", "kind"), TWO_ROWS + OTHERS)
def test_an_edit_is_pure_effective_and_exactly_undone(name: str, kind: str, tmp_path: Path) -> None:
    """Gains are averaged over four edits: on random weights a single one may miss."""
    model, method = contract.ready(name, kind, tmp_path)
    base, weights = model.digest(), {n: t.clone() for n, t in model.hf.state_dict().items()}
    gains = []
    for request in tiny.requests(4):
        before = likelihood(model, [request])
        edit = method.edit(model, [request])
        assert model.digest() == base, "editing left the model as it was"
        for change in edit.changes:
            model.apply(change)
        assert model.digest() != base
        gains.append(likelihood(model, [request]) - before)
        model.reset()
        assert model.digest() == base
    assert sum(gains) / len(gains) > 0.3, "the targets became likelier"
    for key, tensor in model.hf.state_dict().items():
        assert torch.equal(tensor, weights[key])


@pytest.mark.parametrize(("name", "kind"), TWO_ROWS)
def test_changes_survive_a_round_trip(name: str, kind: str, tmp_path: Path) -> None:
    model, method = contract.ready(name, kind, tmp_path)
    edit = method.edit(model, tiny.requests(1))
    digests = []
    for changes in (edit.changes, from_tensors(*to_tensors(edit.changes))):
        model.reset()
        for change in changes:
            model.apply(change)
        digests.append(model.digest())
    assert digests[0] == digests[1]


def trajectory(name: str, kind: str, folder: Path, shared: Path) -> Trajectory:
    model, method = contract.ready(name, kind, shared)
    return Trajectory(RunDir(folder), model, method, tiny.requests(6), identity={"seed": 0})


@pytest.mark.parametrize(("name", "kind"), TWO_ROWS)
def test_six_edits_are_three_a_restart_and_three_more(name: str, kind: str, tmp_path: Path) -> None:
    whole = trajectory(name, kind, tmp_path / "whole", tmp_path)
    digest = whole.at(6).digest()
    trajectory(name, kind, tmp_path / "parts", tmp_path).at(3)
    resumed = trajectory(name, kind, tmp_path / "parts", tmp_path)
    assert resumed.at(6).digest() == digest
    assert [line.digest for line in resumed.lines.values()] == [line.digest for line in whole.lines.values()]
    third = resumed.at(3).digest()
    assert third == whole.lines[3].digest
    assert resumed.at(0).digest() != third


@pytest.mark.parametrize("name", METHODS.names())
def test_a_snapshot_carries_what_the_method_remembers(name: str, tmp_path: Path) -> None:
    whole = trajectory(name, "gpt2", tmp_path / "whole", tmp_path)
    digest = whole.at(6).digest()
    first = trajectory(name, "gpt2", tmp_path / "parts", tmp_path)
    first.at(3)
    first.snapshot()
    for change in (tmp_path / "parts" / "changes").iterdir():
        change.unlink()  # the snapshot alone must do
    assert trajectory(name, "gpt2", tmp_path / "parts", tmp_path).at(6).digest() == digest


@pytest.mark.parametrize("name", METHODS.names())
def test_every_parameter_has_a_sentence(name: str) -> None:
    for field_name, field in METHODS.load(name).Params.model_fields.items():
        assert field.description and field.description.endswith("."), f"{name}.{field_name} has no description"
