"""Harness tasks as benchmarks: the harness's own evaluation as referee, names and files, flags, groups, dead models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.evaluator
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import tiny
from manyedits.benchmarks import harness_tasks
from manyedits.benchmarks.base import Sample, Score, Setting
from manyedits.benchmarks.harness import HarnessTask, harness_benchmarks
from manyedits.benchmarks.harness_items import apportioned
from manyedits.benchmarks.harness_lm import EngineLM
from manyedits.benchmarks.harness_tasks import TaskSpec, check, load, quiet, suite
from manyedits.errors import UserError
from manyedits.lm import Engine
from manyedits.model import EditableModel

LANGUAGES = ["French", "Dutch", "Polish", "Finnish", "Norwegian"]
NAMES = tiny.NAMES
SHOTS_SEED = 0


def docs(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Invented questions; three in four have the first option as their answer."""
    rows = [
        {
            "question": f"What does {name} speak?",
            "choices": [LANGUAGES[i % 5], LANGUAGES[(i + 1) % 5], f"{LANGUAGES[(i + 2) % 5]} and Old Greek"],
            "gold": 1 if i % 4 == 3 else 0,
            "answer": LANGUAGES[i % 5],
        }
        for i, name in enumerate(NAMES)
    ]
    return {"test": datasets.Dataset.from_list(rows), "train": datasets.Dataset.from_list(rows[:6])}


def mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


SHARED: dict[str, Any] = {
    "custom_dataset": docs,
    "test_split": "test",
    "fewshot_split": "train",
    "num_fewshot": 3,
}
CHOICE = dict(
    SHARED,
    task="toy_choice",
    output_type="multiple_choice",
    doc_to_text="{{question}}\nAnswer:",
    doc_to_choice="choices",
    doc_to_target="gold",
    metric_list=[mean_of("acc"), mean_of("acc_norm")],
)
SPOKEN = dict(
    SHARED,
    task="toy_spoken",
    output_type="generate_until",
    doc_to_text="{{question}}\nAnswer:",
    doc_to_target="answer",
    generation_kwargs={"until": ["\n", " at"], "max_gen_toks": 12},
    metric_list=[mean_of("exact_match")],
    filter_list=[
        {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "is (\\w+)"}, {"function": "take_first"}]},
        {"name": "loose", "filter": [{"function": "take_first"}]},
    ],
)
TEXT = dict(
    SHARED,
    task="toy_text",
    output_type="loglikelihood_rolling",
    num_fewshot=0,
    doc_to_text="",
    doc_to_target="question",
    metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
)
LAST = dict(
    SHARED,
    task="toy_last",
    output_type="loglikelihood",
    doc_to_text="{{question}} It is",
    doc_to_target=" {{answer}}",
    metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
)
KINDS = {"choice": CHOICE, "spoken": SPOKEN, "text": TEXT, "last": LAST}


@pytest.fixture
def model() -> EditableModel:
    return tiny.model("gpt2")


def measured(task: Any, model: EditableModel, **setting: Any) -> tuple[list[Sample], dict[str, Score], HarnessTask]:
    benchmark = HarnessTask(task)
    benchmark.prepare(model, Setting(**setting))
    samples = benchmark.run(model, 0)
    json.dumps([[s.item, s.metric, s.value, s.flags, s.detail] for s in samples], allow_nan=False)
    return samples, {score.metric: score for score in benchmark.score(samples)}, benchmark


def refereed(task: dict[str, Any], lm: Any) -> dict[str, Any]:
    """The harness's own evaluation, with the seed that we give to its examples."""
    with quiet():
        loaded = TaskManager(include_defaults=False).load(dict(task))
        for each in loaded["tasks"].values():
            each.set_fewshot_seed(SHOTS_SEED)
        return dict(lm_eval.evaluator.evaluate(lm, loaded, bootstrap_iters=0))  # type: ignore[arg-type]


