"""What a benchmark is: items prepared once per run, judged at every checkpoint, and figures made of the judgements.

Judgements are kept item by item, so that a figure can be computed again without the model, and two checkpoints can be
compared on the same items. What could not be judged is ``None`` and counted apart; it is never a zero.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from manyedits.data import Request
from manyedits.model import EditableModel


@dataclass(frozen=True)
class Setting:
    """What an experiment tells its benchmarks."""

    requests: tuple[Request, ...] = ()  # in the order in which they are edited, up to the last checkpoint
    seed: int = 0
    limit_items: int | None = None  # the most items of a task
    max_new_tokens: int | None = None  # the longest generated answer, in tokens
    chat: str = "auto"
    texts: tuple[str, ...] = ()  # the first texts of the statistics corpus
    data_dir: str | None = None  # where benchmark files lie, when they do not come from the hub


@dataclass(frozen=True)
class Sample:
    """One judgement of one item."""

    item: str
    metric: str
    value: float | None  # None: could not be judged
    flags: tuple[str, ...] = ()  # "empty", "unparsed", "truncated"
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One figure: a mean over items with its standard error."""

    metric: str
    value: float | None
    error: float | None
    n: int
    unscored: int
    extra: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """One benchmark of a run."""

    name: str
    version: ClassVar[int] = 1

    def prepare(self, model: EditableModel, setting: Setting) -> None:  # noqa: B027  (a default, not a gap)
        """Read, render and tokenise, once per run, on the unedited model."""

    @abstractmethod
    def run(self, model: EditableModel, step: int) -> list[Sample]:
        """Judge every item on the model as it stands after ``step`` requests."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Figures out of judgements: a mean per metric."""
        metrics = dict.fromkeys(sample.metric for sample in samples)
        return [mean_score(metric, [s for s in samples if s.metric == metric]) for metric in metrics]

    @abstractmethod
    def digest(self, step: int) -> str:
        """Identity of what is asked at a step: items as rendered, decoding, limits, version."""


def mean_score(metric: str, samples: Sequence[Sample]) -> Score:
    """The mean of the judgements that could be made, with its standard error."""
    values = [s.value for s in samples if s.value is not None and math.isfinite(s.value)]
    flags = sorted({flag for s in samples for flag in s.flags})
    extra = {flag: sum(flag in s.flags for s in samples) for flag in flags}
    if not values:
        return Score(metric, None, None, 0, len(samples), extra)
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    error = math.sqrt(spread / len(values)) if len(values) > 1 else None
    return Score(metric, mean, error, len(values), len(samples) - len(values), extra)


def content_digest(content: Any) -> str:
    """sha256 of anything JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
