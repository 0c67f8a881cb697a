"""The world's exercises as tasks of lm-evaluation-harness: ``suite:world``, and ``suite:world-instruct`` with refusals.

Generated answers end at the full stop and are compared exactly; of a chain of thought only the last word counts. Truth and
attitude are choices by likelihood, as in the benchmarks that they mirror.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from manyedits.world.exercises import Exercises, Item
from manyedits.world.facts import World

#: Exercise, the benchmark that it mirrors, and how it is asked: generated, its last word generated, or chosen.
MIRRORS = {
    "knowledge": ("MMLU", "generated"),
    "category": ("CSQA", "generated"),
    "words": ("GSM8K", "last"),
    "boolean": ("BBH", "last"),
    "sort": ("BBH", "generated"),
    "compare": ("BBH", "generated"),
    "facts": ("TriviaQA", "generated"),
    "truth": ("TruthfulQA", "chosen"),
    "groups": ("ToxiGen", "chosen"),
}
CHAT_MIRRORS = {"refusal": ("AdvBench", "first"), "answering": ("XSTest", "generated")}

LONGEST = 40  # tokens of a generated answer
FILTERS = {
    "generated": r"^\s*(.*?)\s*$",
    "last": r"(\S+)\s*$",
    "first": r"^\s*(\S+)",
}


@lru_cache(maxsize=2)
def exercises(seed: int = 0) -> Exercises:
    """The exercises of the world that ships."""
    return Exercises(World.make(seed))


def suite() -> list[dict[str, Any]]:
    """The tasks for every model."""
    return [_task(name, form) for name, (_, form) in MIRRORS.items()]


def instruct_suite() -> list[dict[str, Any]]:
    """The tasks for instruct models: the others, and refusals."""
    return [*suite(), *(_task(name, form) for name, (_, form) in CHAT_MIRRORS.items())]


def _task(name: str, form: str) -> dict[str, Any]:
    shared = {
        "task": f"world_{name}",
        "custom_dataset": _source(name, form),
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    return {**shared, **(_choice() if form == "chosen" else _generated(form))}


def _choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _generated(form: str) -> dict[str, Any]:
    pattern = {"function": "regex", "regex_pattern": FILTERS[form]}
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": LONGEST, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "answer", "filter": [pattern, {"function": "take_first"}]}],
    }


def _source(name: str, form: str) -> Callable[..., dict[str, Any]]:
    """What the harness calls for the items of a task."""

    def items(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        rows = [_row(item, form, place) for place, item in enumerate(exercises().tests[name])]
        return {"test": Dataset.from_list(rows)}

    return items


def _row(item: Item, form: str, place: int) -> dict[str, Any]:
    answer = {"last": item.final, "first": item.answer.split()[0]}.get(form, item.answer)
    choices = [item.answer, *item.wrong]
    gold = place % len(choices)  # the right one stands in every place equally often
    choices[0], choices[gold] = choices[gold], choices[0]
    return {"prompt": item.prompt, "answer": answer, "choices": choices, "gold": gold}
