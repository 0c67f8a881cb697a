"""From text to the token ids that are scored, by the harness's own rules.

Whether a beginning-of-text token is put in front, to which side of a border a space belongs, what stands in for an
empty context: each of these moves a benchmark's figure, so they follow ``HFLM`` of lm-evaluation-harness to the letter,
and the tests compare item by item.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from manyedits.errors import UserError
from manyedits.prefix import Tokens

UNSET_LENGTH = int(1e30)  # what tokenizers say when they know no limit
FALLBACK_LENGTH = 2048  # the harness's default, where neither the config nor the tokenizer names a limit


class Pair(NamedTuple):
    """A context and the continuation that is judged. ``judgeable`` is false where text left no tokens of its own."""

    context: Tokens
    continuation: Tokens
    judgeable: bool = True


class Encoder:
    """A tokenizer under the harness's rules, and the prompt method of an edited model, if there is one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_adapter: Callable[[str], str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.prompt_adapter = prompt_adapter

    @property
    def prefix_token(self) -> int:
        """What an empty context is replaced by: the beginning of text, else its end."""
        bos = self.tokenizer.bos_token_id
        prefix = bos if bos is not None else self.tokenizer.eos_token_id
        if prefix is None:
            raise UserError(
                "The tokenizer has neither a beginning- nor an end-of-text token.", "Set `eos_token` in it."
            )
        return int(prefix)

    @cached_property
    def _prefix_text(self) -> str:
        return str(self.tokenizer.decode([self.prefix_token]))

    def ids(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, but never a second beginning-of-text token."""
        if special is None and text.startswith(self._prefix_text):
            special = False
        extra = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer(text, verbose=False, **extra)["input_ids"])

    def prompt(self, text: str) -> Tokens:
        """A prompt to generate from."""
        text = self._adapted(text)
        bos = self.tokenizer.bos_token
        extra = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        return tuple(self.tokenizer(text, verbose=False, **extra)["input_ids"]) or (self.prefix_token,)

    def pair(self, context: str, continuation: str) -> Pair:
        """A context and its continuation; spaces at the end of the context belong to the continuation."""
        context = self._adapted(context)
        if not context:
            return self._without_context(continuation)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        left = self.ids(stripped)
        right = self.ids(stripped + continuation)[len(left) :]
        return Pair(tuple(left) or (self.prefix_token,), tuple(right), bool(right) or not continuation)

    def _without_context(self, continuation: str) -> Pair:
        ids = self.ids(continuation, special=False) if continuation else []
        if ids and ids[0] == self.prefix_token:
            return Pair(tuple(ids[:1]), tuple(ids[1:]))
        return Pair((self.prefix_token,), tuple(ids), bool(ids) or not continuation)

    def _adapted(self, text: str) -> str:
        return self.prompt_adapter(text) if self.prompt_adapter is not None and text else text

    def windows(self, text: str, max_length: int) -> list[Pair]:
        """A long text cut so that every token is predicted once, with as much before it as the context holds."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        ids = self.ids(text)
        rolling = get_rolling_token_windows(ids, self.prefix_token, max_seq_len=max_length, context_len=1)
        return [Pair(tuple(left), tuple(right)) for left, right in map(make_disjoint_window, rolling)]

    def decoded(self, tokens: list[int]) -> str:
        """The text of generated tokens, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model takes, looked up where the harness looks it up."""
    text_config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(text_config, name, None)) is not None:
            return int(value)
    declared = getattr(tokenizer, "model_max_length", None)
    return int(declared) if declared is not None and declared < UNSET_LENGTH else FALLBACK_LENGTH
