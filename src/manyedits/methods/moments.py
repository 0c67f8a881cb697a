"""Second moments of the keys over a corpus: ``C = mean over tokens of k k^T``, for all layers in one pass.

The corpus is read once; every layer that is wanted gathers from the same forward pass, which stops at the last of them.
Sums are kept in 64 bit. The pass leaves its progress behind now and then and goes on from there after a stop. A
figure for convergence is gathered on the way: how much the moments of every other batch disagree with the rest, seen
through a few random directions, which tells whether more text would change anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from manyedits import rundir
from manyedits.errors import UserError
from manyedits.hooks import capture
from manyedits.methods.base import MomentParams, Supplies
from manyedits.model import EditableModel
from manyedits.tokens import encode

logger = logging.getLogger(__name__)

#: Tokens of one forward pass.
TOKENS_AT_ONCE = 8_192
#: Passes between two notes of progress on disk.
PASSES_BETWEEN_NOTES = 200
#: Random directions that the convergence figure looks through.
DIRECTIONS = 8


def second_moments(
    model: EditableModel, paths: Sequence[str], params: MomentParams, supplies: Supplies
) -> dict[str, Tensor]:
    """The moments (features, features) of the inputs of modules, by path; from the store, or gathered now.

    Raises ``UserError`` when they are not in the store and there is no corpus to gather them from.
    """
    corpus = supplies.corpus
    if corpus is None:
        raise UserError(
            "This method needs second moments of the keys, and the experiment names no text to gather them from.",
            "Set `statistics: {corpus: FILE}` in the experiment.",
        )
    key = {
        "model": model.fingerprint,
        "dtype": str(model.hf.dtype),
        "paths": sorted(paths),
        "corpus": corpus.digest,
        "tokens": params.tokens,
        "length": _length(model, params),
        "form": 1,
    }
    gather = _Gathering(model, paths, params, supplies)
    stored = supplies.artifacts.get_or_build("second_moments", key, gather.run)
    return {path: stored[path] for path in paths}


def _length(model: EditableModel, params: MomentParams) -> int:
    limit = getattr(model.hf.config, "max_position_embeddings", None) or params.length
    return min(params.length, int(limit))


class _Gathering:
    """One pass over a corpus."""

    def __init__(self, model: EditableModel, paths: Sequence[str], params: MomentParams, supplies: Supplies) -> None:
        self.model, self.paths, self.params, self.supplies = model, list(paths), params, supplies
        self.sums: dict[str, Tensor] = {}
        self.halves: dict[str, Tensor] = {}  # (2, features, directions): the sketch of even and of odd passes
        self.tokens, self.passes = 0, 0

    def run(self, folder: Path) -> dict[str, Tensor]:
        """Gather, leaving notes of progress in ``folder``."""
        note = folder / "progress.safetensors"
        self._take_up(note)
        progress, name = self.supplies.progress, "second moments"
        progress.start(name, self.params.tokens)
        progress.advance(name, self.tokens)
        for number, batch in enumerate(self._batches()):
            if number < self.passes:
                continue
            before = self.tokens
            self._see(batch)
            progress.advance(name, self.tokens - before)
            if self.passes % PASSES_BETWEEN_NOTES == 0:
                self._note(note)
            if self.tokens >= self.params.tokens:
                break
        progress.done(name)
        return self._finished()

    def _finished(self) -> dict[str, Tensor]:
        if not self.tokens:
            raise UserError("The statistics corpus holds no text.", "Name another file in `statistics: {corpus: ...}`.")
        spread = max(float((h[0] - h[1]).norm() / h.sum(0).norm()) for h in self.halves.values())
        logger.info("second moments over %d tokens; the two halves differ by %.1f %%", self.tokens, 100 * spread)
        moments = {path: (total / self.tokens).float() for path, total in self.sums.items()}
        return {**moments, "disagreement": torch.tensor(spread), "tokens": torch.tensor(self.tokens)}

    def _see(self, batch: Tensor) -> None:
        """Add one batch (rows, tokens) of whole pieces, without padding."""
        seen = capture(self.model.hf, {"input_ids": batch.to(self.model.device)}, dict.fromkeys(self.paths, "in"))
        for path, inputs in seen.items():
            self._add(path, inputs.flatten(0, 1))
        self.tokens += batch.numel()
        self.passes += 1

    def _add(self, path: str, inputs: Tensor) -> None:
        # The product of one batch is formed in the running precision or 32 bit, the total in 64 bit.
        product = inputs.float().T @ inputs.float()
        if path not in self.sums:
            width = product.shape[0]
            self.sums[path] = torch.zeros(width, width, dtype=torch.float64, device=product.device)
            self.halves[path] = torch.zeros(2, width, DIRECTIONS, dtype=torch.float64, device=product.device)
        self.sums[path] += product
        self.halves[path][self.passes % 2] += product.double() @ self._directions(product.shape[0]).to(product.device)

    @staticmethod
    def _directions(width: int) -> Tensor:
        generator = torch.Generator().manual_seed(width)
        return torch.randn(width, DIRECTIONS, dtype=torch.float64, generator=generator)

    def _batches(self) -> Iterator[Tensor]:
        """Pieces of the corpus of equal length inside a batch: full pieces, and a text's rest by itself."""
        length = _length(self.model, self.params)
        rows: list[list[int]] = []
        assert self.supplies.corpus is not None
        for text in self.supplies.corpus.texts():
            ((ids, _),) = encode(self.model.tokenizer, [text])
            for start in range(0, len(ids), length):
                piece = ids[start : start + length]
                if len(piece) == length:
                    rows.append(piece)
                elif len(piece) > 1:
                    yield torch.tensor([piece])
                if len(rows) * length >= TOKENS_AT_ONCE:
                    yield torch.tensor(rows)
                    rows = []
        if rows:
            yield torch.tensor(rows)

    def _note(self, path: Path) -> None:
        tensors = {f"sum.{p}": t for p, t in self.sums.items()} | {f"half.{p}": t for p, t in self.halves.items()}
        facts = {"progress": json.dumps({"tokens": self.tokens, "passes": self.passes})}
        rundir.write_atomic(path, save({n: t.cpu() for n, t in tensors.items()}, metadata=facts))

    def _take_up(self, path: Path) -> None:
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            facts: Mapping[str, int] = json.loads(file.metadata()["progress"])
            self.tokens, self.passes = facts["tokens"], facts["passes"]
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                kind, _, site = name.partition(".")
                (self.sums if kind == "sum" else self.halves)[site] = file.get_tensor(name).to(self.model.device)
        logger.info("second moments: going on after %d tokens", self.tokens)
