"""Second moments: equal to the plain definition, all layers in one pass, and resumed where they stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import contract
import tiny
from manyedits.artifacts import Artifacts
from manyedits.data.corpus import Corpus
from manyedits.errors import UserError
from manyedits.hooks import capture
from manyedits.methods import moments
from manyedits.methods.base import MomentParams, Supplies
from manyedits.methods.moments import second_moments

PARAMS = MomentParams(tokens=10**6, length=16)


def gather(model: object, folder: Path, paths: list[str], params: MomentParams = PARAMS) -> dict[str, torch.Tensor]:
    return second_moments(model, paths, params, Supplies(Artifacts(folder), contract.corpus()))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_moments_are_the_mean_outer_product_of_keys(kind: str, tmp_path: Path) -> None:
    model = tiny.model(kind)
    paths = [model.mlp_out(layer) for layer in (0, 2)]
    found = gather(model, tmp_path, paths)
    for path in paths:
        total, count = 0, 0
        for text in tiny.TEXT:
            ids = model.tokenizer(text)["input_ids"]
            for piece in (ids[i : i + 16] for i in range(0, len(ids), 16)):
                if len(piece) > 1:
                    keys = capture(model.hf, {"input_ids": torch.tensor([piece])}, {path: "in"})[path][0].double()
                    total, count = total + keys.T @ keys, count + len(keys)
        torch.testing.assert_close(found[path].double(), total / count, rtol=1e-5, atol=1e-6)


def test_a_stopped_pass_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PASSES_BETWEEN_NOTES", 5)
    model = tiny.model("gpt2")
    paths = [model.mlp_out(1)]
    plain = gather(model, tmp_path / "plain", paths)
    seen: list[int] = []
    see = moments._Gathering._see

    def failing(self: moments._Gathering, batch: torch.Tensor) -> None:
        if len(seen) == 12:
            raise RuntimeError("power cut")
        seen.append(self.passes)
        see(self, batch)

    monkeypatch.setattr(moments._Gathering, "_see", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        gather(model, tmp_path / "cut", paths)
    resumed: list[int] = []
    monkeypatch.setattr(moments._Gathering, "_see", lambda self, batch: (resumed.append(self.passes), see(self, batch)))
    again = gather(model, tmp_path / "cut", paths)
    assert resumed[0] == 10, "it goes on from the last note"
    assert torch.equal(again[paths[0]], plain[paths[0]])


def test_what_is_in_the_store_is_not_gathered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    first = gather(model, tmp_path, [model.mlp_out(1)])
    monkeypatch.setattr(moments._Gathering, "run", None)
    assert torch.equal(gather(model, tmp_path, [model.mlp_out(1)])[model.mlp_out(1)], first[model.mlp_out(1)])


def test_another_model_or_text_is_another_artifact(tmp_path: Path) -> None:
    one, other = tiny.model("gpt2", seed=0), tiny.model("gpt2", seed=1)
    path = one.mlp_out(1)
    assert not torch.equal(gather(one, tmp_path, [path])[path], gather(other, tmp_path, [path])[path])


def test_no_text_is_one_sentence(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(UserError, match="no text to gather"):
        second_moments(model, [model.mlp_out(0)], PARAMS, Supplies(Artifacts(tmp_path)))
    empty = Supplies(Artifacts(tmp_path), Corpus(lambda: iter(()), "empty"))
    with pytest.raises(UserError, match="holds no text"):
        second_moments(model, [model.mlp_out(0)], PARAMS, empty)
