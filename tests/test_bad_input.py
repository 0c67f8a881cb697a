"""Bad input: one clear sentence, a hint, exit code 2, no traceback; all mistakes of a file before any weight is loaded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import experiments
import tiny
from manyedits import loading
from manyedits.checks import check_study
from manyedits.cli import app, guarded
from manyedits.config import load_study
from manyedits.data.sets import load_requests
from manyedits.errors import Mistakes, UserError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    experiments.content(folder)
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading a weight would be a failure of these tests."""
    monkeypatch.setenv("MANYEDITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_weights", lambda *args: pytest.fail("weights were loaded"))


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    code = guarded(lambda: app(list(words), standalone_mode=False))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return code, captured.err


def plan(capsys: pytest.CaptureFixture[str], content: Any, home: Path, name: str = "bad.yaml") -> str:
    """The message of an experiment that cannot run."""
    path = home / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    codes, errors = zip(*(command(capsys, verb, str(path)) for verb in ("plan", "run")), strict=True)
    assert codes == (2, 2), errors
    assert errors[0] == errors[1]
    return str(errors[0])


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"benchmark": ["edits"]}, ["no key `benchmark`", "Did you mean `benchmarks`"]),
    "unknown method": ({"method": "memitt"}, ["no method `memitt`", "Did you mean `memit`"]),
    "unknown parameter": (
        {"method": {"name": "rome", "preset": "tiny", "layr": 1}},
        ["no parameter `layr`", "Did you mean `layer`"],
    ),
    "unknown nested parameter": (
        {"method": {"name": "rome", "preset": "tiny", "value": {"stepz": 1}}},
        ["no parameter `value.stepz`", "Did you mean `steps`"],
    ),
    "parameter of a wrong type": (
        {"method": {"name": "rome", "preset": "tiny", "layer": "first"}},
        ["`layer` is 'first'"],
    ),
    "unknown preset": ({"method": {"name": "rome", "preset": "tinny"}}, ["no preset `tinny`", "Did you mean `tiny`"]),
    "unknown model": ({"model": "./no/such/model"}, ["no model folder `./no/such/model`"]),
    "unknown data set": ({"data": {"name": "counterfax", "path": "x"}}, ["no data set", "Did you mean `counterfact`"]),
    "missing data file": ({"data": {"name": "own", "path": "nowhere.jsonl"}}, ["There is no file nowhere.jsonl"]),
    "no data file": ({"data": {"name": "own"}}, ["needs a file"]),
    "limit past the data": ({"limit": 99}, ["gives 6 requests, `limit` asks for 99"]),
    "unknown benchmark": ({"benchmarks": ["editz"]}, ["editz", "Did you mean"]),
    "checkpoint past the data": ({"checkpoints": [0, 50]}, ["Checkpoint 50 cannot be measured", "6 requests"]),
    "checkpoint of no batch": (
        {"method": {"name": "memit", "preset": "tiny"}, "batch": 4, "checkpoints": [0, 3, 4]},
        ["Checkpoint 3 cannot be measured", "multiple of no cell's batch"],
    ),
    "batch too large": ({"batch": 2, "checkpoints": [0, 2]}, ["takes 1 request at a time, `batch` is 2"]),
    "no statistics": ({"statistics": None}, ["needs a text to gather second moments"]),
    "missing corpus": ({"statistics": {"corpus": "gone.txt"}}, ["There is no file gone.txt"]),
    "no checkpoints": ({"checkpoints": []}, ["`checkpoints` is []"]),
    "a negative checkpoint": ({"checkpoints": [-1]}, ["`checkpoints.0` is -1"]),
    "a layer that is not there": (
        {"method": {"name": "rome", "preset": "tiny", "layer": 9}},
        ["layer 9, the model has 3 layers"],
    ),
    "a preset for another architecture": (
        {"method": {"name": "rome", "preset": "stories260k"}},
        ["The preset `stories260k` is for llama, the model is gpt2"],
    ),
    "a mapping that is no model": ({"model": {"hidden_size": 3}}, ["must be a random one"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_clear_sentence(case: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, wanted = CASES[case]
    content = experiments.content(home)
    if "limit" in changes:
        content["data"]["limit"] = changes["limit"]
    else:
        content.update(changes)
    message = plan(capsys, {k: v for k, v in content.items() if v is not None}, home)
    for words in wanted:
        assert words in message


def test_all_mistakes_come_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = experiments.content(home, method="memitt", benchmarks=["editz"], checkpoints=[0, 50])
    message = plan(capsys, content, home)
    assert "3 mistakes" in message
    assert all(word in message for word in ("memitt", "editz", "Checkpoint 50"))
    message = plan(capsys, {**experiments.content(home), "dtype": "int3", "sead": 1, "batch": 0}, home)
    assert all(word in message for word in ("3 mistakes", "dtype", "sead", "batch"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("model: [unclosed", "line 1"),
        ("a: 1\na: 2\n", "the key `a` stands twice"),
        ("- just\n- a list\n", "is no experiment"),
        ("", "is no experiment"),
        ("1: 2\n", "is not a name"),
        ("model: x\n\tdata: y\n", "line 2"),
        ("model: !!python/object/apply:os.system [ls]\n", "python/object"),
    ],
)
def test_a_file_that_is_no_experiment(text: str, wanted: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted in plan(capsys, text, home)


def test_a_missing_experiment_file_has_a_near_miss(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiments.write(home, "good.yaml")
    code, error = command(capsys, "plan", str(home / "god.yaml"))
    assert code == 2 and "Did you mean `good.yaml`" in error


# --- records ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"subject": "Anna Velmora", "prompt": "{} speaks", "target": "Dutch", "old_target": "French"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"subject": None}, "line 2: the field `subject` is missing"),
        ({"target": ""}, "line 2: the field `target` is empty"),
        ({"target": 7}, "line 2: the field `target` is 7, not a text"),
        ({"prompt": "Anna speaks"}, "line 2: the prompt 'Anna speaks' does not hold the subject once"),
        ({"prompt": "{} and {} speak"}, "does not hold the subject once"),
        ({"prompt": "Anna speaks", "span": [0, 12]}, "the subject 'Anna Velmora' is not in its prompt"),
        ({"prompt": "Anna speaks", "span": [0, "x"]}, "`span` is not a pair"),
        ({"paraphrases": [1]}, "`paraphrases` is [1], not a list of texts"),
        ({"neighbours": ["x"]}, "`neighbours` is not a list of prompts with targets"),
        ({"neighbours": [{"prompt": "x"}]}, "the field `target` is missing"),
        ({"taget": "Dutch"}, "no field `taget`. Did you mean `target`"),
    ],
)
def test_a_wrong_record_is_named_by_file_and_line(change: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    bad = {k: v for k, v in {**GOOD, "subject": "Anna Velmora", **change}.items() if v is not None}
    other = {**GOOD, "subject": "Boris Tandell"}
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(other) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_requests("own", path)
    assert wanted in str(caught.value) and "facts.jsonl" in str(caught.value)


def test_a_counterfact_record_without_a_field_is_named(tmp_path: Path) -> None:
    record = {"case_id": 3, "requested_rewrite": {"prompt": "{} is", "subject": "x", "target_new": {"str": "y"}}}
    path = tmp_path / "cf.json"
    path.write_text(json.dumps([record], indent=1), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"cf\.json, line 2: the field `requested_rewrite\.target_true\.str` is missing"
    ):
        load_requests("counterfact", path)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "holds no records"),
        ("[]", "holds no records"),
        ("[1, 2]", "1 is no record"),
        ('[{"a": 1},', "the array has no end"),
        ('{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("hello", "line 1: not JSON"),
    ],
)
def test_a_file_that_holds_no_records(content: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=wanted):
        load_requests("own", path)


def test_conflicts_are_refused_kept_or_settled(tmp_path: Path) -> None:
    rows = [{**GOOD, "id": "a"}, {**GOOD, "id": "b", "target": "Polish"}, {**GOOD, "id": "c", "subject": "Lev Ansari"}]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {**rows[2], "id": "d"}]), encoding="utf-8")
    with pytest.raises(UserError, match=r"1 prompts are to get several answers .records a, b."):
        load_requests("own", path)
    assert sorted(r.id for r in load_requests("own", path, conflicts="keep")) == ["a", "b", "c"]
    assert sorted(r.id for r in load_requests("own", path, conflicts="last")) == ["b", "c"]


