"""Records of a JSON list or of JSON lines one at a time, in memory that does not grow with the file.

`read_json` holds a whole file and all its values at once: gigabytes, for the annotations of a million images. Here a
window of text passes over the file. A record is known by its place, the byte it starts at, and is read again from
there, so that what is kept of a large file may be numbers alone.
"""

import json
import os
import re
from codecs import BOM_UTF16_LE, BOM_UTF32_LE, getincrementaldecoder
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from bpo_fast.runs.files import json_file, parse_json, unique_keys

WINDOW = 1 << 20  # bytes read at a time
LONGEST_RECORD = 1 << 26  # characters
# Of one record read by its place: most are shorter.
_ONE_RECORD = 1 << 13
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
# A value that the window cuts may look wrong this near to the window's end ("tru", "\ud83d\ude0"), or whole ("12.").
_LONGEST_TOKEN = 16


class JsonRecords:
    """The records of a file, iterated as (place, record).

    The text is UTF-8, UTF-16 or UTF-32, with or without a byte-order mark. A file is a list if it starts with a
    bracket, and otherwise JSON lines if it is called .jsonl or if more lines follow a first one that is an object.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: `path` is not a file.
        OSError, ValueError: while records are read, with `read_json`'s sentences; also for what is neither a list nor
            lines, and for a record of over 2**26 characters.

    Example:

    >>> from pathlib import Path; from tempfile import mkdtemp
    >>> path = Path(mkdtemp(), "records.json")
    >>> _ = path.write_text('[{"id": 1},\\n {"id": 2}]')
    >>> list(JsonRecords(path)), JsonRecords(path).read([13])
    ([(1, {'id': 1}), (13, {'id': 2})], [{'id': 2}])
    """

    def __init__(self, path: str | os.PathLike):
        self.path = json_file(path)

    @property
    def size(self) -> int:
        """Bytes of the file: places are smaller."""
        return self.path.stat().st_size

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        with self._open() as file:
            text = _Text(file, self.path)
            first = text.peek()
            if first == "[":
                yield from _list(text)
            elif self.path.suffix == ".jsonl":
                yield from _lines(text)
            elif not first:
                raise ValueError(f"{self.path}: found an empty file, expected JSON.")
            else:
                place, line = text.place, text.line
                value = text.value()
                one_line = text.line == line and isinstance(value, dict) and text.rest_of_line_is_blank()
                if not text.peek():
                    raise ValueError(f"{self.path}: found a {type(value).__name__}, expected a JSON list of records.")
                if not one_line:
                    text.fail("Extra data")
                yield place, value
                yield from _lines(text)

    def read(self, places: Iterable[int]) -> list[Any]:
        """The records at these places, which the iteration gave."""
        with self._open() as file:
            return [_Text(file, self.path, place).value(_ONE_RECORD) for place in places]

    @contextmanager
    def _open(self):
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise OSError(
                f"{self.path}: found a file that cannot be read ({error.strerror}), expected a JSON file."
            ) from None


def _list(text):
    text.skip(1)
    if text.peek() != "]":
        while True:
            yield text.place, text.value()
            if text.peek() != ",":
                break
            text.skip(1)
            text.peek()
        if text.peek() != "]":
            text.fail("Expecting ',' delimiter")
    text.skip(1)
    if text.peek():
        text.fail("Extra data")


def _lines(text):
    while text.peek():
        place, number, before = text.place, text.line, " " * (text.column - 1)  # so that columns count from the line's
        yield place, parse_json(before + text.rest_of_line(), text.path, number)


class _Text:
    """A window on a file's text, from `place` on.

    Attributes:
        place, line, column: of the next character: its byte in the file, and where an editor shows it.
    """

    def __init__(self, file: BinaryIO, path: os.PathLike, place: int = 0):
        self.path, self.file = path, file
        file.seek(0)
        head = file.read(4)
        encoding = json.detect_encoding(head)
        mark = {"utf-8-sig": 3, "utf-16": 2, "utf-32": 4}.get(encoding, 0)
        # Without its mark the text is decoded, and measured in bytes, by the encoding that says its byte order.
        if mark:
            little = head.startswith((BOM_UTF16_LE, BOM_UTF32_LE))
            encoding = "utf-8" if mark == 3 else f"{encoding}-{'le' if little else 'be'}"
        self.encoding = encoding
        self.decoder = getincrementaldecoder(encoding)()
        self.place = self.read_to = max(place, mark)
        self.line, self.column = 1, 1
        self.buffer, self.at = "", 0  # the window, and the next character in it
        self.ended = False
        file.seek(self.place)

    def peek(self) -> str:
        """The next character after white space, or "" at the end; the white space is passed."""
        while True:
            self.skip(_BLANK.match(self.buffer, self.at).end() - self.at)
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self._read(WINDOW)

    def value(self, window: int = WINDOW) -> Any:
        """The next value, which starts at the next character."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
                may_go_on = isinstance(value, int | float) and end > len(self.buffer) - _LONGEST_TOKEN
                if self.ended or not may_go_on:
                    self.skip(end - self.at)
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.buffer) - _LONGEST_TOKEN or error.msg.startswith("Unterminated")
                if self.ended or not cut:
                    self.skip(error.pos - self.at)
                    self.fail(error.msg)
            # A key twice, a number of thousands of digits, brackets within brackets without end.
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}: found an error ({error}), expected valid JSON.") from None
            self._read(window)
            window *= 2  # so that a long record is tried a few times only

    def rest_of_line(self) -> str:
        """The text up to the end of the line, which is passed."""
        window = WINDOW
        while (end := self.buffer.find("\n", self.at)) < 0 and not self.ended:
            self._read(window)
            window *= 2
        text = self.buffer[self.at : end if end >= 0 else len(self.buffer)]
        self.skip(len(text))
        return text

    def rest_of_line_is_blank(self) -> bool:
        """Whether nothing but white space is left of the line; that is passed, where there is more."""
        line = self.line
        return not self.peek() or self.line > line

    def skip(self, count: int) -> None:
        passed = self.buffer[self.at : self.at + count]
        self.at += count
        self.place += len(passed.encode(self.encoding))
        newlines = passed.count("\n")
        self.line += newlines
        self.column = count - passed.rfind("\n") if newlines else self.column + count

    def fail(self, what: str) -> None:
        where = f"line {self.line}, column {self.column}"
        raise ValueError(f"{self.path}: found an error at {where} ({what}), expected valid JSON.")

    def _read(self, size):
        if len(self.buffer) - self.at > LONGEST_RECORD:
            raise ValueError(
                f"{self.path}: found a record of over {LONGEST_RECORD:,} characters at line {self.line}, column "
                f"{self.column}, expected shorter ones; look there for a quotation mark or bracket without its end."
            )
        data = self.file.read(size)
        pending = self.decoder.getstate()[0]
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + self.buffer.count("\n", self.at) + (pending + data).count(b"\n", 0, error.start)
            raise ValueError(
                f"{self.path}: found byte {self.read_to - len(pending) + error.start}, in line {line}, that cannot be "
                "decoded, expected UTF-8 text."
            ) from None
        self.read_to += len(data)
        self.buffer, self.at = self.buffer[self.at :] + text, 0
        self.ended = not data
