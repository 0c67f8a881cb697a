"""Capture that stops, and the forward pass from a layer on, against whole forward passes of every family."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import tiny
from manyedits.hooks import Tail, capture, output_of, select_cache

TEXTS = ["The mother tongue of Anna Velmora is Dutch", "She opened the window.", "It is a city with many parks"]


def batch(kind: str) -> dict[str, torch.Tensor]:
    from manyedits.tokens import encode, pad

    return pad(encode(tiny.tokenizer(kind), TEXTS), tiny.tokenizer(kind)).inputs()


def whole(kind: str) -> tuple[object, dict[str, torch.Tensor], torch.Tensor, DynamicCache]:
    """A model, a batch, and logits and cache of its plain forward pass."""
    model, inputs = tiny.model(kind), batch(kind)
    cache = DynamicCache()
    with torch.no_grad():
        logits = model.hf(**inputs, past_key_values=cache, use_cache=True).logits
    return model, inputs, logits, cache


def block_output(model: object, inputs: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    path = model.block(layer)  # type: ignore[attr-defined]
    return capture(model.hf, inputs, {path: "out"})[path]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", tiny.ALL)
def test_capture_sees_what_a_hook_on_a_whole_pass_sees(kind: str) -> None:
    model, inputs = tiny.model(kind), batch(kind)
    seen: dict[str, torch.Tensor] = {}
    module = model.hf.get_submodule(model.block(1))
    handle = module.register_forward_hook(lambda m, a, out: seen.update(plain=output_of(out).detach()))
    with torch.no_grad():
        model.hf(**inputs)
    handle.remove()
    assert torch.equal(block_output(model, inputs, 1), seen["plain"])


@pytest.mark.parametrize("kind", tiny.ALL)
def test_capture_stops_at_the_layer(kind: str) -> None:
    model, inputs = tiny.model(kind), batch(kind)
    ran = []
    for layer in (1, 2):
        block = model.hf.get_submodule(model.block(layer))
        block.register_forward_hook(lambda m, a, out, layer=layer: ran.append(layer))
    capture(model.hf, inputs, {model.mlp_out(1): "in"})
    assert 2 not in ran, "nothing above the layer runs"


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kind", tiny.ALL)
def test_the_tail_gives_the_logits_of_the_whole_pass(kind: str, layer: int) -> None:
    model, inputs, logits, _ = whole(kind)
    hidden = block_output(model, inputs, layer - 1)
    tail = Tail(model.hf, model.arch.blocks, layer, model.arch.final_norm, model.returns_tuple())  # type: ignore[attr-defined]
    rows, columns = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 0, 2, 4])
    positions = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    with torch.no_grad():
        found = tail(hidden, inputs["attention_mask"], positions, None, rows, columns)
    torch.testing.assert_close(found, logits[rows, columns], rtol=1e-5, atol=1e-5)
    again = model.hf(**inputs).logits  # type: ignore[attr-defined]
    assert torch.equal(again, logits), "the model is as it was"


@pytest.mark.parametrize("kind", [k for k in tiny.ALL if k not in tiny.REFUSED])
def test_the_tail_continues_after_a_cached_prefix_with_a_hole(kind: str) -> None:
    """Row r continues at its own position: cached columns from there on are masked."""
    model, inputs, logits, cache = whole(kind)
    at = torch.tensor([4, 1, 2])
    hidden, mask = block_output(model, inputs, 0), inputs["attention_mask"]
    width = int((mask.sum(1) - at).max())
    columns = torch.arange(width)
    positions = (at[:, None] + columns).clamp(max=mask.shape[1] - 1)
    rows = torch.arange(3)[:, None]
    real = mask[rows, positions] * (at[:, None] + columns < mask.shape[1])
    prefix = (torch.arange(4) < at[:, None]).long()
    tail = Tail(model.hf, model.arch.blocks, 1, model.arch.final_norm, model.returns_tuple())  # type: ignore[attr-defined]
    read = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    short = select_cache(cache, columns=4)
    with torch.no_grad():
        found = tail(hidden[rows, positions], torch.cat([prefix, real], 1), positions, short, *read)
    torch.testing.assert_close(found, logits[read[0], at[read[0]] + read[1]], rtol=1e-5, atol=1e-5)
    assert short.get_seq_length() == 4, "the cache is as it was"
