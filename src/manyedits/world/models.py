"""Where the miniature's models lie, and whether they are what was shipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from manyedits.errors import UserError
from manyedits.registry import near_miss

FOLDER = Path(__file__).parent / "models"
PREFIX = "world:"


def names() -> list[str]:
    """The models that are shipped, as references: ``world:m``."""
    return [f"{PREFIX}{name}" for name in digests()]


def digests() -> dict[str, str]:
    """sha256 of each shipped weights file."""
    file = FOLDER / "digests.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def path_of(reference: str) -> Path:
    """The folder of a model. Raises ``UserError`` for an unknown one, or when its weights are damaged."""
    name, known = reference.removeprefix(PREFIX), digests()
    if name not in known:
        raise UserError(
            f"There is no model `{reference}` in the world.{near_miss(reference, names())}",
            f"Known: {', '.join(names())}.",
        )
    weights = FOLDER / name / "model.safetensors"
    if not weights.is_file() or digest(weights) != known[name]:
        raise UserError(
            f"The weights of `{reference}` are damaged: {weights} is not the file that was shipped.",
            f"Install the package again, or rebuild them with `manyedits world train {name}`.",
        )
    return FOLDER / name


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
