"""A small experiment on disk: a tiny model's folder, a file of facts, a text, and the YAML that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import tiny
from manyedits.config import Study, load_study


def write_model(folder: Path, kind: str = "gpt2") -> Path:
    """A tiny model with its tokenizer as a folder that transformers can load."""
    tiny.hf_model(kind).save_pretrained(folder)
    tiny.tokenizer(kind).save_pretrained(folder)
    return folder


def write_facts(path: Path, count: int = 6) -> Path:
    """Facts in our own form."""
    rows = [{"id": r.id, **r.content()} for r in tiny.requests(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def content(folder: Path, count: int = 6, kind: str = "gpt2", **changes: Any) -> dict[str, Any]:
    """An experiment's content; everything it names is written below ``folder``."""
    model = folder / f"model-{kind}"
    if not model.is_dir():
        write_model(model, kind)
    (folder / "text.txt").write_text("\n\n".join(tiny.TEXT), encoding="utf-8")
    write_facts(folder / f"facts{count}.jsonl", count)
    return {
        "model": str(model),
        "method": {"name": "rome", "preset": "tiny", "value": {"steps": 4}},
        "data": {"name": "own", "path": str(folder / f"facts{count}.jsonl")},
        "checkpoints": [0, count // 2, count],
        "benchmarks": ["edits"],
        "statistics": {"corpus": str(folder / "text.txt")},
        **changes,
    }


def write(folder: Path, name: str = "experiment.yaml", **changes: Any) -> Path:
    """The experiment as a YAML file."""
    path = folder / name
    path.write_text(yaml.safe_dump(content(folder, **changes)), encoding="utf-8")
    return path


def study(folder: Path, **changes: Any) -> Study:
    """The experiment, read."""
    return load_study(write(folder, **changes))
