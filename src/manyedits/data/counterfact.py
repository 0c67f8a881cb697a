"""CounterFact (Meng et al. 2022) in its original form and in EasyEdit's; which one a record is in is seen from its keys."""

from __future__ import annotations

from typing import Any

from manyedits.data import Probe, Request
from manyedits.data.reading import id_field, optional_text, text_field, texts_field
from manyedits.errors import UserError


def counterfact(where: str, record: dict[str, Any]) -> Request:
    """One record of either form."""
    return _original(where, record) if "requested_rewrite" in record else _easyedit(where, record)


def _original(where: str, record: dict[str, Any]) -> Request:
    rewrite = "requested_rewrite"
    new = text_field(where, record, rewrite, "target_new", "str").strip()
    old = text_field(where, record, rewrite, "target_true", "str").strip()
    return Request(
        id=id_field(where, record, "case_id"),
        subject=text_field(where, record, rewrite, "subject"),
        prompt=text_field(where, record, rewrite, "prompt"),
        target=new,
        relation=optional_text(where, record[rewrite], "relation_id"),
        old_target=old,
        paraphrases=texts_field(where, record, "paraphrase_prompts"),
        neighbours=tuple(Probe(p, old) for p in texts_field(where, record, "neighborhood_prompts")),
        attributes=tuple(Probe(p, new) for p in texts_field(where, record, "attribute_prompts")),
        generation=texts_field(where, record, "generation_prompts"),
    )


def _easyedit(where: str, record: dict[str, Any]) -> Request:
    """EasyEdit's records have the subject filled in; the template is made by taking it out again."""
    subject, text = text_field(where, record, "subject"), text_field(where, record, "prompt")
    start = text.find(subject)
    once = text.count(subject) == 1
    neighbours = texts_field(where, record, "locality_prompt")
    answers = texts_field(where, record, "locality_ground_truth")
    if len(neighbours) != len(answers):
        raise UserError(
            f"{where}: {len(neighbours)} locality prompts have {len(answers)} answers.", "Give each prompt its answer."
        )
    return Request(
        id=id_field(where, record, "case_id"),
        subject=subject,
        prompt=text.replace(subject, "{}", 1) if once and "{}" not in text else text,
        span=None if once and "{}" not in text else (start, start + len(subject)),
        target=text_field(where, record, "target_new").strip(),
        old_target=text_field(where, record, "ground_truth").strip() if record.get("ground_truth") else None,
        paraphrases=texts_field(where, record, "rephrase_prompt"),
        neighbours=tuple(Probe(p, a.strip()) for p, a in zip(neighbours, answers, strict=True)),
    )
