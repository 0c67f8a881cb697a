"""Plain text that statistics are gathered over, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manyedits.data.reading import read_text
from manyedits.errors import UserError
from manyedits.registry import Registry

#: Texts that the package itself carries.
CORPORA = Registry("corpus", {"world": "manyedits.world.data:corpus"})


@dataclass(frozen=True)
class Corpus:
    """Texts in a fixed order, and a digest of them all."""

    texts: Callable[[], Iterator[str]]
    digest: str


def read_corpus(path: Path) -> Corpus:
    """A corpus out of a file: plain text, a text per paragraph; or JSON lines with a field ``text``. Gzipped or not."""
    content = read_text(path)
    texts = _lines(path, content) if ".jsonl" in path.suffixes else _paragraphs(content)
    if not texts:
        raise UserError(f"{path} holds no text.", "Name another file in `statistics: {corpus: ...}`.")
    return Corpus(lambda: iter(texts), hashlib.sha256(content.encode()).hexdigest())


def _paragraphs(content: str) -> list[str]:
    return [part.strip() for part in content.split("\n\n") if part.strip()]


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.rstrip("\n").split("\n"), 1):  # U+2028 may stand inside a text
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: no JSON object with a field `text`.", "Mend the line.") from None
    return texts
