"""Fields of a config.json by name and kind, with errors that name the file, the field and its value."""

from pathlib import Path
from typing import Any, NoReturn

from dsa_jax.checkpoints.hf import CheckpointError

_REQUIRED = object()


class Fields:
    """The content of a config.json (or of an object inside it) with the family's defaults; remembers what was asked for.

    null counts as absent.
    """

    def __init__(self, file: Path, content: dict[str, Any], defaults: dict[str, Any], *, prefix: str = "") -> None:
        self.file = file
        self.content = content
        self.asked: set[str] = set()
        self._defaults = defaults
        self._prefix = prefix

    def whole(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number."""
        value = self._value(name, default)
        if type(value) is float and value.is_integer():
            return int(value)
        if type(value) is not int:
            self.fail(name, "a whole number")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number."""
        value = self._value(name, default)
        if type(value) not in (int, float):
            self.fail(name, "a number")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false; an explicit null is false, as Python's truth has it in transformers."""
        if self.content.get(name, default) is None:
            self.asked.add(name)
            return False
        value = self._value(name, default)
        if type(value) is not bool:
            self.fail(name, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._value(name, default)
        if type(value) is not str:
            self.fail(name, "text")
        return value

    def has(self, name: str) -> bool:
        """Whether the content itself gives the field a value."""
        self.asked.add(name)
        return self.content.get(name) is not None

    def fail(self, name: str, expected: str) -> NoReturn:
        """Raise for the value of `name`."""
        value = self.content.get(name, self._defaults.get(name))
        raise CheckpointError(f"{self.file}: {self._prefix}{name} is {value!r}; expected {expected}.")

    def _value(self, name: str, default: Any) -> Any:
        self.asked.add(name)
        value = self.content.get(name)
        if value is None:
            value = self._defaults.get(name) if default is _REQUIRED else default
        if value is None:
            raise CheckpointError(
                f"{self.file} lacks {self._prefix}{name}, without which the model is not defined. Get config.json from the "
                "checkpoint's source."
            )
        return value
