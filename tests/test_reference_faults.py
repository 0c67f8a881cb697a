"""That the reference is broken where the comparison says so: with its fault, and only with it, the recordings come out."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from golden import Golden, shared
from manyedits.changes import LowRank
from manyedits.methods import layers
from parity_methods.edits import EditAdapter
from parity_methods.pmet import PmetAdapter
from parity_methods.stage import Stage
from parity_methods.table import Row, Table

FOLDER = shared() / "golden" / "gpt2-tiny"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"the recorded outputs are not at {FOLDER}")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(Golden(FOLDER))


def rows_of_variant(adapter: EditAdapter, stage: Stage, variant: str) -> list[Row]:
    """The comparison of one variant, nothing excused."""
    table = Table(adapter.method, stage.golden.tensors(adapter.method))
    adapter.variant(stage, table, variant, stage.golden.hparams(adapter.method)[variant])
    return table.rows


def test_pmet_adds_the_change_of_a_square_weight_transposed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPT-2, whose weights are (in, out); every tensor but the closed form of that change then agrees."""

    def as_there(weight: str, left: Tensor, right: Tensor) -> LowRank:
        return LowRank(weight, right, left) if ".attn." in weight else LowRank(weight, left, right)

    honest: list[Any] = rows_of_variant(PmetAdapter(), stage, "attn_and_mlp")
    assert any(row.failed for row in honest)
    monkeypatch.setattr(layers, "LowRank", as_there)
    theirs = rows_of_variant(PmetAdapter(), stage, "attn_and_mlp")
    assert {row.tensor.split(".")[1] for row in theirs if row.failed} == {"attn"}
    assert {row.check for row in theirs if row.failed} == {6}