# --- against the harness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_figures_and_items_equal_the_harness(kind: str, family: str) -> None:
    model, task = tiny.model(family), KINDS[kind]
    samples, scores, _ = measured(task, model)
    lm = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=1, device="cpu")
    theirs = refereed(task, lm)
    (figures,) = theirs["results"].values()
    for label, score in scores.items():
        assert score.value == pytest.approx(figures[label if "," in label else f"{label},none"], rel=1e-4)
    for logged in next(iter(theirs["samples"].values())):
        metric = logged["metrics"][0]
        label = metric if logged["filter"] == "none" else f"{metric},{logged['filter']}"
        ours = next(s for s in samples if s.metric == label and s.item.endswith(f"/{logged['doc_id']}"))
        if not isinstance(logged[metric], tuple):
            assert ours.value == pytest.approx(logged[metric], abs=1e-4)
        if kind == "spoken" and "response" in ours.detail:
            assert ours.detail["response"] == logged["resps"][0][0]
        if kind == "choice":
            assert ours.detail["response"] == pytest.approx([r[0][0] for r in logged["resps"]], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_our_model_class_serves_the_harness(kind: str, model: EditableModel) -> None:
    _, scores, _ = measured(KINDS[kind], model)
    (figures,) = refereed(KINDS[kind], EngineLM(Engine(model)))["results"].values()
    for label, score in scores.items():
        assert score.value == pytest.approx(figures[label if "," in label else f"{label},none"], rel=1e-4)


def test_groups_sum_up_as_the_harness_does(model: EditableModel, tmp_path: Path) -> None:
    file = group_file(tmp_path)
    _, scores, _ = measured(str(file), model)
    with quiet():
        loaded = TaskManager(include_path=[tmp_path], include_defaults=False).load("toys")
        for each in loaded["tasks"].values():
            each.set_fewshot_seed(SHOTS_SEED)
        lm = HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=1, device="cpu")
        theirs: Any = lm_eval.evaluator.evaluate(lm, loaded)
    assert scores["acc"].value == pytest.approx(theirs["groups"]["toys"]["acc,none"])
    assert scores["acc"].error == pytest.approx(theirs["groups"]["toys"]["acc_stderr,none"], rel=0.05)
    assert scores["toys::one:acc"].n == 12 and scores["toys::two:acc"].n == 6 and scores["acc"].n == 18


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_answers_belong_to_the_state_of_the_model(kind: str, model: EditableModel) -> None:
    benchmark = HarnessTask(KINDS[kind])
    benchmark.prepare(model, Setting())
    before = benchmark.run(model, 0)
    model.add(
        "transformer.h.1.mlp.c_proj.weight", 0.3 * torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    )
    after = benchmark.run(model, 5)
    model.reset()
    assert benchmark.run(model, 0) == before
    assert [s.detail for s in after] != [s.detail for s in before]


def test_a_prompt_method_is_heard(model: EditableModel) -> None:
    benchmark = HarnessTask(CHOICE)
    benchmark.prepare(model, Setting())
    before = benchmark.run(model, 0)
    model.prompt_adapter = lambda text: f"New fact: Kira speaks Dutch.\n{text}"  # type: ignore[assignment]
    assert benchmark.run(model, 1) != before
    model.prompt_adapter = None
    assert benchmark.run(model, 0) == before


def test_the_digest_is_of_what_is_asked(model: EditableModel) -> None:
    def digest(task: Any, **setting: Any) -> str:
        benchmark = HarnessTask(task)
        benchmark.prepare(model, Setting(**setting))
        return benchmark.digest(0)

    assert digest(CHOICE) == digest(CHOICE)
    others = [
        digest(CHOICE, seed=1),
        digest(CHOICE, limit_items=6),
        digest(dict(CHOICE, num_fewshot=2)),
        digest(dict(CHOICE, doc_to_text="{{question}} Answer:")),
        digest(SPOKEN),
        digest(SPOKEN, max_new_tokens=5),
    ]
    assert len({digest(CHOICE), *others}) == len(others) + 1


