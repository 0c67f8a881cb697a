"""Records out of JSON files, each with the place it came from, so that a mistake in one can be found.

JSON arrays and JSON lines, plain or gzipped. The place is a line number in both cases.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manyedits.errors import UserError

Record = tuple[str, dict[str, Any]]  # "FILE, line N" and the record


def read_text(path: Path) -> str:
    """A file's text; a name that ends in .gz is unpacked."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"There is no file {path}.", "Correct the path in the experiment.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Is the file complete?") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.", "Is it another kind of file?") from None


def read_records(path: Path) -> list[Record]:
    """All records of a file. Raises ``UserError`` naming file and line for what is no record."""
    text = read_text(path)
    found = list(_array(path, text) if text.lstrip()[:1] == "[" else _lines(path, text))
    if not found:
        raise UserError(f"{path} holds no records.", "Give a JSON array or JSON lines.")
    return found


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):  # no splitlines(): U+2028 may stand inside a record
        if line.strip():
            try:
                yield _record(f"{path}, line {number}", json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}).", "Mend or remove the line.") from None
            except RecursionError:
                raise UserError(f"{path}, line {number}: nested too deeply.", "Mend or remove the line.") from None


def _array(path: Path, text: str) -> Iterator[Record]:
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    line, counted = 1, 0
    while True:
        while position < len(text) and (text[position].isspace() or text[position] == ","):
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            raise UserError(f"{path}, line {line}: the array has no end.", "Is the file complete?")
        if text[position] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise UserError(f"{path}, line {line}: not JSON ({error}).", "Is the file complete?") from None
        except RecursionError:
            raise UserError(f"{path}, line {line}: nested too deeply.", "Mend or remove the record.") from None
        yield _record(f"{path}, line {line}", value)


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {_short(value)} is no record.", "A record is a JSON object.")
    return where, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def text_field(where: str, record: dict[str, Any], *names: str, empty: bool = False) -> str:
    """A text of a record, found by following names inward. Raises ``UserError`` when it is missing, empty or no text."""
    value: Any = record
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"{where}: the field `{'.'.join(names)}` is missing.", "Every record needs it.")
        value = value[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: the field `{'.'.join(names)}` is {_short(value)}, not a text.", "Give a text.")
    if not empty and not value.strip():
        raise UserError(f"{where}: the field `{'.'.join(names)}` is empty.", "Every record needs it.")
    return _whole(where, ".".join(names), value)


def _whole(where: str, name: str, value: str) -> str:
    r"""JSON can escape half of a character, such as ``\ud800``, which no tokenizer and no file takes."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: the field `{name}` holds half of a character.", "Write the text again.")
    return value


def optional_text(where: str, record: dict[str, Any], name: str) -> str | None:
    """A text that a record may lack."""
    return None if record.get(name) is None else text_field(where, record, name).strip()


def id_field(where: str, record: dict[str, Any], name: str) -> str:
    """A record's id, a text or a whole number; its place in the file when it has none."""
    value = record.get(name)
    if value is None:
        return where.rsplit(" ", 1)[-1]
    if type(value) not in (str, int):
        raise UserError(f"{where}: the field `{name}` is {_short(value)}.", "Give a text or a whole number.")
    return _whole(where, name, str(value))


def texts_field(where: str, record: dict[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts of a record; absent means none, one text means a list of it."""
    value = record.get(name) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(
            f"{where}: the field `{name}` is {_short(value)}, not a list of texts.", "Give a list of texts."
        )
    return tuple(_whole(where, name, text) for text in value)
