"""Keys: what enters an MLP's way out at the token where a fact is looked up.

The linear module is read as a memory from keys to values (ROME, arXiv:2202.05262, section 3.1). A request's key is the
mean over contexts; where contexts come in types, first inside each type and then over the types (MEMIT,
arXiv:2210.07229, eq. 19, as its release does it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manyedits.data import Request
from manyedits.hooks import Side, capture
from manyedits.model import EditableModel
from manyedits.tokens import FactToken, lookup_rows, pad

#: Tokens of one forward pass; texts are cut into passes by it, so passes depend on the texts alone.
TOKENS_AT_ONCE = 16_384

Rows = list[tuple[list[int], int]]


def keys_and_outputs(
    model: EditableModel,
    requests: Sequence[Request],
    contexts: Sequence[str],
    which: FactToken,
    wanted: dict[str, Side],
) -> dict[str, Tensor]:
    """Inputs or outputs of modules at the lookup position: (requests, contexts, features) by path, in 32 bit.

    Texts end at the lookup position, and the forward pass ends at the last module that is read.
    """
    rows = lookup_rows(model.tokenizer, requests, contexts, which)
    taken: dict[str, list[Tensor]] = {path: [] for path in wanted}
    for chunk in _chunks(rows):
        batch = pad([(ids, [(0, 0)] * len(ids)) for ids, _ in chunk], model.tokenizer)
        at = torch.tensor([position for _, position in chunk], device=model.device)
        row = torch.arange(len(chunk), device=model.device)
        inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs().items()}
        seen = capture(model.hf, inputs, wanted, take=lambda path, t, row=row, at=at: t[row, at].float())  # type: ignore[misc]
        for path, tensor in seen.items():
            taken[path].append(tensor)
    return {path: torch.cat(parts).unflatten(0, (len(requests), len(contexts))) for path, parts in taken.items()}


def _chunks(rows: Rows) -> Iterator[Rows]:
    chunk: Rows = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row[0]))
        if chunk and longest * (len(chunk) + 1) > TOKENS_AT_ONCE:
            yield chunk
            chunk, longest = [], len(row[0])
        chunk.append(row)
    if chunk:
        yield chunk


def mean_keys(
    model: EditableModel,
    site: str,
    requests: Sequence[Request],
    contexts: Sequence[Sequence[str]],
    which: FactToken,
    output: str,
) -> tuple[Tensor, Tensor]:
    """Keys of the module at ``site``, (n, inner), and the output of another on the bare prompt, (n, hidden).

    ``contexts`` are templates by type, the bare "{}" first of all. One pass over the model, or two where both sides of one
    module are read.
    """
    flat = [context for group in contexts for context in group]
    if output == site:
        keys = keys_and_outputs(model, requests, flat, which, {site: "in"})[site]
        current = keys_and_outputs(model, requests, flat[:1], which, {site: "out"})[site]
    else:
        seen = keys_and_outputs(model, requests, flat, which, {site: "in", output: "out"})
        keys, current = seen[site], seen[output]
    return mean_over_types(keys, contexts), current[:, 0]


def mean_over_types(keys: Tensor, contexts: Sequence[Sequence[str]]) -> Tensor:
    """(n, contexts, features) to (n, features): the mean inside each type, then over the types."""
    parts = keys.split([len(group) for group in contexts], dim=1)
    return torch.stack([part.mean(dim=1) for part in parts]).mean(dim=0)


def output_for(model: EditableModel, site: str, key: Tensor) -> Tensor:
    """What the linear module at ``site`` gives for a key (inner,), from its 32-bit weights: (hidden,)."""
    output = model.weight(f"{site}.weight") @ key
    bias = f"{site}.bias"
    return output + model.weight(bias) if bias in model.parameters_of(site) else output
