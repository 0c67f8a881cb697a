"""Token positions, per tokenizer family: byte-level BPE with leading spaces, SentencePiece with a BOS."""

from __future__ import annotations

import pytest
import torch

import tiny
from manyedits.data import Request
from manyedits.errors import UserError
from manyedits.tokens import encode, fact_rows, join, locate, lookup_rows, pad, subject_rows, target_columns

FAMILIES = ["gpt2", "llama"]


def make(prompt: str, subject: str, target: str = "Old Greek", **more: object) -> Request:
    return Request(id="x", prompt=prompt, subject=subject, target=target, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("context", ["{}", "She opened the window. {}"])
def test_text_up_to_the_lookup_position_ends_with_the_subject(family: str, name: str, context: str) -> None:
    words = tiny.tokenizer(family)
    request = make("The mother tongue of {} is", name)
    ((ids, position),) = lookup_rows(words, [request], [context], "subject_last")
    assert len(ids) == position + 1
    assert words.decode(ids, skip_special_tokens=True).strip().endswith(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_kinds_of_fact_token(family: str) -> None:
    words = tiny.tokenizer(family)
    text, subject = "The mother tongue of Anna Velmora is", (21, 33)
    ((ids, spans),) = encode(words, [text])
    assert text[slice(*subject)] == "Anna Velmora"

    def at(which: str) -> int:
        return locate(spans, subject, len(text), which)  # type: ignore[arg-type]

    assert at("subject_first") <= at("subject_last") < at("subject_first_after_last") <= at("last") == len(ids) - 1
    before = words.decode(ids[: at("subject_first")], skip_special_tokens=True).strip()
    assert before == "The mother tongue of"
    assert at("subject_first_after_last") == at("subject_last") + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_ends_with_its_subject_looks_itself_up(family: str) -> None:
    words = tiny.tokenizer(family)
    text = "Who is Anna Velmora"
    ((ids, spans),) = encode(words, [text])
    for which in ("subject_last", "subject_first_after_last", "last"):
        assert locate(spans, (7, 19), len(text), which) == len(ids) - 1  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["Dutch", "Old Greek", "Østberg"])
def test_target_tokens_are_the_rest_of_the_text(family: str, target: str) -> None:
    words = tiny.tokenizer(family)
    request = make("The mother tongue of {} is", "Boris Tandell", target)
    located = fact_rows(words, [request], ["{}", "It is a city. {}"], "subject_last")
    for (ids, _), tokens, columns in zip(located.rows, located.target_ids, located.logits_at, strict=True):
        assert words.decode(tokens, skip_special_tokens=True).strip() == target
        assert columns == list(range(columns[0], columns[0] + len(tokens)))
        assert columns[-1] == len(ids) - 1, "the last target token is predicted, never read"
        whole = words.decode([*ids, tokens[-1]], skip_special_tokens=True)
        assert whole.strip().endswith(f"is {target}")


def test_a_bos_moves_every_position_by_one() -> None:
    """Lookup positions counted on piecewise tokenisations are one off under a BOS; these are not."""
    plain, with_bos = tiny.tokenizer("llama"), tiny.tokenizer("llama")
    plain.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    request = make("The mother tongue of {} is", "Anna Velmora")
    ((ids, at),) = lookup_rows(plain, [request], ["{}"], "subject_last")
    with_bos = tiny.tokenizer("mistral")
    from tokenizers import processors

    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    ((ids_bos, at_bos),) = lookup_rows(with_bos, [request], ["{}"], "subject_last")
    assert at_bos == at + 1
    assert ids_bos == [1, *ids]


def test_a_subject_named_twice_is_found_by_its_span() -> None:
    words = tiny.tokenizer("gpt2")
    text = "Dutch is what the Dutch speak at"
    request = make(text, "Dutch", "home", span=(18, 23))
    ((ids, _),) = lookup_rows(words, [request], ["{}"], "subject_last")
    assert words.decode(ids) == "Dutch is what the Dutch"


def test_batches_are_padded_on_the_right_and_masked() -> None:
    words = tiny.tokenizer("gpt2")
    batch = pad(encode(words, ["The", "The mother tongue of"]), words)
    assert batch.mask[0, 0] == 1 and batch.mask[0, -1] == 0
    assert torch.equal(batch.lengths, batch.mask.sum(1))
    assert batch.ids.shape == batch.mask.shape


def test_a_prompt_and_its_answer_are_joined_by_one_space() -> None:
    assert join("The answer is", "no") == "The answer is no"
    assert join("The answer:\n", "no") == "The answer:\nno"
    assert target_columns([(0, 3), (3, 6), (6, 9)], 6) == [2]


def test_the_essence_prompt_is_looked_up_at_its_subject() -> None:
    words = tiny.tokenizer("llama")
    located = subject_rows(words, [make("{} speaks", "Kira Østberg")], "{} is a", "subject_last")
    ids = located.rows[0][0][: located.lookup[0] + 1]
    assert words.decode(ids, skip_special_tokens=True).strip() == "Kira Østberg"


def test_an_empty_subject_is_refused() -> None:
    with pytest.raises(UserError, match="no token"):
        locate([(0, 3), (3, 6)], (2, 2), 6, "subject_last")
