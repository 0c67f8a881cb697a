"""The plain forms in `bench/` reproduce what the reference implementations did; so they may judge the fast ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.plain import GPT2, Fact, Options, Rows, Search, make_rows, search_value
from bench.plain_edit import MemitEdit, RomeEdit, memit_edit, memit_solve, rome_edit, rome_v
from bench.plain_moments import second_moment
from golden import Golden, relative_error, shared

FOLDER = shared() / "golden" / "gpt2-tiny"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"the recorded outputs are not at {FOLDER}")

FORWARD, GRADIENT, LOOP, INVERSE, CLOSED = 1e-5, 1e-4, 1e-3, 2e-4, 1e-6
ROME_CASES = [
    *(("cov", index) for index in range(8)),
    *((variant, index) for variant in ("nocov", "first", "after", "clamp", "break") for index in range(3)),
]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(FOLDER)


@pytest.fixture(scope="module")
def loaded(golden: Golden) -> tuple[Any, Any]:
    return golden.load()


def fact(golden: Golden, index: int) -> Fact:
    record = golden.requests[index]
    return Fact(record["prompt"], record["subject"], record["target_new"]["str"])


def options(hparams: dict[str, Any]) -> Options:
    return Options(
        where=hparams["fact_token"],
        steps=hparams["v_num_grad_steps"],
        step_size=hparams["v_lr"],
        decay=hparams["v_weight_decay"],
        clamp=hparams["clamp_norm_factor"],
        kl_factor=hparams["kl_factor"],
    )


def check(pairs: dict[str, tuple[Tensor, float]], theirs: dict[str, Tensor], prefix: str) -> None:
    """Every recorded tensor of the case that is named here lies within its tolerance; all misses in one message."""
    errors = {name: relative_error(ours, theirs[prefix + name]) for name, (ours, _) in pairs.items()}
    assert not {name: error for name, error in errors.items() if not error <= pairs[name][1]}


def search_pairs(search: Search) -> dict[str, tuple[Tensor, float]]:
    return {
        "losses": (search.losses, LOOP),
        "grad_step0": (search.grad_step0, GRADIENT),
        "delta_steps": (search.delta_steps, LOOP),
        "target": (search.target, LOOP),
    }


def rome_pairs(edit: RomeEdit) -> dict[str, tuple[Tensor, float]]:
    return {
        "keys_per_template": (edit.keys, FORWARD),
        "cur_input": (edit.cur_input, FORWARD),
        "cur_output": (edit.cur_output, FORWARD),
        **search_pairs(edit.search),
        "u": (edit.u, INVERSE),
        "v": (edit.v, LOOP),
        "delta_W": (edit.delta, LOOP),
    }


@pytest.mark.parametrize("layer", range(4))
def test_second_moments(golden: Golden, loaded: tuple[Any, Any], layer: int) -> None:
    for template in (GPT2.mlp_out, "transformer.h.{}.attn.c_proj"):
        name = template.format(layer)
        ours = second_moment(loaded[0], name, [golden.moments["token_ids"].long()])
        assert relative_error(ours, golden.moments[name]) <= FORWARD


@pytest.mark.parametrize(("variant", "index"), ROME_CASES)
def test_rome(golden: Golden, loaded: tuple[Any, Any], variant: str, index: int) -> None:
    hparams, theirs, prefix = golden.hparams("rome")[variant], golden.tensors("rome"), f"{variant}.single{index}."
    layer = hparams["layers"][0]
    moment = golden.moments[GPT2.mlp_out.format(layer)] if hparams["mom2_adjustment"] else None
    edit = rome_edit(*loaded, GPT2, layer, fact(golden, index), golden.contexts["rome"], options(hparams), moment)
    pairs = rome_pairs(edit)
    check({name: pair for name, pair in pairs.items() if prefix + name in theirs}, theirs, prefix)
    assert relative_error(edit.search.losses[0], theirs[prefix + "losses"][0]) <= FORWARD
    assert len(edit.search.losses) == golden.notes("rome")["scalars"][prefix + "steps"]["value"]


def at_padding(rows: Rows) -> Rows:
    """The rows with the reference's index for `last`: the end of the padded batch, not of the prompt."""
    return replace(rows, positions=torch.full_like(rows.positions, rows.ids.shape[1] - 1))


