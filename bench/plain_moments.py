"""Second moments in the reference's form: one pass over the corpus for each layer, stopping at that layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Reached(Exception):
    """Raised inside a forward pass to end it: nothing above this module is wanted."""


@torch.no_grad()
def second_moment(model: PreTrainedModel, module_name: str, batches: Iterable[Tensor]) -> Tensor:
    """The mean of k k^T over all tokens of unpadded batches, k the module's input; summed in float32."""
    total: list[Tensor] = []
    count = 0

    def take(_module: nn.Module, args: Any) -> None:
        keys = args[0].reshape(-1, args[0].shape[-1]).float()
        total[:] = [keys.T @ keys if not total else total[0] + keys.T @ keys]
        raise Reached

    handle = model.get_submodule(module_name).register_forward_pre_hook(take)
    try:
        for ids in batches:
            count += ids.numel()
            try:
                model(input_ids=ids, use_cache=False)
            except Reached:
                continue
    finally:
        handle.remove()
    return total[0] / count
