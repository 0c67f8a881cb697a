"""Experiments: what a file means, what changes its digest and what does not, grids, and random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import experiments
from manyedits.checks import check_study
from manyedits.config import Options, Study, load_study
from manyedits.errors import UserError
from manyedits.planning import as_text, plan_study


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    experiments.content(folder)
    return folder


def read(home: Path, **changes: Any) -> Study:
    return experiments.study(home, **changes)


def test_a_method_may_be_a_name_or_a_mapping_with_its_parameters(home: Path) -> None:
    assert read(home, method="rome").cells[0].method.model_dump() == {"name": "rome", "preset": None, "overrides": {}}
    spec = read(home, method={"name": "rome", "preset": "tiny", "layer": 1}).cells[0].method
    assert (spec.name, spec.preset, spec.overrides) == ("rome", "tiny", {"layer": 1})


def test_checkpoints_are_put_in_order_once_each(home: Path) -> None:
    assert read(home, checkpoints=[6, 0, 3, 3]).cells[0].checkpoints == (0, 3, 6)


def test_paths_hold_from_the_experiment_file(home: Path) -> None:
    (home / "below").mkdir(exist_ok=True)
    content = experiments.content(home, model="../model-gpt2", statistics={"corpus": "../text.txt"})
    content["data"]["path"] = "../facts6.jsonl"
    path = home / "below" / "experiment.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    cell = load_study(path).cells[0]
    assert cell.model == str((home / "model-gpt2").resolve())
    assert cell.data.path == str((home / "facts6.jsonl").resolve())
    check_study(load_study(path))


def test_experiments_are_frozen(home: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read(home).cells[0].batch = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"checkpoints": [0, 6]},
        {"dtype": "bfloat16"},
        {"threads": 2},
        {"method": {"name": "rome", "preset": "tiny", "value": {"steps": 5}}},
        {"benchmarks": []},
        {"conflicts": "keep"},
        {"max_new_tokens": 5},
    ],
)
def test_what_changes_a_result_changes_the_digest(home: Path, change: dict[str, Any]) -> None:
    assert read(home, **change).digest() != read(home).digest()


def test_where_the_files_lie_does_not_change_the_digest(home: Path, tmp_path: Path) -> None:
    assert read(tmp_path).digest() == read(home).digest()
    here, there = ({"random": "gpt2", "tokenizer": str(folder / "model-gpt2")} for folder in (home, tmp_path))
    assert read(home, model=here).digest() == read(tmp_path, model=there).digest()


def test_a_list_makes_a_grid_with_folders_named_by_what_differs(home: Path) -> None:
    content = experiments.content(home, method=["rome", {"name": "memit", "preset": "tiny"}], batch=1)
    content["data"]["seed"] = [0, 1]
    path = home / "grid.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    study = load_study(path)
    names = [folder.name for folder in study.folders(Options(out=home / "out"))]
    assert names == ["rome-seed0", "rome-seed1", "memit-seed0", "memit-seed1"]
    assert [cell.data.seed for cell in study.cells] == [0, 1, 0, 1]
    assert len({cell.digest() for cell in study.cells}) == 4


def test_cells_that_only_differ_in_parameters_get_different_folders(home: Path) -> None:
    methods = [{"name": "rome", "preset": "tiny", "layer": layer} for layer in (0, 1)]
    folders = read(home, method=methods).folders(Options(out=home / "out"))
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"method": [{"name": "rome", "preset": "tiny", "layer": i} for i in (0, 1)]}, ["rome-layer0", "rome-layer1"]),
        (
            {"method": ["memit", *({"name": "rome", "preset": "tiny", "value": {"steps": i}} for i in (4, 5))]},
            ["memit", "rome-value.steps4", "rome-value.steps5"],
        ),
        ({"method": ["rome", {"name": "rome", "preset": "tiny"}]}, ["rome", "rome-tiny"]),
        ({"model": ["a/x", "b/x", "b/y@main"]}, ["a-x", "b-x", "y"]),
        ({"model": ["o/x@1", "o/x@2"]}, ["cell-1", "cell-2"]),
    ],
)
def test_folders_say_what_differs(home: Path, change: dict[str, Any], wanted: list[str]) -> None:
    assert [folder.name for folder in read(home, **change).folders(Options(out=home / "out"))] == wanted


def test_a_grid_with_the_same_cell_twice_is_refused(home: Path) -> None:
    with pytest.raises(UserError, match="the same cell twice"):
        read(home, batch=[1, 1])


def test_one_cell_needs_no_folder_of_its_own(home: Path) -> None:
    study = read(home)
    assert list(study.folders(Options(out=home / "out"))) == [home / "out"]
    assert study.out(Options()) == Path("runs") / f"experiment-{study.digest()[:8]}"


def test_a_plan_counts_edits_memory_and_disk(home: Path) -> None:
    plan = plan_study(read(home, method=[{"name": "memit", "preset": "tiny"}], batch=[1, 4]), Options(out=home / "o"))
    one, four = plan["cells"]
    assert (one["edits"], four["edits"]) == (6, 2)
    assert (one["checkpoints"], four["checkpoints"]) == ([0, 3, 6], [0, 6])
    assert four["not_measured"] == [3]
    assert one["memory"] > 0 and plan["disk"] == one["disk"] + four["disk"]
    assert "6 requests in 2 edits; measured at 0, 6" in as_text(plan)


# --- random models ----------------------------------------------------------------------------------------------------


def random_model(home: Path, **changes: Any) -> dict[str, Any]:
    return {"random": "gpt2", "tokenizer": str(home / "model-gpt2"), "n_embd": 32, "n_layer": 3, "n_head": 4, **changes}


def test_a_random_model_is_planned_from_its_config(home: Path) -> None:
    cell = plan_study(read(home, model=random_model(home)), Options(out=home / "o"))["cells"][0]
    assert cell["memory"] > 12 * 3 * 32**2 * 4


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"random": "lama"}, "no random model `lama`. Did you mean `llama`"),
        ({"random": 3}, "no random model `3`"),
        ({"random": ["gpt2"]}, "no random model"),
        ({"random": "bert-base"}, "no random model `bert-base`"),
        ({"tokenizer": None}, "needs a tokenizer"),
        ({"tokenizer": "./nowhere"}, "no model folder `./nowhere`"),
        ({"n_embd": "wide"}, "No random model `gpt2`"),
        ({"seed": "x"}, "The seed of a random model is 'x'"),
        ({"n_layer": 1}, "to edit layer 2, the model has 1 layers"),
    ],
)
def test_a_random_model_that_cannot_be(home: Path, change: dict[str, Any], wanted: str) -> None:
    method = {"name": "rome", "preset": "tiny", "layer": 2}
    with pytest.raises(UserError) as caught:
        check_study(read(home, model=random_model(home, **change), method=method))
    assert wanted in str(caught.value)


ODD = st.one_of(st.none(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5), st.lists(st.integers()))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(change=st.dictionaries(st.sampled_from(["random", "tokenizer", "n_embd", "n_layer", "n_head", "seed"]), ODD))
def test_malformed_random_models_give_no_traceback(home: Path, change: dict[str, Any]) -> None:
    try:
        plan_study(read(home, model=random_model(home, **change)), Options(out=home / "o"))
    except UserError as error:
        assert error.what