@pytest.mark.parametrize("index", range(3))
def test_last_of_the_reference_is_the_end_of_the_padded_batch(golden: Golden, loaded: Any, index: int) -> None:
    """The proof that `last` is broken there: with that wrong index, and only with it, the recordings come out."""
    hparams, theirs, prefix = golden.hparams("rome")["last"], golden.tensors("rome"), f"last.single{index}."
    rows = make_rows(loaded[1], fact(golden, index), golden.contexts["rome"], "last")
    module = GPT2.mlp.format(hparams["layers"][0])
    pairs = search_pairs(search_value(loaded[0], module, at_padding(rows), options(hparams)))
    check({**pairs, "grad_step0": (pairs["grad_step0"][0], 1e-2)}, theirs, prefix)
    true = search_value(loaded[0], module, rows, replace(options(hparams), steps=2))
    assert relative_error(true.losses[0], theirs[prefix + "losses"][0]) <= FORWARD
    assert relative_error(true.grad_step0, theirs[prefix + "grad_step0"]) > 1


def memit_pairs(edit: MemitEdit) -> dict[str, tuple[Tensor, float]]:
    pairs = {
        "z": (edit.z, LOOP),
        "losses": (torch.stack([search.losses for search in edit.searches]), LOOP),
        "grad_step0": (torch.stack([search.grad_step0 for search in edit.searches]), GRADIENT),
        "delta_steps0": (edit.searches[0].delta_steps, LOOP),
    }
    for place, (layer, done) in enumerate(edit.layers.items()):
        pairs[f"layer{layer}.K"] = (done.keys, LOOP if place else FORWARD)
        pairs[f"layer{layer}.cur_z"] = (done.cur_z, LOOP if place else FORWARD)
        pairs[f"layer{layer}.delta_W"] = (done.delta, LOOP)
    return pairs


@pytest.mark.parametrize(("case", "count"), [("single0", 1), ("batch8", 8)])
@pytest.mark.parametrize("variant", ["std", "loose"])
def test_memit(golden: Golden, loaded: tuple[Any, Any], variant: str, case: str, count: int) -> None:
    hparams, theirs = golden.hparams("memit")[variant], golden.tensors("memit")
    layers, facts = hparams["layers"], [fact(golden, index) for index in range(count)]
    moments = {layer: golden.moments[GPT2.mlp_out.format(layer)] for layer in layers}
    weight, types = hparams["mom2_update_weight"], golden.contexts["memit"]
    edit = memit_edit(*loaded, GPT2, layers, facts, types, options(hparams), moments, weight)
    check(memit_pairs(edit), theirs, f"{variant}.{case}.")


@pytest.mark.parametrize("variant", ["std", "loose"])
def test_memit_closed_form_alone(golden: Golden, variant: str) -> None:
    hparams, theirs, prefix = golden.hparams("memit")[variant], golden.tensors("memit"), f"{variant}.batch8."
    for left, layer in zip((3, 2, 1), hparams["layers"], strict=True):
        keys, moment = theirs[f"{prefix}layer{layer}.K"], golden.moments[GPT2.mlp_out.format(layer)]
        residual = (theirs[prefix + "z"] - theirs[f"{prefix}layer{layer}.cur_z"]).double() / left
        change = memit_solve(keys, moment, hparams["mom2_update_weight"]) @ residual
        assert relative_error(change, theirs[f"{prefix}layer{layer}.delta_W"]) <= CLOSED


def test_rome_closed_form_alone(golden: Golden) -> None:
    theirs = golden.tensors("rome")
    given = {name: theirs[f"cov.single0.{name}"] for name in ("target", "cur_output", "cur_input", "u", "v")}
    v = rome_v(given["target"], given["cur_output"], given["cur_input"], given["u"])
    assert relative_error(v, given["v"]) <= CLOSED


def test_the_model_is_left_as_it_was(golden: Golden, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    hparams = golden.hparams("memit")["std"]
    moments = {layer: golden.moments[GPT2.mlp_out.format(layer)] for layer in hparams["layers"]}
    short = replace(options(hparams), steps=2)
    types = golden.contexts["memit"]
    memit_edit(model, tokenizer, GPT2, hparams["layers"], [fact(golden, 0)], types, short, moments, 30.0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
