"""The shape of the code itself: imports go one way, importing does nothing, files have one subject."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "manyedits"
FILES = sorted(ROOT.rglob("*.py"))

#: Lower numbers may not import higher ones. A folder's number stands for its files.
LEVELS = {
    "errors": 0, "registry": 0, "progress": 0, "stats": 0,
    "complaints": 0, "rundir": 1, "config": 1, "arch": 1, "data": 1, "artifacts": 2, "results": 2, "report": 3, "bars": 1,
    "tokens": 3, "hooks": 3, "changes": 3, "model": 4, "loading": 5,
    "prefix": 4, "encoding": 5, "cache": 5, "decoding": 6, "lm": 7,
    "methods": 9, "benchmarks": 9, "scores": 10, "trajectory": 10,
    "assembly": 11, "checks": 12, "verify": 12, "planning": 13, "world": 13, "listing": 13, "executors": 13,
    "runner": 14, "demo": 15, "cli": 16, "__main__": 17, "__init__": 0,
}  # fmt: skip

#: Imports inside functions that go up on purpose, each with its reason.
UPWARD = {
    ("changes", "model"): "for types only",
    ("model", "loading"): "EditableModel.load is the public door to loading",
    ("loading", "world"): "world:m is a reference to a model; the package is looked at only when one is asked for",
    ("data", "world"): "the world's facts are one of the data sets; looked at only when asked for",
}


def imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("manyedits"):
            names = [node.module] if node.module != "manyedits" else [f"manyedits.{a.name}" for a in node.names]
            found |= {n.split(".")[1] for n in names if "." in n}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("manyedits.")}
    return found


def part(path: Path) -> str:
    """The file or folder that a file belongs to, directly under the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    mine = part(path)
    assert mine in LEVELS, f"{mine} has no place in the order of layers"
    for other in imported(path) - {mine}:
        if (mine, other) not in UPWARD:
            assert LEVELS[other] <= LEVELS[mine], f"{mine} imports {other}, which stands above it"


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.name)
def test_no_method_imports_another_or_the_trajectory(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert "manyedits.trajectory" not in modules
    registered = {f.stem for f in (ROOT / "methods").glob("*.py") if "(EditMethod)" in f.read_text(encoding="utf-8")}
    others = {m.rsplit(".", 1)[1] for m in modules if m.startswith("manyedits.methods.")} & registered - {path.stem}
    assert others <= {"memit"}, "only MEMIT's solve is varied by inheritance"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_no_benchmark_imports_a_method(path: Path) -> None:
    assert "methods" not in imported(path)


def test_files_have_one_subject() -> None:
    assert [str(p.name) for p in FILES if len(p.read_text(encoding="utf-8").splitlines()) > 400] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_print_no_star_import_and_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("manyedits", ["torch", "transformers", "lm_eval", "pydantic"]),
        ("manyedits.cli", ["torch", "transformers", "lm_eval"]),
        ("manyedits.results", ["torch", "transformers"]),
        ("manyedits.report.markdown", ["torch", "transformers"]),
    ],
)
def test_what_an_import_brings_along(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
