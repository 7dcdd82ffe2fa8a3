"""Fields of a config.json by name and type, with errors that name the file, the field and its value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.foreign import shown

_REQUIRED = object()
MOST = 2**31 - 1
"""The largest size or index of an array."""


class Fields:
    """The content of a config.json, or of an object inside it; remembers which fields were asked for.

    An absent field, or null, has the family's default, else the one given to the method, else it is an error.
    """

    def __init__(self, file: Path, content: dict[str, Any], defaults: Mapping[str, Any], *, prefix: str = "") -> None:
        self.file = file
        self.content = content
        self.asked: set[str] = set()
        self._defaults = defaults
        self._prefix = prefix

    def whole(self, name: str, default: Any = _REQUIRED, *, null: Any = None, least: int = 1, most: int = MOST) -> int:
        """An integer from `least` to `most`; `null` is what an explicit null stands for, if it is not as good as absent."""
        if null is not None and self.stated(name) is None:
            return null
        value = self._value(name, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            self.fail(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, least: float = 0.0, most: float = 1e9) -> float:
        """A number from `least` to `most`, and so a finite one."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not least <= value <= most:
            self.fail(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def epsilon(self, name: str, default: Any = _REQUIRED) -> float:
        """The epsilon of a norm: beyond 1 it would be most of what the norm divides by."""
        return self.number(name, default, most=1.0)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false; an explicit null is false, as Python's truth has it in transformers."""
        self.asked.add(name)
        if name in self.content and self.content[name] is None:
            return False
        return self._of_type(name, self._value(name, default), (bool,), "true or false")

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        return self._of_type(name, self._value(name, default), (str,), "text")

    def names(self, name: str) -> list[str]:
        """A list of strings, that the content itself has."""
        value = self.content[name]
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.fail(name, "a list of names")
        return value

    def has(self, name: str) -> bool:
        """Whether the content itself gives the field a value."""
        self.asked.add(name)
        return self.content.get(name) is not None

    def stated(self, name: str) -> Any:
        """The value as it stands, whatever its type: null is None, and the family's default replaces an absent field only."""
        self.asked.add(name)
        if name in self.content:
            return self.content[name]
        if name in self._defaults:
            return self._defaults[name]
        return self._value(name, _REQUIRED)

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raise for the value of `name`."""
        value = self.content.get(name, self._defaults.get(name))
        raise CheckpointError(f"{self.file}: {self._prefix}{name} is {shown(value)}; expected {expected}.")

    def _of_type(self, name: str, value: Any, types: tuple[type, ...], expected: str) -> Any:
        if type(value) not in types:
            self.fail(name, expected)
        return value

    def _value(self, name: str, default: Any) -> Any:
        self.asked.add(name)
        for value in (self.content.get(name), self._defaults.get(name), default):
            if value is not None and value is not _REQUIRED:
                return value
        raise CheckpointError(
            f"{self.file} lacks {self._prefix}{name}, without which the model is not defined. Get config.json from the "
            "checkpoint's source."
        )
