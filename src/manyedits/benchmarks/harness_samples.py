"""Judgements of the harness's metrics as samples, and its aggregations as scores.

A metric's value per item is kept, so that a figure can be made again without the model. What came out of a dead model,
or of an answer that a metric cannot read at all, is ``None`` and counted apart. An answer that is empty, or in which
the task's filter finds nothing, is wrong, as the harness has it, but flagged: a zero by silence is not a zero by
mistakes.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.utils import hash_string

from manyedits.benchmarks.base import Sample, Score, mean_score
from manyedits.benchmarks.harness_items import Item

logger = logging.getLogger(__name__)

# Resamples for the error of a figure that is no mean (a perplexity, BLEU); intervals proper are made in stats.
RESAMPLES = 200

NO_FILTER = "none"

Aggregate = Callable[[Sequence[Any]], float]


# --- samples --------------------------------------------------------------------------------------------------------


def samples_of(task: Task, item: Item, truncated: bool) -> list[Sample]:
    """An item's judgements, one per metric and filter; the answer itself stands with the first."""
    samples: list[Sample] = []
    for name in item.instances[0].filtered_resps:
        flags = _flags(task, item, name, truncated)
        judged = _judged(task, item, name)
        for metric in judged or list(task.aggregation()):
            detail = {"task": item.task} if samples else _detail(task, item, name)
            value, raw = _value(task, metric, judged.get(metric))
            if raw is not None:
                detail["raw"] = raw
            samples.append(Sample(item.name, _label(metric, name), value, flags, detail))
    return samples


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == NO_FILTER else f"{metric},{filter_name}"


def _judged(task: Task, item: Item, name: str) -> dict[str, Any]:
    """What the task's metrics say; nothing if the model did not answer with numbers or a metric fails on the answer."""
    if not all(_finite(instance.resps[0]) for instance in item.instances):
        return {}
    try:
        return dict(task.process_results(item.doc, [i.filtered_resps[name] for i in item.instances]))
    except Exception as error:  # metrics are anybody's code, and a broken model says anything
        logger.warning("%s: its metric cannot judge the answer (%s: %s)", item.name, type(error).__name__, error)
        return {}


def _finite(response: Any) -> bool:
    number = response[0] if isinstance(response, tuple) else response
    return not isinstance(number, float) or math.isfinite(number)


def _flags(task: Task, item: Item, name: str, truncated: bool) -> tuple[str, ...]:
    flags = ["truncated"] if truncated else []
    for instance in item.instances:
        said = instance.resps[0]
        if isinstance(said, str) and not said.strip():
            flags.append("empty")
        if isinstance(said, str) and instance.filtered_resps[name] in _nothing_found(task, name):
            flags.append("unparsed")
    return tuple(dict.fromkeys(flags))


def _nothing_found(task: Task, name: str) -> list[Any]:
    """What a filter puts where it finds nothing."""
    steps = [step() for ensemble in getattr(task, "_filters", []) if ensemble.name == name for step in ensemble.filters]
    return [step.fallback for step in steps if hasattr(step, "fallback")]


def _detail(task: Task, item: Item, name: str) -> dict[str, Any]:
    """What a reader wants to see of an item: prompt, answer, what was expected."""
    responses = [instance.resps[0] for instance in item.instances]
    first = item.instances[0]
    shared: dict[str, Any] = {
        "task": item.task,
        "prompt_hash": hash_string(str(first.args[0]))[:16],
        "target": str(task.doc_to_target(item.doc)),
    }
    if isinstance(responses[0], str):
        return {**shared, "response": responses[0], "filtered": first.filtered_resps[name], "answer": responses[0]}
    numbers = [r[0] if isinstance(r, tuple) else r for r in responses]
    likeliest = max(range(len(numbers)), key=numbers.__getitem__) if all(map(math.isfinite, numbers)) else None
    chosen = {"answer": likeliest} if len(numbers) > 1 else {}
    return {**shared, "response": [n if math.isfinite(n) else None for n in numbers], **chosen}


def _value(task: Task, metric: str, raw: Any) -> tuple[float | None, Any]:
    """One item's number; and what the aggregation needs, where that is more than this number."""
    if raw is None:
        return None, None
    raw = _plain(raw)
    if isinstance(raw, (bool, int, float)):
        return (float(raw) if math.isfinite(raw) else None), None
    return _aggregated(_aggregate(task, metric), [raw]), raw


def _plain(raw: Any) -> Any:
    """Tuples, arrays and their numbers as lists, numbers and texts."""
    if hasattr(raw, "tolist"):
        return raw.tolist()
    return [_plain(part) for part in raw] if isinstance(raw, (tuple, list)) else raw


# --- scores ---------------------------------------------------------------------------------------------------------


