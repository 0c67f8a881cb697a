"""Plain text that statistics are gathered over, and its identity."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manyedits.data.reading import read_text
from manyedits.errors import UserError
from manyedits.registry import Registry

#: Texts that the package itself carries.
CORPORA = Registry("corpus", {"world": "manyedits.world.data:corpus"})

#: A heading as wikis write it: ``= Title =``, ``== Section ==``.
HEADING = re.compile(r"(=(?: ?=)*) [^\n]* \1")


@dataclass(frozen=True)
class Corpus:
    """Texts in a fixed order, and a digest of them all."""

    texts: Callable[[], Iterator[str]]
    digest: str


def read_corpus(path: Path) -> Corpus:
    """A corpus out of a file: plain text, a text per paragraph; or JSON lines with a field ``text``. Gzipped or not.

    Paragraphs end at a blank line, whatever ends a line. A wiki heading belongs to the paragraph after it.
    """
    content = read_text(path)
    texts = _lines(path, content) if ".jsonl" in path.suffixes else _paragraphs(content)
    if not texts:
        raise UserError(f"{path} holds no text.", "Name another file in `statistics: {corpus: ...}`.")
    return Corpus(lambda: iter(texts), hashlib.sha256("\0".join(texts).encode()).hexdigest())


def _paragraphs(content: str) -> list[str]:
    texts, headings = [], []
    for part in re.split(r"\n[^\S\n]*\n", content.replace("\r\n", "\n")):
        text = part.strip()
        if HEADING.fullmatch(text):
            headings.append(text)
        elif text:
            texts.append("\n".join([*headings, text]))
            headings = []
    return [*texts, *(["\n".join(headings)] if headings else [])]


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.rstrip("\n").split("\n"), 1):  # U+2028 may stand inside a text
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # JSON can escape half of a character
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}, line {number}: no JSON object with a field `text`.", "Mend the line.") from None
        texts += [text] if text.strip() else []
    return texts
