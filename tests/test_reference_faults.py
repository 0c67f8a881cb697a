"""That the reference is broken where the comparison says so: with its fault, and only with it, the recordings come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from golden import Golden, relative_error, shared
from manyedits.changes import LowRank
from manyedits.methods import layers
from parity_methods import ft
from parity_methods.edits import EditAdapter
from parity_methods.pmet import PmetAdapter
from parity_methods.stage import Stage
from parity_methods.table import LOOP, Case, Row, Table

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


def padded(tokenizer: Any, texts: list[str], side: str) -> Mapping[str, Tensor]:
    tokenizer.padding_side = side
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def scored(tokenizer: Any, prompts: list[str], targets: list[str], side: str) -> tuple[Mapping[str, Tensor], Tensor]:
    """EasyEdit's `target_new`: the whole batch, and its mask (rows, tokens) of what it takes for target tokens."""
    whole = padded(tokenizer, [p + t for p, t in zip(prompts, targets, strict=True)], side)
    own = padded(tokenizer, prompts, side)["attention_mask"].sum(1)
    start = own + (whole["attention_mask"] == 0).sum(1)  # as if all padding stood in front
    return whole, torch.arange(whole["input_ids"].shape[1]) >= start[:, None]


def losses_there(stage: Stage, hparams: Mapping[str, Any], side: str, fixed: bool) -> Tensor:
    """EasyEdit's training on eight requests in one batch, padded on one side; `fixed` gives it position ids."""
    hf, tokenizer = stage.golden.load()
    chosen = stage.requests[:8]
    prompts, targets = [r.text for r in chosen], [f" {r.target}" for r in chosen]
    whole, scores_at = scored(tokenizer, prompts, targets, side)
    if hparams["objective_optimization"] == "prompt_last":
        whole = padded(tokenizer, prompts, side)
    given = {**whole, "position_ids": (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)} if fixed else whole
    wanted = padded(tokenizer, targets, side)["input_ids"]
    trained = list(hf.transformer.h[hparams["layers"][0]].mlp.c_proj.requires_grad_(True).parameters())
    start, losses = [p.detach().clone() for p in trained], []
    optimiser = torch.optim.Adam(trained, lr=hparams["lr"], weight_decay=hparams["weight_decay"])
    for _ in range(hparams["num_steps"]):
        scores = hf(**given).logits.log_softmax(-1)
        if hparams["objective_optimization"] == "prompt_last":
            last = scores[torch.arange(8), whole["attention_mask"].sum(1) - 1]
            mask = wanted != tokenizer.unk_token_id
            picked = last.gather(1, wanted)
        else:
            mask = scores_at[:, 1:]
            picked = scores[:, :-1].gather(2, whole["input_ids"][:, 1:, None])[..., 0]
        loss = (-(picked * mask).sum(1) / mask.sum(1)).mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for weight, before in zip(trained, start, strict=True):
            if hparams["norm_constraint"]:
                weight.data.clamp_(before - hparams["norm_constraint"], before + hparams["norm_constraint"])
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("variant", "side"),
    [
        ("ee.target_new.constr", "right"),
        ("ee.target_new.unconstr", "right"),
        ("ee.prompt_last.leftpad", "left"),
        ("ee.target_new.leftpad", "left"),
    ],
)
def test_easyedit_pads_fine_tuning_where_its_masks_do_not_expect_it(stage: Stage, variant: str, side: str) -> None:
    hparams = stage.golden.hparams("ft")[variant]
    recorded = torch.tensor(stage.golden.notes("ft")["scalars"][f"{variant}.batch8.losses"]["value"][0])
    theirs = losses_there(stage, hparams, side, fixed=False)
    assert relative_error(theirs[: len(recorded)], recorded) < LOOP
    _, (ours,) = ft.run(stage, Case("ft", variant, "batch8", f"{variant}.batch8.", tuple(range(8))), hparams)
    assert relative_error(ours[:1], recorded[:1]) > 1e-2


def test_left_padding_is_wrong_for_its_positions_alone(stage: Stage) -> None:
    """With position ids, and nothing else changed, EasyEdit's left-padded batch trains as ours does."""
    variant = "ee.target_new.leftpad"
    hparams = stage.golden.hparams("ft")[variant]
    case = Case("ft", variant, "batch8", f"{variant}.batch8.", tuple(range(8)))
    _, (ours,) = ft.run(stage, case, hparams)
    assert relative_error(ours, losses_there(stage, hparams, "left", fixed=True)) < LOOP
    assert ft.positions_are_learned(stage)
