"""ROME and MEMIT in their plainest form: the oracle of the fast ones.

ROME (Meng et al. 2022): one rank-one change that maps the subject's key to the found value::

    u = C^-1 k / |C^-1 k|,   v = (v* - W k0) / (k0 . u),   W <- W + v u^T

`k` is the mean key over the contexts, `k0` the key of the bare prompt (the authors' release uses the two so).
MEMIT (Meng et al. 2023, eq. 14) for each of several layers, lowest first, the earlier changes in place::

    W <- W + R K^T (lambda C + K K^T)^-1,   R = (z - h) / layers left

Solves are dense, in float64. All functions leave the model as they found it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.plain import (
    Fact,
    Names,
    Options,
    Search,
    encode,
    hooked,
    in_context,
    make_rows,
    position,
    search_value,
    tensor_of,
)


@dataclass(frozen=True)
class RomeEdit:
    keys: Tensor
    cur_input: Tensor
    cur_output: Tensor
    search: Search
    u: Tensor
    v: Tensor
    delta: Tensor


@dataclass(frozen=True)
class LayerEdit:
    keys: Tensor
    cur_z: Tensor
    delta: Tensor


@dataclass(frozen=True)
class MemitEdit:
    searches: tuple[Search, ...]
    z: Tensor
    layers: dict[int, LayerEdit]


@torch.no_grad()
def read(
    model: PreTrainedModel, tokenizer: Any, name: str, fact: Fact, context: str, where: str
) -> tuple[Tensor, Tensor]:
    """Input and output of a module at the fact's token, from a full forward over this one text."""
    text, start, end = in_context(fact, context)
    tokens, offsets = encode(tokenizer, text)
    index = position(offsets, start, end, where)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, args: Any, output: Any) -> None:
        seen.append((args[0][0, index].clone(), tensor_of(output)[0, index].clone()))

    with hooked(model.get_submodule(name), keep):
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    return seen[0]


def weight(model: PreTrainedModel, name: str) -> Tensor:
    """A module's weight, in the orientation in which it is kept, sharing the model's memory."""
    return model.get_parameter(f"{name}.weight").data


def stored(model: PreTrainedModel, name: str, change: Tensor) -> Tensor:
    """A change given as (out, in), in the orientation in which the module keeps its weight."""
    is_linear = isinstance(model.get_submodule(name), nn.Linear)
    return (change if is_linear else change.T).contiguous()


def rome_u(key: Tensor, moment: Tensor | None) -> Tensor:
    """The direction of the rank-one change on the input side; without a moment the key's own."""
    vector = key.double() if moment is None else torch.linalg.solve(moment.double(), key.double())
    return vector / vector.norm()


def rome_v(target: Tensor, cur_output: Tensor, cur_input: Tensor, u: Tensor) -> Tensor:
    """The output side, such that the bare prompt's key is mapped onto the target."""
    return (target.double() - cur_output.double()) / (cur_input.double() @ u.double())


def memit_solve(keys: Tensor, moment: Tensor, weight: float) -> Tensor:
    """(weight * C + K K^T)^-1 K for keys in rows: (requests, inner) -> (inner, requests)."""
    columns = keys.double().T
    return torch.linalg.solve(weight * moment.double() + columns @ columns.T, columns)


def rome_edit(
    model: PreTrainedModel,
    tokenizer: Any,
    names: Names,
    layer: int,
    fact: Fact,
    contexts: Sequence[str],
    options: Options,
    moment: Tensor | None,
) -> RomeEdit:
    """The first of the contexts must be the bare prompt, "{}"."""
    name = names.mlp_out.format(layer)
    keys = torch.stack([read(model, tokenizer, name, fact, context, options.where)[0] for context in contexts])
    cur_input, cur_output = read(model, tokenizer, name, fact, "{}", options.where)
    u = rome_u(keys.mean(0), moment)
    rows = make_rows(tokenizer, fact, contexts, options.where)
    search = search_value(model, names.mlp.format(layer), rows, options)
    v = rome_v(search.target, cur_output, cur_input, u)
    delta = stored(model, name, torch.outer(v, u)).float()
    return RomeEdit(keys, cur_input, cur_output, search, u, v, delta)


def mean_key(
    model: PreTrainedModel, tokenizer: Any, name: str, fact: Fact, types: Sequence[Sequence[str]], where: str
) -> Tensor:
    """The mean inside each type of context first, then over the types: the bare prompt weighs as all prefixes do."""
    means = []
    for contexts in types:
        keys = [read(model, tokenizer, name, fact, context, where)[0] for context in contexts]
        means.append(torch.stack(keys).mean(0))
    return torch.stack(means).mean(0)


def memit_edit(
    model: PreTrainedModel,
    tokenizer: Any,
    names: Names,
    layers: Sequence[int],
    facts: Sequence[Fact],
    types: Sequence[Sequence[str]],
    options: Options,
    moments: dict[int, Tensor],
    moment_weight: float,
) -> MemitEdit:
    """`types` is the contexts by type, the first of the first being the bare prompt."""
    contexts = [context for group in types for context in group]
    block = names.block.format(layers[-1])
    searches = tuple(
        search_value(model, block, make_rows(tokenizer, fact, contexts, options.where), options) for fact in facts
    )
    z = torch.stack([search.target for search in searches])
    kept = {layer: weight(model, names.mlp_out.format(layer)).clone() for layer in layers}
    done: dict[int, LayerEdit] = {}
    for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        name = names.mlp_out.format(layer)
        keys = torch.stack([mean_key(model, tokenizer, name, fact, types, options.where) for fact in facts])
        cur_z = torch.stack([read(model, tokenizer, block, fact, "{}", options.where)[1] for fact in facts])
        right = memit_solve(keys, moments[layer], moment_weight)
        change = ((z - cur_z).double() / left).T @ right.T
        done[layer] = LayerEdit(keys, cur_z, stored(model, name, change).float())
        weight(model, name).add_(done[layer].delta)
    for layer, weights in kept.items():
        weight(model, names.mlp_out.format(layer)).copy_(weights)
    return MemitEdit(searches, z, done)
