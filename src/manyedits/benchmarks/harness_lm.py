"""Our engine as a model class of lm-evaluation-harness: what its tasks ask of a model, answered by ``lm.py``.

``EngineLM`` can be given to the harness's own ``evaluate``; our loop (``harness.py``) uses it for what belongs to
prompts, chat templates above all, and asks the engine directly where a plan is made once and used at every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from manyedits.benchmarks.harness_items import DEFAULT_NEW_TOKENS, Decoding
from manyedits.encoding import Pair
from manyedits.lm import Engine, Generated
from manyedits.prefix import Tokens


class EngineLM(TemplateLM):
    """A model of the harness over our engine. Its response caches are never used: they know nothing of edits."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.model.tokenizer
        self.max_length = engine.max_length
        self.max_gen_toks = DEFAULT_NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.engine.model.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context."""
        return self.engine.encoder.prefix_token

    @property
    def tokenizer_name(self) -> str:
        """Only ever part of the keys of caches that we do not use."""
        return str(self.engine.model.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text to ids."""
        return self.engine.encoder.ids(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self.engine.loglikelihood([Pair(tuple(left), tuple(right)) for _, left, right in requests])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """How likely continuations are."""
        return self.engine.loglikelihood_texts([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """How likely whole texts are."""
        return self.engine.loglikelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model answers."""
        prompts = [self.engine.encoder.prompt(request.args[0]) for request in requests]
        ways = [Decoding.of(request.args[1]) for request in requests]
        return [said.text for said in generated(self.engine, prompts, ways)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was taught to read it; without the system's part where its template has none."""
        try:
            return self._templated(chat_history, add_generation_prompt)
        except jinja2.exceptions.TemplateError:
            return self._templated([m for m in chat_history if m["role"] != "system"], add_generation_prompt)

    def _templated(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.engine.model.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


def generated(engine: Engine, prompts: Sequence[Tokens], ways: Sequence[Decoding]) -> list[Generated]:
    """Answers to prompts, in order; those with the same stops and limit are generated together."""
    groups: dict[Decoding, list[int]] = {}
    for i, way in enumerate(ways):
        groups.setdefault(way, []).append(i)
    answers: dict[int, Generated] = {}
    for way, members in groups.items():
        said = engine.generate_tokens([prompts[i] for i in members], way.stops, way.limit)
        answers.update(zip(members, said, strict=True))
    return [answers[i] for i in range(len(prompts))]
