"""JSON and strings that somebody else wrote: read within bounds, and printed so that a terminal only shows them."""

import json
import os
import stat
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20
"""Size of the largest JSON file that is read; the index of the largest published checkpoint has 10 MB."""
MOST_DEPTH = 100
"""Objects and lists inside each other."""
MOST_DIGITS = 100
"""Of a whole number; transformers writes 31 for a tokenizer without a limit of its length."""
_MOST_PRINTED = 200
_ACTED_ON = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of control and format characters, halves of surrogate pairs, and separators of lines and paragraphs."""
_HARMLESS = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # the joiners shape Persian, Hindi and emoji


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text in which no object has a key twice, to a depth and to sizes of numbers that code can rely on.

    Raises:
        ValueError: saying in a few words what is wrong.
    """
    too_deep = f"it is nested more than {MOST_DEPTH} deep"
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(MOST_DEPTH):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in inside for value in values]
    if level:
        raise ValueError(too_deep)
    return value


def read_object(file: Path, error: type[Exception], *, remedy: str = "") -> dict[str, Any]:
    """The JSON object in `file`, by `parse_json`; links are followed.

    Raises:
        error: where it cannot be read, is no regular file or larger than `MOST_BYTES`, or holds something else; `remedy` ends
            the message.
    """
    end = f" {remedy}" if remedy else ""
    try:
        # Opening a pipe would wait for a writer.
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{printable(file)} cannot be read: expected a regular file.{end}")
            if status.st_size > MOST_BYTES:
                raise error(f"{printable(file)} has {status.st_size} bytes; expected at most {MOST_BYTES} of a JSON file.{end}")
            content = parse_json(stream.read(MOST_BYTES))
    except OSError as reason:
        raise error(f"{printable(file)} cannot be read: {reason.strerror}.{end}") from reason
    except ValueError as reason:
        if isinstance(reason, error):
            raise
        raise error(f"{printable(file)} is not JSON: {printable(reason)}.{end}") from reason
    if not isinstance(content, dict):
        raise error(f"{printable(file)} holds a {type(content).__name__}; expected a JSON object.{end}")
    return content


def printable(text: object, most: int = _MOST_PRINTED) -> str:
    """`str(text)` in one line: escape sequences and whatever else a terminal acts on as backslash codes, the middle of what is
    longer than `most` characters left out."""
    whole = str(text)
    if len(whole) > most:
        whole = f"{whole[: most * 2 // 3]} ... {whole[-most // 4 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in whole)


def printable_text(text: str) -> str:
    """`text` with its line ends and tabs; what else a terminal acts on, such as escape sequences, as backslash codes."""
    escape = lambda each: each not in _HARMLESS and unicodedata.category(each) in _ACTED_ON
    return "".join(each.encode("unicode_escape").decode() if escape(each) else each for each in text)


def shown(value: object) -> str:
    """`repr(value)` of something that a file holds, as `printable` has it."""
    return printable(repr(value))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; expected at most {MOST_DIGITS}")
    return int(digits)
