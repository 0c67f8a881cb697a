"""The search for several vectors in one block gives what a full forward pass per step gives, on every architecture."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import tiny
from bench.plain import Fact, divergence, hooked, likelihood_loss, make_rows, tensor_of
from golden import relative_error
from manyedits.data import Request
from manyedits.methods.base import ValueParams
from manyedits.methods.value import Easing, Place, find_values_at
from manyedits.model import EditableModel

CONTEXTS = ("{}", "She opened the window. {}")
CLOSE = 1e-4


def requests() -> list[Request]:
    early = Request(id="early", subject="Hugo Lantern", prompt="{} grew up speaking", target="Old Greek")
    return [*tiny.requests(2), early]


def place(model: EditableModel, layer: int) -> Place:
    return Place(layer, (model.mlp_out(layer), model.attn_out(layer)), inside=True)


@dataclass
class Plain:
    """One request: both vectors are added in a forward pass over everything; losses and vectors of every step."""

    model: EditableModel
    place: Place
    request: Request
    params: ValueParams
    easing: Easing | None = None

    def logits(self, deltas: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        rows, seen = self.rows, []
        index = torch.arange(len(rows.ids)), rows.positions

        def add(delta: Tensor, output: object) -> object:
            given = tensor_of(output)
            hidden = given.reshape(*rows.ids.shape, -1)
            seen.append(hidden[0, rows.positions[0]].detach())
            changed = hidden.index_put(index, hidden[index] + delta).reshape(given.shape)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])  # type: ignore[index]

        with ExitStack() as stack:
            for path, delta in zip(self.place.sites, deltas, strict=True):
                module = self.model.hf.get_submodule(path)
                stack.enter_context(hooked(module, lambda m, a, out, delta=delta: add(delta, out)))
            out = self.model.hf(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits
        return out, seen

    def run(self) -> tuple[Tensor, Tensor]:
        """Losses (steps, 4), and both targets side by side."""
        fact = Fact(self.request.prompt, self.request.subject, self.request.target)
        self.rows = make_rows(self.model.tokenizer, fact, CONTEXTS, "subject_last")
        deltas = [torch.zeros(self.model.hidden_size, requires_grad=True) for _ in range(2)]
        with torch.no_grad():
            starts = self._starts(deltas)
        optimiser, losses, before, weight = torch.optim.Adam(deltas, lr=self.params.step_size), [], None, 1.0
        for step in range(self.params.steps):
            logits, _ = self.logits(deltas)
            now = torch.log_softmax(logits[-1, self.rows.positions[-1]], -1)
            before = now.detach() if before is None else before
            decay = sum(d.norm() / s.norm() ** 2 for d, s in zip(deltas, starts, strict=True))
            nll = weight * likelihood_loss(logits, self.rows.labels)
            kl = self.params.kl_weight * divergence(now, before)
            total = nll + kl + self.params.weight_decay * decay
            losses.append(torch.stack([total, nll, kl, self.params.weight_decay * decay]).detach())
            sure = self.easing is not None and self.sure(logits)
            if step == self.params.steps - 1 or (
                sure and self.easing is not None and float(kl.detach()) <= self.easing.kl
            ):
                break
            weight = self.easing.weight if sure and self.easing is not None else 1.0
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            for delta, start in zip(deltas, starts, strict=True):
                delta.data *= min(1.0, float(self.params.clamp * start.norm() / delta.detach().norm()))
        return torch.stack(losses), torch.cat([s + d.detach() for s, d in zip(starts, deltas, strict=True)])

    def _starts(self, deltas: list[Tensor]) -> list[Tensor]:
        """What stands at both places, in the order of the places and not in that of the forward pass."""
        return [self.logits([*deltas])[1][self._order()[i]] for i in range(2)]

    def _order(self) -> list[int]:
        """Where in the forward pass each place comes."""
        ran: list[str] = []
        with ExitStack() as stack:
            for path in self.place.sites:
                module = self.model.hf.get_submodule(path)
                stack.enter_context(hooked(module, lambda m, a, out, path=path: ran.append(path)))
            self.model.hf(input_ids=self.rows.ids, attention_mask=self.rows.mask)
        return [ran.index(path) for path in self.place.sites]

    def sure(self, logits: Tensor) -> bool:
        chosen = self.rows.labels != -100
        return bool((logits.argmax(-1) == self.rows.labels)[chosen].all())


def taken(
    model: EditableModel, layer: int, chosen: list[Request], params: ValueParams, easing: Easing | None = None
) -> list[int]:
    """How many losses each request's search evaluated, after comparing all of them, and the targets."""
    at, counts = place(model, layer), []
    found = find_values_at(model, chosen, at, CONTEXTS, params, easing)
    for request, losses, target in zip(chosen, found.losses, found.target, strict=True):
        expected, wanted = Plain(model, at, request, params, easing).run()
        counts.append(int((~losses[:, 0].isnan()).sum()))
        assert counts[-1] == len(expected)
        assert relative_error(losses[: len(expected)], expected) <= CLOSE
        assert relative_error(target, wanted) <= CLOSE
    return counts


@pytest.mark.parametrize("kind", tiny.ADDITIVE)
def test_two_vectors_in_one_block(kind: str) -> None:
    params = ValueParams(steps=6, step_size=0.1, clamp=0.5, stop_below=0.0)
    assert taken(tiny.model(kind), 1, requests(), params) == [6, 6, 6]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_request_eases_off_and_leaves_once_its_target_is_likeliest(kind: str) -> None:
    """At the last layer of a random model, at the prompt's last token, a vector can still reach its target."""
    chosen = [
        Request(id=one.id, subject=one.subject, prompt="French is spoken by {}", target=one.target)
        for one in tiny.requests(6)
    ]
    params = ValueParams(steps=12, step_size=1.0, clamp=1e3, weight_decay=0.0, kl_weight=0.01, stop_below=0.0)
    eased, plain = (taken(tiny.model(kind), 2, chosen, params, e) for e in (Easing(0.1, 0.035), None))
    assert plain == [12] * 6
    assert min(eased) < 12 == max(eased)