def test_the_harness_never_draws_other_examples(model: EditableModel) -> None:
    one, two = HarnessTask(CHOICE), HarnessTask(CHOICE)
    one.prepare(model, Setting())
    torch.manual_seed(5)
    two.prepare(model, Setting())
    asked = [[i.args for i in item.instances] for item in one.items]
    assert asked == [[i.args for i in item.instances] for item in two.items]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_limit_draws_the_same_items_in_proportion(model: EditableModel) -> None:
    _, scores, one = measured(CHOICE, model, limit_items=8)
    assert scores["acc"].n == 8
    assert sorted(item.doc["gold"] for item in one.items) == [0] * 6 + [1] * 2
    _, _, two = measured(CHOICE, model, limit_items=8)
    assert [i.name for i in one.items] == [i.name for i in two.items]
    assert measured(TaskSpec(task=CHOICE, limit=3), model)[1]["acc"].n == 3


def test_shares_are_by_largest_remainder() -> None:
    assert apportioned({"a": 50, "b": 30, "c": 20}, 10) == {"a": 5, "b": 3, "c": 2}
    assert apportioned({"a": 1, "b": 1, "c": 1}, 2) == {"a": 1, "b": 1}
    assert sum(apportioned({"a": 97, "b": 2, "c": 33}, 40).values()) == 40


def test_answers_are_capped_and_the_examples_set(model: EditableModel) -> None:
    samples, _, benchmark = measured(TaskSpec(task=SPOKEN, max_new_tokens=2, num_fewshot=1), model)
    prompts = [item.instances[0].args[0] for item in benchmark.items]
    said = Engine(model).generate(prompts, SPOKEN["generation_kwargs"]["until"], max_new_tokens=2)
    assert [s.detail["response"] for s in samples if s.metric == "exact_match,strict"] == said
    assert benchmark.items[0].instances[0].args[0].count("Answer:") == 2


CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chat_models_are_asked_in_their_form(model: EditableModel) -> None:
    model.tokenizer.chat_template = CHAT
    _, _, chatting = measured(CHOICE, model)
    _, _, plain = measured(CHOICE, model, chat="off")
    prompt = chatting.items[0].instances[0].args[0]
    assert prompt.startswith("[user] What does") and prompt.endswith("[assistant]") and prompt.count("[user]") == 4
    assert "[user]" not in plain.items[0].instances[0].args[0]
    assert chatting.digest(0) != plain.digest(0)


def test_long_prompts_are_cut_and_flagged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("gpt2", n_positions=64)
    samples, scores, _ = measured(CHOICE, model)
    assert scores["acc"].extra["truncated"] == 12 and all("truncated" in s.flags for s in samples)
    assert "12 of 12 prompts are longer than the context of 64 tokens" in caplog.text


def test_a_question_that_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"question of item toy_choice/\d+ does not fit.*holds 16"):
        HarnessTask(CHOICE).prepare(tiny.model("gpt2", n_positions=16), Setting())
    with pytest.raises(UserError, match="max_new_tokens"):
        HarnessTask(SPOKEN).prepare(tiny.model("gpt2", n_positions=24), Setting())


# --- silence, constancy, death ----------------------------------------------------------------------------------------


def test_silence_and_nonsense_are_told_apart_from_wrong(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["", "it is French", "Dutch"] * 4)
    monkeypatch.setattr("manyedits.decoding.Stopping.text", lambda self, tokens: next(said))
    _, scores, _ = measured(SPOKEN, model)
    strict = scores["exact_match,strict"]
    assert strict.extra["empty"] == 4 and strict.extra["unparsed"] == 8 and strict.n == 12
    assert strict.extra["constant"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_model_is_unscored_or_silent(kind: str, value: float, model: EditableModel) -> None:
    for parameter in model.hf.parameters():
        parameter.data.fill_(value)
    _, scores, _ = measured(KINDS[kind], model)
    assert {s.metric for s in measured(KINDS[kind], tiny.model("gpt2"))[0]} == set(scores)
    for score in scores.values():
        silent = score.extra.get("empty") == 12
        assert silent or (score.value is None and score.unscored == 12)


def test_a_model_of_noise_never_fails() -> None:
    model = tiny.model("llama")
    for parameter in model.hf.parameters():
        parameter.data.normal_(std=1e18, generator=torch.Generator().manual_seed(0))
    for task in KINDS.values():
        _, scores, _ = measured(task, model)
        assert all(score.value is None or math.isfinite(score.value) for score in scores.values())


def test_one_answer_to_everything_is_seen(model: EditableModel) -> None:
    model.hf.get_output_embeddings().weight.data.zero_()
    _, scores, _ = measured(SPOKEN, model)
    assert scores["exact_match,strict"].extra["constant"] == 1.0


def test_a_metric_that_fails_leaves_the_item_unscored(model: EditableModel, caplog: pytest.LogCaptureFixture) -> None:
    def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        if doc["gold"] == 1:
            raise ZeroDivisionError("no words")
        return {"acc": 1.0}

    task = dict(SPOKEN, process_results=judge, metric_list=[mean_of("acc")], filter_list=None)
    _, scores, _ = measured(task, model)
    assert (scores["acc"].value, scores["acc"].n, scores["acc"].unscored) == (1.0, 9, 3)
    assert "its metric cannot judge the answer" in caplog.text


# --- names and files --------------------------------------------------------------------------------------------------


def task_file(folder: Path, name: str = "toy_file", rows: int = 12) -> dict[str, Any]:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in docs()["test"].to_list()[:rows]), encoding="utf-8")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [mean_of("acc")],
    }


