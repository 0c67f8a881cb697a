"""Makes a small folder in the form of the recorded outputs, out of the plain forms in `bench/` and any tiny model.

The comparison can so be tested without the recordings, and on an architecture of which there are none at hand. The
plain forms share no code with the package, and are themselves proved against real recordings elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.plain import Fact, Names, Options, Search, encode, make_rows, search_value, target_ids
from bench.plain_edit import MemitEdit, RomeEdit, memit_edit, rome_edit, rome_v, stored, weight
from bench.plain_moments import second_moment

ROME_CONTEXTS = ["{}", "She opened the window. {}", "It is a city with many parks and a river. {}"]
MEMIT_CONTEXTS = [["{}"], ROME_CONTEXTS[1:]]
BASE: dict[str, Any] = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 8,
    "v_lr": 0.1,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4.0,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
}
ROME = {
    "cov": BASE | {"layers": [1]},
    "nocov": BASE | {"layers": [1], "mom2_adjustment": False},
    "last": BASE | {"layers": [1], "fact_token": "last"},
}
MEMIT = {"std": BASE | {"layers": [0, 1], "mom2_update_weight": 30, "clamp_norm_factor": 0.75}}


def options(hparams: dict[str, Any]) -> Options:
    keys = ("fact_token", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor")
    return Options(*(hparams[key] for key in keys))


@dataclass
class Writer:
    """Writes the folder. `facts` are pairs of a fact and its old target."""

    folder: Path
    model: Any
    tokenizer: Any
    names: Names
    facts: Sequence[tuple[Fact, str]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)

    def write(self) -> Path:
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        self._json("requests.json", [self._record(i, fact, old) for i, (fact, old) in enumerate(self.facts)])
        self._json("contexts.json", {"rome": ROME_CONTEXTS, "memit": MEMIT_CONTEXTS})
        self._covariance()
        self._rome()
        self._memit()
        return self.folder

    def add_bos(self, tokenizer: Any, off: int = 0) -> None:
        """The file of EasyEdit's run with a BOS; `off` is how far its recorded indices are wrong."""
        tokenizer.save_pretrained(self.folder / "tokenizer_bos")
        kept, self.tokenizer = self.tokenizer, tokenizer
        edit = self._rome_edit("cov", 0)
        self.tensors = {"rome.single0.delta_W": edit.delta}
        self.scalars = {"lookup": {"value": [self._last_of_subject(fact) + off for fact, _ in self.facts]}}
        self._save("easyedit_bos")
        self.tokenizer = kept

    def _last_of_subject(self, fact: Fact) -> int:
        """The token with the subject's last character, found by counting characters of decoded tokens."""
        text = fact.prompt.replace("{}", fact.subject)
        end = text.index(fact.subject) + len(fact.subject)
        ids, offsets = encode(self.tokenizer, text)
        return max(i for i in range(len(ids)) if offsets[i][0] < end and offsets[i][1] > offsets[i][0])

    # --- parts ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _record(number: int, fact: Fact, old: str) -> dict[str, Any]:
        rewrite = {"prompt": fact.prompt, "subject": fact.subject, "target_new": {"str": fact.target}}
        return {"case_id": number, "requested_rewrite": rewrite | {"target_true": {"str": old}}}

    def _covariance(self) -> None:
        ids = torch.randint(3, len(self.tokenizer), (16, 32), generator=torch.Generator().manual_seed(0))
        names = [self.names.mlp_out.format(layer) for layer in range(self.model.config.num_hidden_layers)]
        self.moments = {name: second_moment(self.model, name, [ids]) for name in names}
        save_file({**self.moments, "token_ids": ids.int()}, self.folder / "covariance.safetensors")

    def _rome(self) -> None:
        for variant in ("cov", "nocov"):
            for i in range(2):
                with self._kept():
                    self._add_rome(f"{variant}.single{i}.", self._rome_edit(variant, i), [i])
        with self._kept():
            self._add_rome("last.single0.", self._broken_last(), [0])
        with self._kept():
            for i in range(2):
                self._add_rome(f"seq{i}.", self._rome_edit("cov", i), [i], sequence=True)
            self.tensors["seq.W_final"] = weight(self.model, self.names.mlp_out.format(1)).clone()
            self.tensors["seq.logprob_final"] = self._log_probabilities(range(8))
        self._save("rome", ROME)

    def _memit(self) -> None:
        for case, chosen in {"single0": [0], "batch3": [0, 1, 2]}.items():
            with self._kept():
                self._add_memit(f"std.{case}.", chosen)
        before = {name: weight(self.model, name).clone() for name in self.moments}
        with self._kept():
            for i in range(2):
                self._add_memit(f"std.seq{i}.", [i])
            for layer in MEMIT["std"]["layers"]:
                name = self.names.mlp_out.format(layer)
                change = weight(self.model, name) - before[name]
                self.tensors[f"std.seq.delta_total.{name}.weight"] = change
            self.tensors["std.seq.logprob_final"] = self._log_probabilities(range(8))
        self._save("memit", MEMIT)

    def _rome_edit(self, variant: str, number: int) -> RomeEdit:
        hparams, fact = ROME[variant], self.facts[number][0]
        moment = self.moments[self.names.mlp_out.format(1)] if hparams["mom2_adjustment"] else None
        given = (self.model, self.tokenizer, self.names, 1, fact, ROME_CONTEXTS, options(hparams), moment)
        return rome_edit(*given)

    def _broken_last(self) -> RomeEdit:
        """What the reference does with `last`: it takes the end of the padded batch."""
        edit = self._rome_edit("last", 0)
        rows = make_rows(self.tokenizer, self.facts[0][0], ROME_CONTEXTS, "last")
        wrong = replace(rows, positions=torch.full_like(rows.positions, rows.ids.shape[1] - 1))
        search = search_value(self.model, self.names.mlp.format(1), wrong, options(ROME["last"]))
        u = edit.u.roll(1)
        v = rome_v(search.target, edit.cur_output, edit.cur_input, u)
        change = stored(self.model, self.names.mlp_out.format(1), torch.outer(v, u)).float()
        return replace(edit, search=search, u=u, v=v, delta=change)

    def _add_rome(self, prefix: str, edit: RomeEdit, chosen: list[int], sequence: bool = False) -> None:
        named = {
            "u": edit.u.float(),
            "v": edit.v.float(),
            "cur_input": edit.cur_input,
            "cur_output": edit.cur_output,
            "target": edit.search.target,
            "losses": edit.search.losses,
            "grad_step0": edit.search.grad_step0,
            "delta_steps": edit.search.delta_steps,
            "logprob_before": self._log_probabilities(chosen)[0],
        }
        if not sequence:
            named |= {"delta_W": edit.delta, "keys_per_template": edit.keys}
        if prefix.startswith("last"):
            del named["keys_per_template"]
        weight(self.model, self.names.mlp_out.format(1)).add_(edit.delta)
        named["logprob_after"] = self._log_probabilities(chosen)[0]
        self._add(prefix, named, [edit.search])

    def _add_memit(self, prefix: str, chosen: list[int]) -> None:
        hparams = MEMIT["std"]
        facts, layers = [self.facts[i][0] for i in chosen], hparams["layers"]
        moments = {layer: self.moments[self.names.mlp_out.format(layer)] for layer in layers}
        before = self._log_probabilities(chosen)
        given = (self.model, self.tokenizer, self.names, layers, facts, MEMIT_CONTEXTS, options(hparams), moments)
        edit = memit_edit(*given, hparams["mom2_update_weight"])
        for layer, change in edit.layers.items():
            weight(self.model, self.names.mlp_out.format(layer)).add_(change.delta)
        probabilities = {"logprob_before": before, "logprob_after": self._log_probabilities(chosen)}
        self._add(prefix, {**self._memit_tensors(edit), **probabilities}, edit.searches)

    @staticmethod
    def _memit_tensors(edit: MemitEdit) -> dict[str, Tensor]:
        named = {
            "z": edit.z,
            "losses": torch.stack([search.losses for search in edit.searches]),
            "grad_step0": torch.stack([search.grad_step0 for search in edit.searches]),
            "delta_steps0": edit.searches[0].delta_steps,
        }
        for layer, done in edit.layers.items():
            parts = {"K": done.keys, "cur_z": done.cur_z, "delta_W": done.delta}
            named |= {f"layer{layer}.{name}": tensor for name, tensor in parts.items()}
        return named

    # --- small things -----------------------------------------------------------------------------------------------

    def _add(self, prefix: str, named: dict[str, Tensor], searches: Sequence[Search]) -> None:
        self.tensors |= {prefix + name: tensor.clone().contiguous() for name, tensor in named.items()}
        counts = [len(search.losses) for search in searches]
        self.scalars[prefix + "steps"] = {"value": counts if "std" in prefix else counts[0]}

    @torch.no_grad()
    def _log_probabilities(self, chosen: Sequence[int]) -> Tensor:
        """Mean log-probabilities of the new and the old target, (requests, 2)."""
        return torch.tensor([[self._mean(self.facts[i][0], word) for word in self._both(i)] for i in chosen])

    def _both(self, number: int) -> tuple[str, str]:
        return self.facts[number][0].target, self.facts[number][1]

    def _mean(self, fact: Fact, target: str) -> float:
        text = fact.prompt.replace("{}", fact.subject)
        before, wanted = self.tokenizer(text)["input_ids"], target_ids(self.tokenizer, text, target)
        logits = self.model(input_ids=torch.tensor([before + wanted]), use_cache=False).logits[0, len(before) - 1 : -1]
        return float(torch.log_softmax(logits, -1)[range(len(wanted)), wanted].mean())

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Puts all weights back afterwards."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        yield
        self.model.load_state_dict(before)

    def _json(self, name: str, value: Any) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value), encoding="utf-8")

    def _save(self, method: str, hparams: dict[str, Any] | None = None) -> None:
        save_file(self.tensors, self.folder / f"{method}.safetensors")
        self._json(f"{method}.json", {"scalars": self.scalars, "known_behaviour": []})
        if hparams is not None:
            self._json(f"hparams/{method}.json", hparams)
        self.tensors, self.scalars = {}, {}
