"""What the variants of the locate-then-edit methods promise, read off an edited model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import contract
import tiny
from golden import relative_error
from manyedits.changes import LowRank
from manyedits.methods import METHODS
from manyedits.methods.base import Edit, EditMethod, Recorder, presets_of
from manyedits.methods.keys import keys_and_outputs
from manyedits.model import EditableModel

kinds = pytest.mark.parametrize("kind", ["gpt2", "llama"])


def ready(name: str, kind: str, folder: Path, **changed: Any) -> tuple[EditableModel, EditMethod]:
    """A tiny model and a method with its preset for such, some parameters changed."""
    model, cls = tiny.model(kind), METHODS.load(name)
    method: EditMethod = cls(cls.Params(**{**presets_of(name)["tiny"]["params"], **changed}))
    method.prepare(model, contract.supplies(folder))
    method.recorder = Recorder()
    return model, method


def make(model: EditableModel, method: EditMethod, count: int = 1) -> Edit:
    """Edit, and leave the edit in the model."""
    edit = method.edit(model, tiny.requests(count))
    for change in edit.changes:
        model.apply(change)
    return edit


@kinds
@pytest.mark.parametrize("key", ["prompt_keys", "prefix_keys"])
def test_r_rome_maps_its_key_onto_the_target(kind: str, key: str, tmp_path: Path) -> None:
    """The key of the variant, read from the edited model: what stands below the layer did not change."""
    model, method = ready("r-rome", kind, tmp_path, key=key)
    make(model, method)
    site = model.mlp_out(method.params.layer)
    outputs = keys_and_outputs(model, tiny.requests(1), method.contexts, "subject_last", {site: "out"})[site][0]  # type: ignore[attr-defined]
    now = outputs[0] if key == "prompt_keys" else outputs.mean(0)
    assert method.recorder is not None
    assert relative_error(now, method.recorder.tensors["target"]) < 1e-4


@kinds
def test_emmet_gives_a_single_request_exactly_what_was_missing(kind: str, tmp_path: Path) -> None:
    """At one layer, without contexts, the block's output at the subject becomes the target; damped, it stays short."""
    off, bare = {}, {"texts": [["{}"]]}
    for damp in (False, True):
        model, method = ready("emmet", kind, tmp_path, layers=(1,), contexts=bare, damp_single=damp, damping=10.0)
        make(model, method)
        block = model.block(1)
        now = keys_and_outputs(model, tiny.requests(1), ["{}"], "subject_last", {block: "out"})[block][:, 0]
        assert method.recorder is not None
        off[damp] = relative_error(now, method.recorder.tensors["z"])
    assert off[False] < 1e-4 < off[True]


@kinds
def test_pmet_edits_attention_when_asked(kind: str, tmp_path: Path) -> None:
    model, method = ready("pmet", kind, tmp_path, attn_and_mlp=True)
    edit = make(model, method, 2)
    expected = [f"{path(layer)}.weight" for layer in (0, 1) for path in (model.attn_out, model.mlp_out)]
    assert [c.weight for c in edit.changes if isinstance(c, LowRank)] == expected
    assert set(model.masters()) == set(expected)


@kinds
def test_alphaedit_leaves_the_usual_keys_alone(kind: str, tmp_path: Path) -> None:
    """A change maps every key outside the null space onto nothing, and the history makes the next edit another one."""
    model, method = ready("alphaedit", kind, tmp_path)
    edit = method.edit(model, tiny.requests(1))
    for layer, change in zip(method.params.layers, edit.changes, strict=True):
        assert isinstance(change, LowRank)
        projector = method.projectors[layer]  # type: ignore[attr-defined]
        usual = torch.eye(len(projector.basis), dtype=torch.float64)
        usual = usual - projector(usual)
        assert float((change.delta().double() @ usual).abs().max()) < 1e-4 * float(change.delta().abs().max())
    method.recall(edit)
    again = method.edit(model, tiny.requests(1))
    assert not torch.equal(edit.changes[0].right, again.changes[0].right)  # type: ignore[union-attr]
