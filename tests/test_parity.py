"""The comparison with recorded outputs: it passes where ours agrees, fails where not, and leaves nothing out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

import parity
import tiny
from bench.plain import GPT2, LLAMA, Fact, Names
from golden import Golden, relative_error, shared
from golden_writer import Writer
from parity_methods.easyedit_bos import lookups
from parity_methods.table import BROKEN, OVER, Row

RECORDED = shared() / "golden" / "gpt2-tiny"
NAMES: dict[str, Names] = {"gpt2": GPT2, "llama": LLAMA}
END = "<|end|>"


def with_bos() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with one BOS put in front of every text."""
    tokenizer: Tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def writer(folder: Path, kind: str) -> Writer:
    """A folder of recordings of a tiny model of this kind, with a byte-level tokenizer that adds no BOS."""
    facts = [(Fact(r.prompt, r.subject, r.target), str(r.old_target)) for r in tiny.requests(8)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level(), bos_token=END, eos_token=END)
    model = tiny.hf_model(kind, vocab_size=len(tokenizer)).requires_grad_(False)
    return Writer(folder, model, tokenizer, NAMES[kind], facts)


@pytest.fixture(scope="module", params=sorted(NAMES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    made = writer(tmp_path_factory.mktemp(request.param), request.param)
    folder = made.write()
    made.add_bos(with_bos())
    return folder


def rows_of(folder: Path) -> list[Row]:
    return parity.compare(Golden(folder))


def unaccounted(folder: Path, rows: list[Row], method: str) -> set[str]:
    """Recorded tensors of a method without any row, by the last parts of their names."""
    told = {(row.case, row.tensor.split("[")[0].split(" (")[0]) for row in rows if row.method == method}
    return {
        key
        for key in Golden(folder).tensors(method)
        if not any(key.endswith(f"{case}.{tensor}") or key == tensor for case, tensor in told)
    }


def copied(folder: Path, to: Path) -> Path:
    """The same folder elsewhere, its files linked, so that some can be replaced."""
    for path in folder.rglob("*"):
        if path.is_file():
            (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(folder)).write_bytes(path.read_bytes())
    return to


def altered(folder: Path, to: Path, method: str, **tensors: torch.Tensor) -> Path:
    """A copy of a folder with some tensors of one method replaced or added."""
    copied(folder, to)
    path = to / f"{method}.safetensors"
    save_file(load_file(path) | tensors, path)
    return to


def test_ours_agrees_on_made_recordings(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(made)]) == 0
    printed = capsys.readouterr().out
    assert "OVER" not in printed
    rows = rows_of(made)
    assert {row.check for row in rows} == {1, 2, 3, 4, 5, 6, 7}
    assert not unaccounted(made, rows, "rome")
    assert not unaccounted(made, rows, "memit")


def test_what_the_reference_broke_is_said_and_not_compared(made: Path) -> None:
    rows = [row for row in rows_of(made) if row.method == "rome" and row.variant == "last"]
    broken = {row.tensor for row in rows if row.verdict.startswith(BROKEN)}
    assert broken == {"grad_step0", "losses", "delta_steps", "steps", "target", "u", "v", "delta_W", "logprob_after"}
    compared = {row.tensor for row in rows if row.error is not None}
    assert {"cur_input", "cur_output", "losses[0]", "logprob_before", "v (closed form)"} <= compared
    assert all(row.error is None and row.tolerance is None for row in rows if row.verdict.startswith(BROKEN))


def test_the_index_behind_a_bos(made: Path) -> None:
    rows = [row for row in rows_of(made) if row.method == "easyedit_bos"]
    assert [row.verdict for row in rows if row.check == 1] == ["ok"] * 8
    assert [(row.tensor, row.verdict) for row in rows if row.check == 7] == [("delta_W", "ok")]


def test_a_wrong_index_behind_a_bos_is_the_references(tmp_path: Path) -> None:
    made = writer(tmp_path, "llama")
    made.write()
    made.add_bos(with_bos(), off=1)
    rows = [row for row in rows_of(tmp_path) if row.method == "easyedit_bos"]
    assert all(row.verdict.startswith(BROKEN) for row in rows if row.check in (1, 7))
    assert len([row for row in rows if row.check == 1]) == 8


def test_a_tensor_that_is_off_fails(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = load_file(made / "memit.safetensors")["std.batch3.z"] * 1.01
    assert parity.main([str(altered(made, tmp_path, "memit", **{"std.batch3.z": wrong})), "--methods", "memit"]) == 1
    over = [line for line in capsys.readouterr().out.splitlines() if line.endswith(OVER)]
    assert any(" z " in line and line.startswith("5") for line in over)


def test_a_tensor_without_a_rule_is_named(made: Path, tmp_path: Path) -> None:
    folder = altered(made, tmp_path, "rome", **{"cov.single0.surprise": torch.ones(2), "odd": torch.ones(2)})
    rows = parity.compare(Golden(folder), ["rome"])
    assert {row.tensor for row in rows if "no rule" in row.verdict} == {"cov.single0.surprise", "odd"}
    assert not any(row.failed for row in rows)


def test_a_method_without_an_adapter_is_named(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    save_file({"a": torch.ones(1)}, folder / "novel.safetensors")
    (folder / "novel.json").write_text("{}", encoding="utf-8")
    (row,) = parity.compare(Golden(folder), ["novel"])
    assert row.verdict == "not compared: no adapter for this method yet"


def test_an_adapter_that_fails_hides_no_other_method(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    (folder / "hparams" / "rome.json").write_text('{"cov": {}}', encoding="utf-8")
    rows = parity.compare(Golden(folder), ["rome", "covariance"])
    assert [row.kind for row in rows if row.method == "rome"] == ["COMPARISON FAILED"]
    assert {row.verdict for row in rows if row.method == "covariance"} == {"ok"}
    assert any(row.failed for row in rows)


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scalars", "found"),
    [
        ({"lookup": {"value": [5, 7]}}, [("lookup.0", 5), ("lookup.1", 7)]),
        ({"rome.single3.lookup": {"value": 4}}, [("rome.single3.lookup.3", 4)]),
        ({"lookup": {"value": {"0": 5, "1": 6}}}, [("lookup.value.0.0", 5), ("lookup.value.1.1", 6)]),
        ({"lookup": {"value": [[5], [7]]}}, [("lookup.0", 5), ("lookup.1", 7)]),
        ({"single0.time_s": {"value": 4}}, []),
    ],
)
def test_recorded_indices_are_found_however_they_are_nested(scalars: Any, found: list[tuple[str, int]]) -> None:
    assert list(lookups(scalars)) == found


def test_relative_error() -> None:
    nan = float("nan")
    assert relative_error(torch.tensor([1.0, nan]), torch.tensor([1.0, nan])) == 0
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, nan])) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(3)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == pytest.approx(0.25)


@pytest.mark.skipif(not RECORDED.exists(), reason=f"the recorded outputs are not at {RECORDED}")
def test_ours_agrees_with_the_recorded_reference() -> None:
    rows = rows_of(RECORDED)
    assert not [parity.line(row) for row in rows if row.failed]
    assert not unaccounted(RECORDED, rows, "rome")
    assert not unaccounted(RECORDED, rows, "memit")
    assert {row.variant for row in rows if row.method == "rome" and row.verdict.startswith(BROKEN)} == {"last"}
    assert {row.variant for row in rows if row.method == "memit" and row.error is not None} == {"std", "loose"}
