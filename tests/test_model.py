"""The editable model and the changes: exact reset, exact trial, masters that do not drift, digests that tell states."""

from __future__ import annotations

import pytest
import torch

import tiny
from manyedits.changes import Dense, LowRank, Remember, Slices, from_tensors, size, to_tensors
from manyedits.errors import UserError
from manyedits.model import EditableModel

KINDS = ["gpt2", "llama"]


def weight_name(model: EditableModel, layer: int = 1) -> str:
    return f"{model.mlp_out(layer)}.weight"


def some_changes(model: EditableModel) -> list[LowRank | Slices | Dense]:
    name = weight_name(model)
    out, inner = model.weight(name).shape
    generator = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        LowRank(name, rand(out, 2), rand(inner, 2)),
        Slices(name, 1, torch.tensor([3, 0]), rand(2, out)),
        Slices(name, 0, torch.tensor([5]), rand(1, inner)),
        Dense(name, rand(out, inner)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_changes_mean_out_by_in_on_both_layouts(kind: str) -> None:
    model = tiny.model(kind)
    name = weight_name(model)
    before = model.weight(name).clone()
    low, columns, rows, dense = some_changes(model)
    expected = before + low.left @ low.right.T + dense.delta
    expected[:, [3, 0]] += columns.delta.T
    expected[5] += rows.delta[0]
    for change in (low, columns, rows, dense):
        model.apply(change)
    torch.testing.assert_close(model.weight(name), expected)
    module = model.hf.get_submodule(model.mlp_out(1))
    stored = module.weight.T if kind == "gpt2" else module.weight
    assert torch.equal(stored, model.weight(name))


@pytest.mark.parametrize("kind", KINDS)
def test_reset_and_trial_are_exact(kind: str) -> None:
    model = tiny.model(kind)
    states = {n: t.clone() for n, t in model.hf.state_dict().items()}
    digest = model.digest()
    with model.trying(some_changes(model)):
        assert model.digest() != digest
    assert model.digest() == digest
    for change in some_changes(model):
        model.apply(change)
    kept = model.digest()
    with pytest.raises(RuntimeError, match="on purpose"), model.trying(some_changes(model)):
        raise RuntimeError("on purpose")
    assert model.digest() == kept
    model.reset()
    assert model.digest() == digest
    for name, tensor in model.hf.state_dict().items():
        assert torch.equal(tensor, states[name])


def test_masters_do_not_drift_in_bfloat16() -> None:
    """After 200 small changes the running weight is the rounded sum, no more than one rounding away."""
    plain = tiny.hf_model("llama").to(torch.bfloat16)
    model = EditableModel.wrap(plain, tiny.tokenizer("llama"))
    name = weight_name(model)
    exact = model.weight(name).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        left = torch.randn(32, 1, generator=generator) * 1e-3
        right = torch.randn(48, 1, generator=generator) * 1e-2
        exact += left.double() @ right.double().T
        model.apply(LowRank(name, left, right))
    running = model.hf.get_submodule(model.mlp_out(1)).weight.detach()
    assert torch.equal(running, model.weight(name).to(torch.bfloat16))
    error = (running.double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-6).all())


def test_restoring_masters_is_exact() -> None:
    model = tiny.model("gpt2")
    for change in some_changes(model):
        model.apply(change)
    masters, digest = {n: t.clone() for n, t in model.masters().items()}, model.digest()
    model.reset()
    model.restore(masters)
    assert model.digest() == digest


def test_a_change_that_comes_back_to_the_base_has_the_digest_of_the_base() -> None:
    model = tiny.model("llama")
    digest = model.digest()
    name = weight_name(model)
    model.apply(Dense(name, torch.ones_like(model.weight(name))))
    base = model.base_weight(name)
    model.restore({name: base})
    assert model.digest() == digest


def test_memory_is_part_of_the_digest() -> None:
    model = tiny.model("llama")
    digest = model.digest()
    model.apply(Remember(tuple(tiny.requests(2))))
    assert model.digest() != digest
    model.reset()
    assert model.digest() == digest


def test_changes_survive_a_round_trip() -> None:
    model = tiny.model("gpt2")
    changes = [*some_changes(model), Remember(tuple(tiny.requests(3)))]
    tensors, described = to_tensors(changes)
    back = from_tensors(tensors, described)
    assert size(changes) == sum(t.numel() * t.element_size() for t in tensors.values())
    other = tiny.model("gpt2")
    for change in changes:
        model.apply(change)
    for change in back:
        other.apply(change)
    assert model.digest() == other.digest()
    assert back[-1] == changes[-1]


def test_unknown_weights_and_layers_are_named() -> None:
    model = tiny.model("llama")
    with pytest.raises(UserError, match=r"no weight `model\.nowhere\.weight`"):
        model.apply(Dense("model.nowhere.weight", torch.ones(1, 1)))
    with pytest.raises(UserError, match="Layer 7 does not exist: the model has 3 layers"):
        model.mlp_out(7)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="character offsets"):
        EditableModel.wrap(tiny.hf_model("llama"), Slow())  # type: ignore[arg-type]
