"""Any task of lm-evaluation-harness as a benchmark of a run.

Prompts, examples, answer filters and metrics are the harness's, so figures compare with everybody else's; asking the
model and going through the items is ours. Requests are made once per run and answered at every checkpoint, each time
from nothing: no answer is ever kept, because the harness's caches know a task and not the model (and would serve the
unedited model's answers). Its ``evaluate`` is not used either; it would draw other examples at each checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from manyedits.benchmarks.base import Benchmark, Sample, Score, Setting, content_digest
from manyedits.benchmarks.harness_items import Chat, check_fits, drawn, rendered
from manyedits.benchmarks.harness_lm import EngineLM
from manyedits.benchmarks.harness_requests import Answer, Encoded, Pairs, Prompts
from manyedits.benchmarks.harness_samples import samples_of, scores_of
from manyedits.benchmarks.harness_tasks import TaskSpec, check, load, quiet, root_of, set_shots, spec_of, suite
from manyedits.lm import Engine
from manyedits.model import EditableModel

logger = logging.getLogger(__name__)

SUITE = "suite:"


def harness_benchmarks(name: str) -> list[HarnessTask]:
    """The benchmarks that an experiment's entry stands for: ``suite:NAME``, or any task or group of the harness.

    Raises ``UserError`` for a name that is none, without reading any data.
    """
    specs = suite(name.removeprefix(SUITE)) if name.startswith(SUITE) else [spec_of(name)]
    for spec in specs:
        check(spec)
    return [HarnessTask(spec) for spec in specs]


class HarnessTask(Benchmark):
    """One task or group, on the items that were drawn when it was prepared."""

    def __init__(self, spec: TaskSpec | str | Mapping[str, Any]) -> None:
        self.spec = spec if isinstance(spec, TaskSpec) else spec_of(spec)
        self.name = self.spec.name

    # --- once per run -----------------------------------------------------------------------------------------------

    def prepare(self, model: EditableModel, setting: Setting) -> None:
        """Load the data, render the prompts, cut them into tokens."""
        loaded = load(self.spec, setting.data_dir)
        limit = _least(self.spec.limit, setting.limit_items)
        engine = Engine(model)
        self.cap = _least(self.spec.max_new_tokens, setting.max_new_tokens)
        self.chat = setting.chat != "off" and bool(model.tokenizer.chat_template)
        chat: Chat | None = EngineLM(engine).apply_chat_template if self.chat else None
        with quiet():
            set_shots(loaded, self.spec.num_fewshot, setting.seed)
            chosen = drawn(loaded.tasks, limit, setting.seed)
            self.items = [i for name, ids in chosen.items() for i in rendered(name, loaded.tasks[name], ids, chat)]
        self.tasks = {name: loaded.tasks[name] for name in chosen}
        self.groups = loaded.groups
        self._kept: dict[str, Encoded] = {}
        self._check_lengths(engine, chat)
        self._digest = self._made_digest()

    def _check_lengths(self, engine: Engine, chat: Chat | None) -> None:
        """Warn about prompts that are cut, and raise if a question alone does not fit."""
        encoded = {kind: self._encoded(engine, kind) for kind in self._kinds()}
        too_long = {owner: answer for e in encoded.values() for owner, answer in e.too_long(engine.max_length)}
        items = [item for item in self.items if any(id(i) in too_long for i in item.instances)]
        for item in items:
            answer = max(too_long.get(id(i), 0) for i in item.instances)
            check_fits(self.tasks[item.task], item, answer, engine.encoder, chat, engine.max_length)
        if items:
            logger.warning(
                "%s: %d of %d prompts are longer than the context of %d tokens and lose their beginning",
                *(self.name, len(items), len(self.items), engine.max_length),
            )

    def digest(self, step: int) -> str:
        """Identity of what is asked, at any step the same."""
        return self._digest

    def _made_digest(self) -> str:
        """Every request as rendered, the decoding, and whose code judges it."""
        tasks = {
            name: [str(task.VERSION), str(task.get_config("num_fewshot")), list(task.aggregation())]
            for name, task in self.tasks.items()
        }
        requests = [
            [item.name, str(self.tasks[item.task].doc_to_target(item.doc)), i.request_type, list(i.args)]
            for item in self.items
            for i in item.instances
        ]
        harness = importlib.metadata.version("lm_eval")
        return content_digest([self.name, self.version, harness, tasks, requests, self.cap, self.chat])

    # --- at every checkpoint ----------------------------------------------------------------------------------------

    def run(self, model: EditableModel, step: int) -> list[Sample]:
        """Ask everything, let the task's filters and metrics judge it."""
        answers = self._answers(Engine(model))
        with quiet():
            for task in self.tasks.values():
                task.apply_filters()
            return list(self._judged(answers))

    def _judged(self, answers: Mapping[int, Answer]) -> Iterator[Sample]:
        for item in self.items:
            cut = any(answers[id(instance)].cut for instance in item.instances)
            yield from samples_of(self.tasks[item.task], item, cut)

    def _answers(self, engine: Engine) -> dict[int, Answer]:
        """Every request's answer, by the identity of its instance, which is also told."""
        answers: dict[int, Answer] = {}
        for kind in self._kinds():
            answers.update(self._encoded(engine, kind).answers(engine))
        for instance in self._instances():
            instance.resps = [answers[id(instance)].value] * (instance.repeats or 1)  # greedy: they are all alike
            instance.filtered_resps = {}
        return answers

    def _instances(self) -> list[Instance]:
        return [instance for item in self.items for instance in item.instances]

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(instance.request_type for instance in self._instances()))

    def _encoded(self, engine: Engine, kind: str) -> Encoded:
        """The requests of a kind as tokens; made anew only where a method rewrites the prompts."""
        if kind in self._kept and engine.encoder.prompt_adapter is None:
            return self._kept[kind]
        asked = [instance for instance in self._instances() if instance.request_type == kind]
        made = Prompts.of(engine, asked, self.cap) if kind == "generate_until" else Pairs.of(engine, asked)
        if engine.encoder.prompt_adapter is None:
            self._kept[kind] = made
        return made

    # --- figures ----------------------------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """The figure of the whole first, then those of its parts."""
        return scores_of(root_of(self.groups), self.tasks, self.groups, samples)


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)
