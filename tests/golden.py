"""A folder of recorded outputs of the reference editors: where things are in it, and how two tensors are compared."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def shared() -> Path:
    """The folder of material beside the checkout that is not part of the project; it may be absent."""
    return Path(os.environ.get("MANYEDITS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@dataclass(frozen=True)
class Golden:
    """One model's folder. Everything is read when first asked for."""

    folder: Path

    def _json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    @cached_property
    def requests(self) -> list[dict[str, Any]]:
        records = self._json("requests.json")
        return [{**record["requested_rewrite"], "case_id": record["case_id"]} for record in records]

    @cached_property
    def contexts(self) -> dict[str, Any]:
        return dict(self._json("contexts.json"))

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Second moments by module name, and `token_ids`, the text they were taken over."""
        return load_file(self.folder / "covariance.safetensors")

    @cached_property
    def methods(self) -> list[str]:
        """Everything with tensors and a description beside them."""
        found = [path.stem for path in sorted(self.folder.glob("*.safetensors"))]
        return [name for name in found if (self.folder / f"{name}.json").exists()]

    def hparams(self, method: str) -> dict[str, dict[str, Any]]:
        """Hyper-parameters by variant; empty when the folder has none for this method."""
        path = self.folder / "hparams" / f"{method}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def tensors(self, method: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{method}.safetensors")

    def notes(self, method: str) -> dict[str, Any]:
        """Shapes and meanings of the tensors, scalars, and what is known about the reference."""
        return dict(self._json(f"{method}.json"))

    def load(self, tokenizer: str = ".") -> tuple[Any, Any]:
        """The model as the recordings were made, in float32 with eager attention, and a tokenizer of the folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager", dtype=torch.float32, use_safetensors=True
        )
        return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(self.folder / tokenizer)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|. Infinite when the shapes differ, or one has a NaN where the other has none."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    difference = (ours - theirs).nan_to_num(0.0).abs().max().item() if ours.numel() else 0.0
    largest = theirs.nan_to_num(0.0).abs().max().item() if ours.numel() else 0.0
    return difference / largest if largest else (0.0 if not difference else float("inf"))
