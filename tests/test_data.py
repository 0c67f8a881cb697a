"""Requests out of files: both forms of CounterFact, our own, orders, and texts for statistics."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from manyedits.data import Probe, Request, request_from_dict
from manyedits.data.corpus import read_corpus
from manyedits.data.sets import load_requests
from manyedits.errors import UserError

ORIGINAL = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was born in",
        "subject": "Anna",
        "relation_id": "P19",
        "target_new": {"str": "Oslo"},
        "target_true": {"str": " Rome"},
    },
    "paraphrase_prompts": ["So it goes. Anna hails from"],
    "neighborhood_prompts": ["Boris was born in"],
    "attribute_prompts": ["Clara was born in"],
    "generation_prompts": ["Anna grew up in"],
}
EASYEDIT = {
    "case_id": 7,
    "prompt": "Anna was born in",
    "subject": "Anna",
    "target_new": "Oslo",
    "ground_truth": "Rome",
    "rephrase_prompt": "So it goes. Anna hails from",
    "locality_prompt": "Boris was born in",
    "locality_ground_truth": "Rome",
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_both_forms_of_counterfact_say_the_same(tmp_path: Path) -> None:
    (one,) = load_requests("counterfact", write(tmp_path / "a.json", [ORIGINAL]))
    (other,) = load_requests("counterfact", write(tmp_path / "b.json", [EASYEDIT]))
    assert one.target == "Oslo" and one.old_target == "Rome" and one.relation == "P19" and one.id == "7"
    assert one.neighbours == (Probe("Boris was born in", "Rome"),)
    assert one.attributes == (Probe("Clara was born in", "Oslo"),)
    for name in ("id", "subject", "prompt", "target", "old_target", "paraphrases", "neighbours", "text"):
        assert getattr(one, name) == getattr(other, name)


def test_a_subject_that_stands_twice_keeps_its_place(tmp_path: Path) -> None:
    record = {**EASYEDIT, "prompt": "Anna said that Anna was born in"}
    (request,) = load_requests("counterfact", write(tmp_path / "a.json", [record]))
    assert request.span == (0, 4) and request.text == record["prompt"]


def test_neighbours_without_answers_are_not_dropped_in_silence(tmp_path: Path) -> None:
    record = {**EASYEDIT, "locality_prompt": ["a", "b"], "locality_ground_truth": ["x"]}
    with pytest.raises(UserError, match="2 locality prompts have 1 answers"):
        load_requests("counterfact", write(tmp_path / "a.json", [record]))


def test_two_facts_may_not_share_an_id(tmp_path: Path) -> None:
    one = {"id": "a", "subject": "Anna", "prompt": "{} speaks", "target": "Dutch"}
    with pytest.raises(UserError, match="The id `a` belongs to 2 different records"):
        load_requests("own", write(tmp_path / "a.json", [one, {**one, "subject": "Boris"}]))
    assert len(load_requests("own", write(tmp_path / "b.json", [one, one]))) == 1
    ids = [r.id for r in load_requests("own", write(tmp_path / "c.json", [{**one, "id": i} for i in (None, 7)]))]
    assert ids in (["1"], ["7"]), "a repeated fact is dropped; a missing id is the record's place"
    with pytest.raises(UserError, match=r"the field `id` is \[1\]"):
        load_requests("own", write(tmp_path / "d.json", [{**one, "id": [1]}]))


@pytest.mark.parametrize("name", ["subject", "target", "id", "relation", "paraphrases"])
def test_half_a_character_is_no_text(tmp_path: Path, name: str) -> None:
    record = {"id": "a", "subject": "Anna", "prompt": "{} speaks", "target": "Dutch", name: "A\ud800"}
    with pytest.raises(UserError, match=f"line 1: the field `{name}` holds half of a character"):
        load_requests("own", write(tmp_path / "a.json", [record]))


def test_a_relation_is_a_text(tmp_path: Path) -> None:
    record = {**ORIGINAL, "requested_rewrite": {**ORIGINAL["requested_rewrite"], "relation_id": ["P19"]}}
    with pytest.raises(UserError, match="the field `relation_id` is"):
        load_requests("counterfact", write(tmp_path / "a.json", [record]))


def test_paragraphs_end_at_blank_lines_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\nline\r\n\r\ntwo\n \t\n three\n\n\n\nfour\n")
    assert list(read_corpus(path).texts()) == ["one\nline", "two", "three", "four"]
    path.write_text(" \n = A = \n \n = = B = = \n \n text \n \n = C = \n \n more \n \n = D = \n")
    assert list(read_corpus(path).texts()) == ["= A =\n= = B = =\ntext", "= C =\nmore", "= D ="]


def test_the_texts_of_the_shipped_experiment_are_many(shared: Path) -> None:
    texts = list(read_corpus(shared / "data" / "wikitext2" / "valid.txt.gz").texts())
    assert len(texts) > 500 and all("\n" in text or not text.startswith("=") for text in texts)


def test_empty_lines_and_texts_of_json_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": " "}\n{"text": "b"}\n')
    assert list(read_corpus(path).texts()) == ["a", "b"]
    for wrong in ("null", "5", '"\\ud800"'):
        path.write_text(f'{{"text": {wrong}}}\n')
        with pytest.raises(UserError, match="line 1: no JSON object with a field `text`"):
            read_corpus(path)


def test_the_real_file_is_read_whole(shared: Path) -> None:
    path = shared / "data" / "counterfact" / "counterfact_500_full.json"
    requests = load_requests("counterfact", path, order="file", conflicts="keep")
    assert len(requests) == 500
    assert all(r.text[slice(*r.subject_span)] == r.subject and r.paraphrases and r.neighbours for r in requests)


def test_requests_survive_our_own_form(tmp_path: Path) -> None:
    requests = tiny.requests(4)
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps({"id": r.id, **r.content()}) + "\n" for r in requests), encoding="utf-8")
    assert load_requests("own", path, order="file") == requests
    assert [request_from_dict(json.loads(json.dumps({"id": r.id, **r.content()}))) for r in requests] == requests


def test_a_line_separator_inside_a_text_ends_no_record(tmp_path: Path) -> None:
    rows = [{"subject": f"Anna\u2028{i}", "prompt": "{} speaks\x85", "target": "Dutch"} for i in range(2)]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert len(load_requests("own", path)) == 2
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a\u2028b"}\r\n{"text": "c"}\r\n', encoding="utf-8", newline="")
    assert list(read_corpus(texts).texts()) == ["a\u2028b", "c"]


def test_the_order_is_seeded_and_a_longer_run_begins_with_a_shorter_one(tmp_path: Path) -> None:
    records = [{"id": str(i), "subject": f"S{i}", "prompt": "{} is", "target": "x"} for i in range(30)]
    path = write(tmp_path / "facts.json", records)
    ids = [r.id for r in load_requests("own", path, seed=3)]
    assert ids != [r.id for r in load_requests("own", path, seed=4)] and sorted(ids, key=int) != ids
    assert [r.id for r in load_requests("own", path, seed=3, limit=10)] == ids[:10]
    assert [r.id for r in load_requests("own", path, order="file")] == [str(i) for i in range(30)]


def test_a_zipped_file_is_unpacked_and_a_broken_one_named(tmp_path: Path) -> None:
    content = json.dumps([EASYEDIT]).encode()
    path = tmp_path / "facts.json.gz"
    path.write_bytes(gzip.compress(content))
    assert len(load_requests("counterfact", path)) == 1
    for broken in (gzip.compress(content)[:-9], b"not zipped"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"facts\.json\.gz cannot be read"):
            load_requests("counterfact", path)


def test_the_place_of_a_record_in_an_array_is_its_line(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([EASYEDIT, {**EASYEDIT, "target_new": ""}], indent=2), encoding="utf-8")
    with pytest.raises(UserError, match="line 12: the field `target_new` is empty"):
        load_requests("counterfact", path)


def test_many_wrong_records_are_counted_not_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_requests("own", write(tmp_path / "facts.json", [{"subject": "x"}] * 30))
    assert "and 20 more records with mistakes" in str(caught.value) and str(caught.value).count("line 1:") == 10


def test_a_context_moves_the_subject_with_the_text() -> None:
    request = Request("1", "Anna", "{} was in", "Oslo")
    text, (start, end) = request.template("Set {a}. {}. End")
    assert text == "Set {a}. Anna was in. End" and text[start:end] == "Anna"
    spanned = Request("1", "Anna", "Anna and {}", "Oslo", span=(0, 4))
    assert spanned.text == "Anna and {}" and spanned.template("So: {}") == ("So: Anna and {}", (4, 8))


def test_a_corpus_has_a_digest_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\n two \n\n\nthree", encoding="utf-8")
    corpus = read_corpus(path)
    assert list(corpus.texts()) == ["one", "two", "three"] == list(corpus.texts())
    path.write_text("one\n\n two \n\n\nthree!", encoding="utf-8")
    assert read_corpus(path).digest != corpus.digest
    path.write_text(" \n\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no text"):
        read_corpus(path)
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "a"}\n{"txt": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: no JSON object with a field `text`"):
        read_corpus(lines)
