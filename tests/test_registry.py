"""Names to things: ours and other packages', loaded on use, the near miss for a wrong one; errors as the user sees them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from manyedits.errors import Mistakes, UserError, raise_all
from manyedits.registry import Registry, near_miss

TABLE = {"fraction": "fractions:Fraction", "wave": "wave:open"}


def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An installed package with one entry point."""
    facts = folder / "other-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[manyedits.things]\nforeign = {value}\nfraction = {value}\n")
    (folder / "other_package.py").write_text("thing = 'from another package'\n")
    monkeypatch.syspath_prepend(str(folder))


def test_nothing_is_imported_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    registry = Registry("thing", TABLE)
    assert registry.names() == ["fraction", "wave"] and "wave" not in sys.modules
    assert registry.load("wave") is sys.modules["wave"].open


def test_another_package_may_add_names_but_not_replace_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fractions import Fraction

    plugin(tmp_path, monkeypatch, "other_package:thing")
    registry = Registry("thing", TABLE, "manyedits.things")
    assert registry.names() == ["fraction", "wave", "foreign"]
    assert registry.load("foreign") == "from another package"
    assert registry.load("fraction") is Fraction


@pytest.mark.parametrize("value", ["no_such_package:thing", "other_package:nothing"])
def test_a_broken_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    plugin(tmp_path, monkeypatch, value)
    with pytest.raises(UserError, match=f"The thing `foreign` of another package .{value}. cannot be loaded"):
        Registry("thing", TABLE, "manyedits.things").load("foreign")


def test_an_unknown_name_gets_the_near_miss() -> None:
    with pytest.raises(UserError) as caught:
        Registry("thing", TABLE).load("fractoin")
    assert str(caught.value) == "There is no thing `fractoin`. Did you mean `fraction`? Known: fraction, wave."
    assert near_miss("Fraction", TABLE) == " Did you mean `fraction`?"
    assert near_miss("zzz", TABLE) == ""


def test_mistakes_are_numbered_and_one_alone_is_not() -> None:
    errors = [UserError("A is wrong.", "Mend A."), UserError("B is wrong.")]
    assert str(Mistakes(errors)) == "2 mistakes:\n  1. A is wrong. Mend A.\n  2. B is wrong."
    assert str(Mistakes(errors[:1])) == "A is wrong. Mend A."
    raise_all([])
    with pytest.raises(Mistakes):
        raise_all(errors)