# --- models -----------------------------------------------------------------------------------------------------------


def spoil(change: Callable[[Path], None], home: Path, folder: Path) -> Path:
    """A copy of a good model folder with something wrong."""
    shutil.copytree(home / "model-gpt2", folder)
    change(folder)
    return folder


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": "something else"}')


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (pickled, "pickled weights are never read"),
        (truncated, "cannot be read as safetensors"),
        (without_config, "it has no config.json"),
        (with_broken_config, "is not JSON"),
        (foreign, "names no model_type"),
    ],
)
def test_a_spoiled_model_folder(
    change: Callable[[Path], None], wanted: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = spoil(change, home, tmp_path / "model")
    assert wanted in plan(capsys, experiments.content(home, model=str(folder)), home)


def test_remote_code_never_runs_unasked(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = tmp_path / "model"
    shutil.copytree(home / "model-gpt2", folder)
    mark = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="novel", auto_map={"AutoConfig": "code.Novel", "AutoModelForCausalLM": "code.Novel"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').write('x')\nclass Novel: pass\n")
    with pytest.raises(UserError):
        loading.load_model(str(folder))
    assert not mark.exists()


def test_a_checkpoint_that_lacks_weights_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    folder = tmp_path / "model"
    shutil.copytree(home / "model-gpt2", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 5}))
    with pytest.raises(UserError, match=r"lacks .* weights of its config"):
        loading.load_model(str(folder))


def test_a_folder_that_cannot_be_written(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("x")
    code, error = command(capsys, "run", str(experiments.write(home)), "--out", str(in_the_way / "runs"))
    assert code == 2 and "cannot be written" in error and "--out" in error


@pytest.mark.parametrize("verb", ["report", "verify"])
def test_a_folder_that_is_no_run(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = command(capsys, verb, str(tmp_path))
    assert code == 2 and "is no run directory and holds none" in error


def test_an_unknown_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = command(capsys, "list", "method")
    assert code == 2 and "Did you mean `methods`" in error


# --- two hundred malformed files --------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=12),
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=6), st.integers(), max_size=3), st.just({"name": None}), st.just([[]]),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a nested value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, part in below for p in places(part, (*path, key))]