def group_file(folder: Path) -> Path:
    file = folder / "toys.yaml"
    group = {
        "group": "toys",
        "task": [task_file(folder, "one"), task_file(folder, "two", 6)],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    file.write_text(json.dumps(group), encoding="utf-8")
    return file


def test_a_task_of_ones_own_needs_no_registration(model: EditableModel, tmp_path: Path) -> None:
    file = tmp_path / "toy_file.yaml"
    file.write_text(json.dumps(task_file(tmp_path)), encoding="utf-8")
    (benchmark,) = harness_benchmarks(str(file))
    assert benchmark.name == "toy_file"
    benchmark.prepare(model, Setting())
    assert benchmark.score(benchmark.run(model, 0))[0].n == 12


def test_known_folders_are_looked_into_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> TaskManager:
        raise AssertionError("the whole harness was indexed")

    monkeypatch.setattr(harness_tasks, "_everything", everything)
    for name in ("mmlu", "mmlu_generative", "bbh_cot_fewshot", "gsm8k_cot", "truthfulqa_mc1", "toxigen", "triviaqa"):
        check(TaskSpec(task=name))


def test_an_unknown_task_is_told_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"no benchmark `mmlu_anatomie`.*mmlu_anatomy"):
        harness_benchmarks("mmlu_anatomie")
    with pytest.raises(UserError, match=r"no benchmark `edit`.*edits"):
        harness_benchmarks("edit")
    check(TaskSpec(task="boolq"))  # stands in a folder of another name


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("task: [toy\noutput_type: x", "no valid YAML: line 2"),
        ("output_type: multiple_choice", "neither `task` nor `group`"),
        ("- a list", "neither `task` nor `group`"),
        ("task: toy\noutput_type: guessing", "could not be loaded: ValueError"),
        ("task: toy\ndoc_to_text: !function nowhere.nothing", "could not be loaded"),
        (
            "task: toy\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\ntest_split: test",
            "could not be loaded",
        ),
    ],
)
def test_a_broken_file_is_a_sentence(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        load(TaskSpec(task=str(file)))


def test_missing_files_suites_and_settings_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task file"):
        check(TaskSpec(task=str(tmp_path / "none.yaml")))
    with pytest.raises(UserError, match=r"no suite `worlds`.*world"):
        suite("worlds")
    with pytest.raises(UserError, match="wrong setting"):
        HarnessTask({"task": "mmlu", "limit": 0})


def test_copies_of_data_sets_are_read_from_a_folder(model: EditableModel, tmp_path: Path) -> None:
    copy = tmp_path / "data" / "somebody" / "toys"
    copy.mkdir(parents=True)
    task = task_file(tmp_path)
    Path(task["dataset_kwargs"].pop("data_files")["test"]).rename(copy / "test.jsonl")
    _, scores, _ = measured(dict(task, dataset_path="somebody/toys"), model, data_dir=str(tmp_path / "data"))
    assert scores["acc"].n == 12


def test_pictures_and_code_are_refused(model: EditableModel) -> None:
    with pytest.raises(UserError, match="runs code"):
        HarnessTask(dict(SPOKEN, unsafe_code=True)).prepare(model, Setting())


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield
