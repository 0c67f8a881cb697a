"""Architecture rows on tiny real models: they resolve, a wrong one says what is wrong, the unknown is discovered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import tiny
from manyedits import arch
from manyedits.arch import ARCHS
from manyedits.errors import UserError
from manyedits.methods.base import Need, check_model
from manyedits.methods.rome import Rome


@pytest.mark.parametrize("kind", tiny.ALL)
def test_every_row_resolves_on_a_real_model(kind: str) -> None:
    hf = tiny.hf_model(kind)
    row = arch.arch_of(hf)
    assert row is ARCHS[kind]
    block = hf.get_submodule(row.blocks)[0]
    assert arch.out_features(block.get_submodule(row.mlp_out)) == 32
    assert arch.in_features(block.get_submodule(row.mlp_in)) == 32


def test_orientation_comes_from_the_type_of_the_module() -> None:
    assert arch.is_transposed(tiny.hf_model("gpt2").transformer.h[0].mlp.c_proj)
    square = nn.Linear(8, 8)
    assert not arch.is_transposed(square)


def test_a_wrong_path_is_named() -> None:
    row = dataclasses.replace(ARCHS["llama"], mlp_out="mlp.nowhere")
    with pytest.raises(UserError, match=r"mlp\.nowhere"):
        arch.check(tiny.hf_model("llama"), row)


def test_a_wrong_number_of_blocks_is_refused() -> None:
    hf = tiny.hf_model("llama")
    hf.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="3 blocks, the config says 5"):
        arch.check(hf, ARCHS["llama"])


@pytest.mark.parametrize("kind", tiny.ALL)
def test_the_flag_for_a_norm_after_the_mlp_is_what_the_model_does(kind: str) -> None:
    hf = tiny.hf_model(kind)
    assert arch._adds_to_stream(hf, ARCHS[kind]) is not ARCHS[kind].norm_after_mlp


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "phi3"])
def test_an_unknown_decoder_is_discovered(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    hf = tiny.hf_model(kind)
    hf.config.__class__ = type("Novel", (type(hf.config),), {"model_type": "novel"})
    found = arch.arch_of(hf)
    known = ARCHS[kind]
    assert (found.blocks, found.mlp_out, found.attn_out) == (known.blocks, known.mlp_out, known.attn_out)
    assert (found.mlp_in, found.final_norm, found.norm_after_mlp) == (
        known.mlp_in,
        known.final_norm,
        known.norm_after_mlp,
    )
    assert "found by structure" in caplog.text


def test_an_ambiguous_decoder_is_refused_with_what_was_ambiguous() -> None:
    hf = tiny.hf_model("llama")
    hf.config.__class__ = type("Novel", (type(hf.config),), {"model_type": "novel"})
    hf.model.layers[0].mlp.second_way_out = nn.Linear(48, 32)
    with pytest.raises(UserError, match="2 projections"):
        arch.arch_of(hf)


@pytest.mark.parametrize("kind", tiny.REFUSED)
def test_a_norm_after_the_mlp_is_refused_by_methods_that_need_addition(kind: str) -> None:
    model = tiny.model(kind)
    assert Need.ADDITIVE_MLP in Rome.needs
    with pytest.raises(UserError, match="norm stands between"):
        check_model(Rome, "rome", model)
    assert torch.isfinite(model.hf(input_ids=torch.tensor([[1, 2]])).logits).all()
