"""A JSON or JSON lines file in, its rows with their places out; in memory stands one row, however long the file.

Whether a file holds an array or lines is found from its first character, not from its name. What cannot be read as a
row comes out as the BadRow that says why, and the rest is used.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from align.data.entry import BadRow
from align.errors import UserError

CHUNK_BYTES = 1 << 20
_DECODER = json.JSONDecoder()
# What decides where a value ends: strings as a whole, brackets, and a quote whose string is not all there yet.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
_SPACE = re.compile(r"[\s]*")
_BARE = re.compile(r"[^,\]\s]*")


@dataclass(frozen=True)
class Row:
    """A row and where it stands (`file:line`); `data` is a BadRow where it could not be read."""

    where: str
    data: dict[str, Any] | BadRow


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that holds an array of objects, an object a line, or one object.

    Raises:
        UserError: an array is not UTF-8 text, or ends before it is closed.
    """
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _array_rows(file, path)
        elif path.suffix.lower() == ".json" and not _starts_with_an_object(file):
            data = _whole(path)
            yield Row(f"{path}, entry 1", data)
        else:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(f"{path}:{number}", parse_object(line))


def parse_object(line: bytes) -> dict[str, Any] | BadRow:
    """The JSON object of a line, or why there is none.

    >>> parse_object(b"[" * 100_000).reason, parse_object(b"9" * 5000).reason
    ('nested too deep', 'a number has too many digits')
    """
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return _why_not(error)
    return data if isinstance(data, dict) else BadRow("no JSON object", type(data).__name__)


def _why_not(error: Exception) -> BadRow:
    if isinstance(error, UnicodeDecodeError):
        return BadRow("not UTF-8 text", f"byte {error.start}")
    if isinstance(error, json.JSONDecodeError):
        return BadRow("no valid JSON", f"{error.msg} at column {error.colno}")
    if isinstance(error, RecursionError):
        return BadRow("nested too deep")
    return BadRow("a number has too many digits", str(error).partition(";")[0])


def _starts_with_an_object(file: BinaryIO) -> bool:
    """Whether the first line that is not empty is an object by itself."""
    first = next((line for line in file if line.strip()), b"")
    return isinstance(parse_object(first), dict)


def _whole(path: Path) -> dict[str, Any] | BadRow:
    """The one object that a file holds; what is none fails the file, since nothing else is in it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg} at line {error.lineno})", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        return _why_not(error)
    return data if isinstance(data, dict) else BadRow("no JSON object", type(data).__name__)


def not_utf8(path: Path, byte: int) -> UserError:
    """The error for a file that is another encoding's."""
    return UserError(f"not UTF-8 text (byte {byte})", where=str(path), fix="save it as UTF-8")


def _array_rows(file: BinaryIO, path: Path) -> Iterator[Row]:
    text = _Text(file, path)
    text.skip("[")
    number = 0
    while not text.at("]"):
        number += 1
        data = text.value()
        fault = data if isinstance(data, BadRow) else BadRow("no JSON object", type(data).__name__)
        yield Row(f"{path}, entry {number}", data if isinstance(data, dict) else fault)
        if text.at(","):
            text.skip(",")
        elif not text.at("]"):
            raise text.broken(f"expected a comma or the end of the array behind entry {number}")


class _Text:
    """A file's text from the place that is being read on; more is read as it is needed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._read, self._ended = "", 0, 0, False

    def at(self, character: str) -> bool:
        """Whether the next character that is no white space is this one; UserError at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._place)
            assert found is not None
            self._place = found.end()
            if self._place < len(self._text):
                return self._text[self._place] == character
            if not self._more():
                raise self.broken("the array is not closed")

    def skip(self, character: str) -> None:
        """Go behind a character that must come next."""
        assert self.at(character)
        self._place += 1

    def value(self) -> Any:
        """The next value, or the BadRow that says why it is none; the place is behind it."""
        self.at("")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                end = self._end()
                value = _why_not(error)
            # A number or a word at the end of the buffer may go on behind it.
            if 0 < end < len(self._text) or self._ended:
                break
            self._more()
        if end <= self._place:
            raise self.broken("an entry is not closed")
        self._place = end
        return value

    def broken(self, what: str) -> UserError:
        """The error for a file that is no JSON array."""
        return UserError(f"not valid JSON ({what})", where=str(self._path), fix="is the file complete?")

    def _end(self) -> int:
        """Where the value that starts here ends, by its brackets alone; 0 where the text so far does not hold it."""
        if self._text[self._place] not in '[{"':
            found = _BARE.match(self._text, self._place)
            return found.end() if found else 0
        depth = 0
        for token in _TOKEN.finditer(self._text, self._place):
            if token[0] == '"':
                return 0
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if depth <= 0:
                return token.end()
        return 0

    def _more(self) -> bool:
        """Read on, twice as much as is left each time, so that a long row costs what it holds; False at the end."""
        data = self._file.read(max(CHUNK_BYTES, 2 * (len(self._text) - self._place)))
        try:
            text = self._decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # Bytes of a character that the last chunk began stand before this one's in what was decoded.
            raise not_utf8(self._path, self._read - (len(error.object) - len(data)) + error.start) from None
        self._text, self._place = self._text[self._place :] + text, 0
        self._read += len(data)
        self._ended = not data
        return bool(data)
