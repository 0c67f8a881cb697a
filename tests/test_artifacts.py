"""The store of slow things: built once, found by content, waited for, gone on with after a stop."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manyedits.artifacts import Artifacts, canonical, default_root
from manyedits.errors import UserError


class Builder:
    """Counts how often it is asked, and leaves notes as slow builders do."""

    def __init__(self, seconds: float = 0, fail: bool = False) -> None:
        self.seconds, self.fail, self.calls, self.found = seconds, fail, 0, [""]

    def __call__(self, notes: Path) -> dict[str, Tensor]:
        self.calls += 1
        notes.mkdir(parents=True, exist_ok=True)
        self.found = [p.name for p in notes.iterdir()]
        (notes / "half").write_text("done so far")
        time.sleep(self.seconds)
        if self.fail:
            raise KeyboardInterrupt
        return {"moment": torch.arange(4.0)}


def test_an_artifact_is_built_once_and_read_from_then_on(tmp_path: Path) -> None:
    build = Builder()
    for store in (Artifacts(tmp_path), Artifacts(tmp_path)):
        read = store.get_or_build("moments", {"layer": 3, "model": "x"}, build)
        assert torch.equal(read["moment"], torch.arange(4.0))
    assert build.calls == 1
    assert [p.suffix for p in (tmp_path / "moments").iterdir() if p.suffix != ".lock"] == [".safetensors"]


def test_the_order_of_a_key_does_not_count_and_its_content_does(tmp_path: Path) -> None:
    assert canonical({"a": 1, "b": [2]}) == canonical({"b": [2], "a": 1})
    store, build = Artifacts(tmp_path), Builder()
    for key in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}, {"a": "1", "b": 2}):
        store.get_or_build("moments", key, build)
    assert build.calls == 3
    store.get_or_build("other", {"a": 1, "b": 2}, build)
    assert build.calls == 4


def test_a_stopped_build_finds_its_notes_again(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_build("moments", {"a": 1}, Builder(fail=True))
    build = Builder()
    store.get_or_build("moments", {"a": 1}, build)
    assert build.found == ["half"]
    assert not list(tmp_path.rglob("half")), "notes are removed when the artifact is done"


def test_a_second_builder_waits_for_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build, read = Builder(seconds=0.5), list[Any]()

    def ask() -> None:
        read.append(Artifacts(tmp_path).get_or_build("moments", {"a": 1}, build))

    with caplog.at_level(logging.WARNING):
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
    assert build.calls == 1 and len(read) == 2
    assert "waiting for another process" in caplog.text


def test_json_is_kept_the_same_way(tmp_path: Path) -> None:
    store, calls = Artifacts(tmp_path), []
    for _ in range(2):
        assert store.get_or_build_json("contexts", {"a": 1}, lambda: calls.append(1) or ["x", "é"]) == ["x", "é"]
    assert calls == [1]


def test_the_folder_may_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYEDITS_CACHE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("MANYEDITS_CACHE")
    assert default_root().name == "manyedits"


def test_a_store_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written") as caught:
        Artifacts(tmp_path / "file").get_or_build("moments", {"a": 1}, Builder())
    assert "MANYEDITS_CACHE" in caught.value.hint


def test_a_damaged_artifact_is_named(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)
    store.get_or_build("moments", {"a": 1}, Builder())
    path = store.place("moments", {"a": 1}, ".safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=path.name) as caught:
        store.get_or_build("moments", {"a": 1}, Builder())
    assert "made again" in caught.value.hint
