"""Fine-tuning, of ROME's baselines (`orig`) and of EasyEdit (`ee`): losses of every step, changes, probabilities.

A case is one edit of one request, one of eight, or five edits one after another. EasyEdit pads batches where its masks do
not expect it; what that spoils is told apart by what is wrong, not by the model's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from golden import relative_error
from manyedits.methods.base import Recorder
from manyedits.methods.ft import FtL
from manyedits.tokens import encode
from parity_methods.stage import Stage
from parity_methods.table import BROKEN, EQUAL, FORWARD, LOOP, SKIPPED, Case, Row, Rule, Table

#: Sequences of fine-tuning drift most, in single entries: Adam divides by the size of a gradient, and where that is all
#: rounding, so is the step. A repetition of the reference in 64 bit is 1.5e-3 off in such an entry. So this many
#: entries of a weight are judged by themselves, and the others as strictly as anything else.
SINGLE_ENTRIES, DRIFT = 3, 5e-3

RIGHT = "its mask of the target assumes padding on the left, the batch was padded on the right"
LEFT = "its index of the last token assumes padding on the right, the batch was padded on the left"
MOVED = "padded on the left without position ids, so learned positions are off"
COUNTED = "padding is counted as target tokens, since the tokenizer's unknown token is not its padding"


class FtAdapter:
    method = "ft"

    def rows(self, stage: Stage) -> list[Row]:
        scalars = stage.golden.notes(self.method)["scalars"]
        table = Table(self.method, stage.golden.tensors(self.method))
        for variant, hparams in stage.golden.hparams(self.method).items():
            for name in _cases(table.recorded, variant):
                self._case(stage, table, _case_of(variant, name), hparams, scalars)
        timings = sum(key.endswith("time_s") for key in scalars)
        timed = Row(7, self.method, "-", "-", f"(time_s of {timings} cases)", SKIPPED + "a timing")
        return [*table.close(), timed]

    def _case(
        self, stage: Stage, table: Table, case: Case, hparams: Mapping[str, Any], scalars: Mapping[str, Any]
    ) -> None:
        """Run and compare one case, or say why it cannot be compared."""
        theirs = {key.removeprefix(case.prefix): t for key, t in table.recorded.items() if key.startswith(case.prefix)}
        fault = fault_of(stage, case, hparams)
        ours, losses = ({}, []) if fault else run(stage, case, hparams)
        for name in theirs:
            if fault:
                table.excuse(case, 7, name, fault)
            else:
                self._compare(table, case, name, ours.get(name), theirs[name])
        self._losses(table, case, fault, losses, scalars[case.prefix + "losses"]["value"])

    @staticmethod
    def _compare(table: Table, case: Case, name: str, ours: Tensor | None, theirs: Tensor) -> None:
        """One tensor; the entries of a sequence's weight that drifted most apart from the others."""
        if case.name != "seq" or ours is None or theirs.dim() != 2 or not name.startswith("delta."):
            table.compare(case, name, Rule(name, 7, LOOP), ours)
            return
        worst = (ours - theirs).abs().flatten().topk(SINGLE_ENTRIES).indices
        most = ours.flatten().index_copy(0, worst, theirs.flatten()[worst]).view_as(ours)
        table.compare(case, name, Rule(name, 7, LOOP, label=f" but {SINGLE_ENTRIES}"), most)
        table.compare(case, name, Rule(name, 7, DRIFT, label=f" ({SINGLE_ENTRIES} worst)"), ours)

    @staticmethod
    def _losses(table: Table, case: Case, fault: str | None, ours: list[Tensor], theirs: list[list[float]]) -> None:
        """The loss before any step, every loss, and their number, which says when training ended."""
        if fault:
            table.tell(case, 5, "losses", BROKEN + fault)
            return
        recorded = [torch.tensor(row) for row in theirs]
        off = max(abs(len(a) - len(b)) for a, b in zip(ours, recorded, strict=True))
        table.judge(case, 5, "steps", float(off), EQUAL)
        table.judge(case, 4, "losses[0]", relative_error(ours[0][:1], recorded[0][:1]), FORWARD)
        worst = max(relative_error(a, b) for a, b in zip(ours, recorded, strict=True))
        table.judge(case, 5, "losses", worst, LOOP)


def _cases(recorded: Mapping[str, Tensor], variant: str) -> list[str]:
    names = (key.removeprefix(f"{variant}.").split(".")[0] for key in recorded if key.startswith(f"{variant}."))
    return list(dict.fromkeys(names))


def _case_of(variant: str, name: str) -> Case:
    kind = name.rstrip("0123456789")
    number = int(name[len(kind) :] or 5)
    requests = (number,) if kind == "single" else tuple(range(number))
    return Case("ft", variant, name, f"{variant}.{name}.", requests)


def params_of(hparams: Mapping[str, Any]) -> FtL:
    """Ours with a variant's parameters; `orig` has one objective, and chunks larger than any recorded batch."""
    params = FtL.Params(
        layers=tuple(hparams["layers"]),
        steps=hparams["num_steps"],
        step_size=hparams["lr"],
        weight_decay=hparams["weight_decay"],
        constraint=hparams["norm_constraint"] or None,
        objective=hparams.get("objective_optimization", "prompt_last"),
        chunk=hparams.get("batch_size", 64),
    )
    return FtL(params)


def run(stage: Stage, case: Case, hparams: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Changes and probabilities after a case, and the losses of each of its edits."""
    model, method, losses = stage.model, params_of(hparams), []
    model.reset()
    for chosen in [(one,) for one in case.requests] if case.name == "seq" else [case.requests]:
        method.recorder = Recorder()
        for change in method.edit(model, stage.chosen(chosen)).changes:
            model.apply(change)
        losses.append(method.recorder.tensors["losses"])
    names = [n for layer in hparams["layers"] for n in model.parameters_of(model.mlp_out(layer))]
    ours = {f"delta.{name}": stage.stored(name, model.weight(name) - model.base_weight(name)) for name in names}
    ours["logprob_after"] = stage.log_probabilities(case.requests)
    model.reset()
    return ours, losses


def fault_of(stage: Stage, case: Case, hparams: Mapping[str, Any]) -> str | None:
    """What padding spoiled in the reference; nothing is padded outside batches."""
    if not case.name.startswith("batch"):
        return None
    left = case.variant.endswith("leftpad")
    if hparams.get("objective_optimization", "prompt_last") == "target_new":
        return (MOVED if positions_are_learned(stage) else None) if left else RIGHT
    words = stage.model.tokenizer
    return LEFT if left else (None if words.unk_token_id == words.pad_token_id else COUNTED)


@torch.no_grad()
def positions_are_learned(stage: Stage) -> bool:
    """Whether padding in front, masked, changes what the model says of a text when no position ids are given."""
    model: Any = stage.model
    ((ids, _),) = encode(model.tokenizer, [stage.requests[0].text])
    plain = model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
    mask = torch.tensor([[0, 0, 0, *[1] * len(ids)]])
    padded = model.hf(input_ids=torch.tensor([[0, 0, 0, *ids]]), attention_mask=mask).logits[0, -1]
    return relative_error(padded, plain) > LOOP


ADAPTER = FtAdapter()
