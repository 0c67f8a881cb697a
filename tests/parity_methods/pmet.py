"""PMET: two vectors searched together, then as MEMIT with the square root of the layers left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from manyedits.arch import is_transposed
from manyedits.methods.base import EditMethod
from manyedits.methods.pmet import Pmet
from manyedits.methods.solve import Factored
from parity_methods.edits import EditAdapter, Hparams, Tensors, first_evaluation, without_padding
from parity_methods.stage import Stage, spread_params
from parity_methods.table import CLOSED, FORWARD, GRADIENT, LOOP, Broken, Rule

TRANSPOSED = "attention's square weight got its change transposed there, so what came after it differs too"


class PmetAdapter(EditAdapter):
    method: ClassVar[str] = "pmet"
    default: ClassVar[str] = "std"

    def make(self, stage: Stage, hparams: Hparams) -> EditMethod:
        shared = spread_params(stage, hparams)
        value = {**shared["value"].model_dump(), "sure_weight": 0.1 * hparams["nll_loss_factor"]}
        params = Pmet.Params(
            **{**shared, "value": value},
            weight=hparams["mom2_update_weight"],
            attn_and_mlp=len(hparams["rewrite_module_tmps"]) == 2,
        )
        return Pmet(params)

    def rows(self, stage: Stage) -> list[Any]:
        """Where weights are kept as (in, out), a change of a square one is added transposed by the reference."""
        turned = is_transposed(stage.model.hf.get_submodule(stage.model.attn_out(0)))
        layers = stage.golden.hparams(self.method)["attn_and_mlp"]["layers"]
        self.broken = _broken(layers) if turned else ()  # type: ignore[misc]
        return super().rows(stage)

    def rules(self, hparams: Hparams) -> Sequence[Rule]:
        first, *later = hparams["layers"]
        modules = "(attn|mlp)" if len(hparams["rewrite_module_tmps"]) == 2 else "mlp"
        before = "attn" if modules != "mlp" else "mlp"  # the module that is edited first
        rest = "|".join(str(layer) for layer in later) or "none"
        return (
            Rule(rf"layer{first}\.{before}\.(K|cur_z)|logprob_before", 3, FORWARD, edited=LOOP),
            Rule("losses", 4, FORWARD, edited=LOOP, part=first_evaluation, label="[0]"),
            Rule("grad_step0", 4, GRADIENT, edited=LOOP),
            Rule("delta_steps0|losses|z_mlp|z_attn", 5, LOOP),
            Rule(rf"layer({rest})\.{modules}\.(K|cur_z)", 7, LOOP),
            *([Rule(rf"layer{first}\.mlp\.(K|cur_z)", 7, LOOP)] if before == "attn" else []),
            Rule(r"layer\d+\.\w+\.delta_W|logprob_after|delta_total\..+|logprob_final", 7, LOOP),
        )

    def named(self, recorded: Tensors) -> Tensors:
        ours = {name: tensor for name, tensor in recorded.items() if not name.endswith("delta_W")}
        if "delta_steps" in ours:
            ours["delta_steps0"] = without_padding(ours["delta_steps"][0], ours["losses"][0])
        return ours

    def _deltas(self, stage: Stage, changes: Sequence[Any]) -> Tensors:
        """Changes by layer and module."""
        named = {}
        for change in changes:
            path = change.weight.removesuffix(".weight")
            layer = int(path.removeprefix(stage.model.arch.blocks + ".").split(".")[0])
            module = "attn" if path == stage.model.attn_out(layer) else "mlp"
            named[f"layer{layer}.{module}.delta_W"] = stage.stored(change.weight, change.delta())
        return named

    def closed_forms(self, stage: Stage, hparams: Hparams, theirs: Tensors) -> Iterator[tuple[str, Tensor, float]]:
        layers, weight = hparams["layers"], hparams["mom2_update_weight"]
        for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
            for module, path in {"attn": stage.model.attn_out, "mlp": stage.model.mlp_out}.items():
                place, site = f"layer{layer}.{module}", path(layer)
                if {f"z_{module}", *(f"{place}.{name}" for name in ("K", "cur_z", "delta_W"))} <= theirs.keys():
                    right = Factored(stage.golden.moments[site]).spread(theirs[f"{place}.K"].T, weight)
                    missing = (theirs[f"z_{module}"] - theirs[f"{place}.cur_z"]).double() / math.sqrt(left)
                    yield f"{place}.delta_W", stage.stored(f"{site}.weight", missing.T @ right.T), CLOSED


def _broken(layers: Sequence[int]) -> tuple[Broken, ...]:
    """All that came after the first change of attention's weight."""
    first, rest = layers[0], "|".join(str(layer) for layer in layers[1:])
    return (
        Broken("attn_and_mlp", r"layer\d+\.attn\.delta_W", frozenset({6, 7}), TRANSPOSED),
        Broken("attn_and_mlp", rf"layer{first}\.mlp\.(K|cur_z|delta_W)", frozenset({7}), TRANSPOSED),
        Broken("attn_and_mlp", rf"layer({rest})\..+", frozenset({7}), TRANSPOSED),
        Broken("attn_and_mlp", "logprob_after|logprob_final|delta_total.+", frozenset({7}), TRANSPOSED),
    )


ADAPTER = PmetAdapter()