def scores_of(
    whole: str | None, tasks: Mapping[str, Task], groups: Mapping[str, Group], samples: Sequence[Sample]
) -> list[Score]:
    """The figures of the benchmark, then, if it has parts, of its groups and tasks; ``whole`` is the group of all."""
    by_task = {task: [s for s in samples if s.item.rpartition("/")[0] == task] for task in tasks}
    parts = {task: _task_scores(tasks[task], of) for task, of in by_task.items()}
    if len(tasks) == 1 and not groups:
        return next(iter(parts.values()))
    summed = {group: _group_scores(groups[group], parts, by_task) for group in groups}
    own = summed.pop(whole, []) if whole is not None else []
    named = [_renamed(score, part) for part, scores in {**summed, **parts}.items() for score in scores]
    return own + named


def _renamed(score: Score, part: str) -> Score:
    return Score(f"{part}:{score.metric}", score.value, score.error, score.n, score.unscored, score.extra)


def _task_scores(task: Task, samples: Sequence[Sample]) -> list[Score]:
    labels = dict.fromkeys(sample.metric for sample in samples)
    return [_score(task, label, [s for s in samples if s.metric == label]) for label in labels]


def _score(task: Task, label: str, samples: Sequence[Sample]) -> Score:
    metric = label.partition(",")[0]
    score = mean_score(label, samples)
    extra = {**score.extra, **_answers(samples), "higher_is_better": task.higher_is_better().get(metric, True)}
    aggregate = _aggregate(task, metric)
    if aggregate is mean:
        return Score(label, score.value, score.error, score.n, score.unscored, extra)
    raw = [_raw(sample) for sample in samples if sample.value is not None]
    return Score(label, _aggregated(aggregate, raw), _error(aggregate, raw), len(raw), len(samples) - len(raw), extra)


def _raw(sample: Sample) -> Any:
    return sample.detail.get("raw", sample.value)


def _answers(samples: Sequence[Sample]) -> dict[str, float]:
    """The share of the commonest answer: near 1, the model says the same to everything."""
    said = [str(sample.detail["answer"]) for sample in samples if sample.detail.get("answer") is not None]
    return {"constant": Counter(said).most_common(1)[0][1] / len(said)} if said else {}


def _aggregate(task: Task, metric: str) -> Aggregate:
    return task.aggregation().get(metric, mean)  # type: ignore[no-any-return]


def _aggregated(aggregate: Aggregate, raw: Sequence[Any]) -> float | None:
    """A figure, or nothing if there is none: no items, or a number too large for a collapsed model's perplexity."""
    if not raw:
        return None
    try:
        value = float(aggregate(list(raw)))
    except (ArithmeticError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _error(aggregate: Aggregate, raw: Sequence[Any]) -> float | None:
    """Standard error by resampling the items, always with the same draws."""
    if len(raw) < 2:
        return None
    draw = random.Random(0)
    values = [_aggregated(aggregate, draw.choices(raw, k=len(raw))) for _ in range(RESAMPLES)]
    known = [value for value in values if value is not None]
    if len(known) < RESAMPLES:
        return None
    middle = sum(known) / len(known)
    return math.sqrt(sum((v - middle) ** 2 for v in known) / (len(known) - 1))


def _group_scores(
    group: Group, parts: Mapping[str, Sequence[Score]], by_task: Mapping[str, Sequence[Sample]]
) -> list[Score]:
    """A group's figures by its own rule: weighted by items, or every task alike."""
    members = [task.task_name for task in group.get_all_tasks() if task.task_name in parts]
    labels = dict.fromkeys(score.metric for member in members for score in parts[member])
    figures: list[Score] = []
    for rule in group.aggregate_metric_list or []:
        for label in labels:
            metric, _, name = label.partition(",")
            if metric == rule.metric and (rule.filter_list is None or (name or NO_FILTER) in rule.filter_list):
                figures.append(_group_score(label, rule.weight_by_size, members, parts, by_task))
    return figures


def _group_score(
    label: str,
    by_size: bool,
    members: Sequence[str],
    parts: Mapping[str, Sequence[Score]],
    by_task: Mapping[str, Sequence[Sample]],
) -> Score:
    scores = [s for member in members for s in parts[member] if s.metric == label]
    judged = [s for member in members for s in by_task[member] if s.metric == label]
    pooled = mean_score(label, judged)
    known = [s for s in scores if s.value is not None and s.n]
    weights = [s.n if by_size else 1 for s in known]
    total = sum(weights)
    if not total:
        return pooled
    value = sum(w * (s.value or 0.0) for w, s in zip(weights, known, strict=True)) / total
    spread = math.sqrt(sum((w * (s.error or 0.0)) ** 2 for w, s in zip(weights, known, strict=True))) / total
    extra = {**pooled.extra, **_answers(judged), "higher_is_better": known[0].extra.get("higher_is_better", True)}
    return Score(label, value, pooled.error if by_size else spread, pooled.n, pooled.unscored, extra)