def mutated(value: Any, draw: Callable[[Any], Any]) -> Any:
    """A copy with up to three places replaced by something odd, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        holder = value
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "rename"]))
        if action == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(last)
        elif action == "remove":
            del holder[last]
        else:
            holder[last] = draw(ODD)
    return value


QUIET = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@QUIET
@given(data=st.data())
def test_malformed_experiments_give_no_traceback(data: st.DataObject, home: Path) -> None:
    path = home / "malformed.yaml"
    content = mutated(experiments.content(home), data.draw)
    try:
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    try:
        check_study(load_study(path))
    except UserError as error:
        assert error.what


@QUIET
@given(data=st.data())
def test_malformed_records_give_no_traceback(data: st.DataObject, home: Path) -> None:
    rows = [{"id": r.id, **r.content()} for r in tiny.requests(3)]
    original = [
        {
            "case_id": 1,
            "requested_rewrite": {
                "prompt": "{} is", "subject": "x", "target_new": {"str": "y"}, "target_true": {"str": "z"},
            },
            "paraphrase_prompts": ["x"],
        }
    ]  # fmt: skip
    easyedit = [{"case_id": 1, "prompt": "x is", "subject": "x", "target_new": "y", "ground_truth": "z"}]
    name, good = data.draw(st.sampled_from([("own", rows), ("counterfact", original), ("counterfact", easyedit)]))
    content = json.dumps(mutated(json.loads(json.dumps(good)), data.draw))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = home / "malformed.json"
    path.write_text(content, encoding="utf-8")
    try:
        load_requests(name, path)
    except UserError as error:
        assert error.what
        assert isinstance(error, Mistakes | UserError)
