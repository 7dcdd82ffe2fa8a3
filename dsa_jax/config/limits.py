"""Limits of settings: declared beside a field, a limit gives its check, the message of the check and the end of its help."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsa_jax.config.checks import ConfigError, one_of, shown

_METADATA = "limit"


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`, both included; `or_zero`: and 0; `meaning`: the words for it, where it has own."""

    least: int | float
    most: int | float
    or_zero: bool = False
    meaning: str = ""

    @property
    def words(self) -> str:
        """The range with what people call it."""
        if self.meaning:
            return self.meaning
        most = _power(self.most)
        if (self.least, self.most) == (0, 1.0) and isinstance(self.most, float):
            return "a fraction from 0 to 1"
        if self.least == 0:
            return f"zero or more, up to {most}"
        kind = "a positive number" if self.least > 0 else "a number"
        return f"{'0 or ' if self.or_zero else ''}{kind} from {self.least:g} to {most}"

    def check(self, name: str, value: int | float) -> None:
        """Require a number of the range, which NaN and infinities are not."""
        if not (self.least <= value <= self.most or (self.or_zero and value == 0)):
            raise ConfigError(f"{name} is {shown(value)}; expected {self.words}.")


@dataclass(frozen=True)
class Text:
    """Text of at most `longest` bytes in UTF-8, without NUL; `longest_name`: also of each part between slashes, as in paths."""

    longest: int
    longest_name: int | None = None

    @property
    def words(self) -> str:
        """The lengths."""
        if self.longest_name is None:
            return f"text of at most {self.longest} bytes"
        return f"a path of at most {self.longest} bytes, {self.longest_name} in each of its names"

    def check(self, name: str, value: str) -> None:
        """Require text that fits and has a form in UTF-8."""
        try:
            size, names = len(value.encode()), value.split("/")
        except UnicodeEncodeError:
            raise ConfigError(f"{name} is {shown(value)}; expected text in UTF-8.") from None
        is_long = size > self.longest or any(len(each.encode()) > (self.longest_name or size) for each in names)
        if is_long or "\0" in value:
            raise ConfigError(f"{name} is {shown(value)}, {size} bytes; expected {self.words}, without NUL.")


@dataclass(frozen=True)
class Choices:
    """One of some names; a function where they can be added to. `or_empty`: or empty text."""

    names: tuple[str, ...] | Callable[[], tuple[str, ...]]
    or_empty: bool = False

    @property
    def words(self) -> str:
        """The names."""
        return f"one of {', '.join(self.known)}"

    @property
    def known(self) -> tuple[str, ...]:
        """The names that are known now."""
        return self.names if isinstance(self.names, tuple) else self.names()

    def check(self, name: str, value: str) -> None:
        """Require one of the names; the error gives the nearest."""
        if value or not self.or_empty:
            one_of(name, value, self.known)


Limit = Range | Text | Choices
"""What a setting may be, beyond its kind: `words` follow "expected", `check` raises ConfigError naming the setting."""


def limited(default: Any, limit: Limit) -> Any:
    """A field of a dataclass with its default and its limit, which of a tuple is that of each entry it fits."""
    return dataclasses.field(default=default, metadata={_METADATA: limit})


def limit_of(field: dataclasses.Field) -> Limit | None:
    """The limit that a field declares."""
    return field.metadata.get(_METADATA)


def check_limit(name: str, limit: Limit | None, value: Any) -> None:
    """Require a value that is of its field's kind to be within the limit; undeclared ones are finite and not endless.

    Raises:
        ConfigError: naming the setting, its value and what was expected.
    """
    if isinstance(value, list | tuple):
        for entry in value:
            check_limit(name, limit, entry)
    elif isinstance(value, str):
        (limit if isinstance(limit, Text | Choices) else TEXT).check(name, value)
    elif not isinstance(value, bool) and isinstance(value, int | float):
        (limit if isinstance(limit, Range) else NUMBER).check(name, value)


def _power(number: int | float) -> str:
    """Large whole numbers as powers of two, of which they are close to one."""
    if number >= 2**20 and isinstance(number, int):
        exponent = round(math.log2(number))
        missing = 2**exponent - number
        return f"2**{exponent}{f' - {missing}' if missing else ''}" if 0 <= missing < 3 else str(number)
    return f"{number:g}"


INT32 = 2**31 - 1
NUMBER = Range(-(2**63), 2**63 - 1, meaning="a finite number of at most 64 bits")
TEXT = Text(1000)
NAME = Text(255)
PATH = Text(4095, 255)
AMOUNT = Range(0, INT32)
"""Zero or more of something that is counted in 32 bits, such as steps or tokens."""
COUNT = Range(1, INT32)
LENGTH = Range(1, 2**30)
"""Tokens of a sequence."""
WIDTH = Range(1, 2**24)
"""Channels, or rows of a table."""
WIDTH_IF_USED = Range(0, 2**24)
HEADS = Range(1, 4096)
HEADS_IF_USED = Range(0, 4096)
ROWS = Range(1, 2**20)
"""Sequences, records or symbols."""
ROWS_IF_SET = Range(0, 2**20)
FRACTION = Range(0, 1.0)
WEIGHT = Range(0, 1e6)
"""Of a loss."""
FACTOR = Range(1e-6, 1e6)
EPSILON = Range(0, 1.0)
DEVIATION = Range(1e-9, 1e3)
SEED = Range(0, 2**32 - 2, meaning="a whole number from 0 to 2**32 - 2")
"""The seeds that `jax.random.key`, which keeps 32 bits, tells from all others; the last is left for seed + 1."""
