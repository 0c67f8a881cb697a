"""The small solves of EMMET and AlphaEdit against the forms as they are published, as wide as the MLP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import contract
import tiny
from golden import relative_error
from manyedits.errors import UserError
from manyedits.methods.alphaedit import AlphaEdit
from manyedits.methods.base import Edit
from manyedits.methods.null_space import History, Projector
from manyedits.methods.solve import Factored, equality

WIDTH = 48


def draw(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment() -> Tensor:
    """A second moment with eigenvalues on both sides of 0.1."""
    basis, _ = torch.linalg.qr(draw(WIDTH, WIDTH, 0))
    return basis @ torch.diag(torch.logspace(1, -4, WIDTH, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 6])
def test_equality(damping: float, count: int) -> None:
    covariance, keys = moment(), draw(WIDTH, count, 1)
    inverse = torch.linalg.inv(covariance)
    inner = keys.T @ inverse @ keys + damping * torch.eye(count, dtype=torch.float64)
    right = equality(Factored(covariance), keys, damping)
    assert relative_error(right, inverse @ keys @ torch.linalg.inv(inner)) < 1e-8
    if not damping:
        assert relative_error(keys.T @ right, torch.eye(count, dtype=torch.float64)) < 1e-8


def test_equal_keys_cannot_be_told_apart() -> None:
    key = draw(WIDTH, 1, 1)
    with pytest.raises(UserError, match="too much alike"):
        equality(Factored(torch.eye(WIDTH)), torch.cat([key, key], dim=1), 0.0)


@pytest.mark.parametrize("threshold", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("earlier", [[], [1], [3, 2], [40, 30]])
def test_null_space_with_history(threshold: float, earlier: list[int]) -> None:
    """Also with more earlier keys than the space has dimensions."""
    values, vectors = torch.linalg.eigh(moment())
    small = vectors[:, values < threshold]
    project, keys = small @ small.T, draw(WIDTH, 5, 2)
    history = History(Projector.onto_null_space(moment(), threshold), 0.5)
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for seed, count in enumerate(earlier):
        block = draw(WIDTH, count, 10 + seed)
        history.add(block)
        total += block @ block.T
    whole = project @ (keys @ keys.T + total) + 0.5 * torch.eye(WIDTH, dtype=torch.float64)
    assert relative_error(history.spread(keys), torch.linalg.solve(whole, project @ keys)) < 1e-8


def test_the_projector_keeps_the_thinner_side() -> None:
    for threshold in (0.001, 1.0):
        projector = Projector.onto_null_space(moment(), threshold)
        assert projector.basis.shape[1] <= WIDTH // 2
        assert projector.rank == int((torch.linalg.eigvalsh(moment()) < threshold).sum())


def test_a_snapshot_of_the_history_gives_the_same_factor_to_the_last_bit() -> None:
    """One recall of what state() gives, against the recalls that made it."""
    made, again = (AlphaEdit(AlphaEdit.Params(layers=(0,))) for _ in range(2))
    for method in (made, again):
        method.projectors = {0: Projector.onto_null_space(moment(), 0.1)}
        method.forget()
    for seed, count in enumerate((2, 1, 4)):
        keys = draw(count, WIDTH, seed).float()
        made.recall(Edit((), {"keys.0": keys, "sizes": torch.tensor([count])}))
    again.recall(Edit((), made.state()))
    keys = draw(WIDTH, 3, 9)
    assert torch.equal(made.solve(0, keys), again.solve(0, keys))
    made.forget()
    assert not made.state()


def test_a_layer_without_a_null_space_is_refused(tmp_path: Path) -> None:
    params = AlphaEdit.Params(layers=(0,), threshold=1e-12, moments={"tokens": 4000, "length": 64})
    with pytest.raises(UserError, match="no null space"):
        AlphaEdit(params).prepare(tiny.model("llama"), contract.supplies(tmp_path))
