"""Flags whose values have limits: refused when the command line is parsed, and said in its help."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from dsa_jax.config import ConfigError
from dsa_jax.config.limits import PATH, Limit, Text
from experiments.recipes import parse_value

# The flags are those of the module that calls these functions: --help shows them.
flags.disclaim_key_flags()


def limited_flag(
    name: str,
    default: Any,
    kind: type,
    limit: Limit,
    text: str,
    *,
    required: bool = False,
    flag_values: flags.FlagValues | None = None,
) -> flags.FlagHolder:
    """A flag of one value, an int, a float or a str, within `limit`."""
    return _define(_OneParser(name, kind, limit), flags.ArgumentSerializer(), name, default, limit, text, required, flag_values)


def path_flag(
    name: str, default: str | None, text: str, *, required: bool = False, flag_values: flags.FlagValues | None = None
) -> flags.FlagHolder:
    """A flag that names a file or a directory."""
    return limited_flag(name, default, str, PATH, text, required=required, flag_values=flag_values)


def list_flag(name: str, default: Sequence[str], limit: Limit, text: str, kind: type = str) -> flags.FlagHolder:
    """A flag of text with commas between its parts, each of which, as a `kind`, is within `limit`."""
    return _define(_ListParser(name, kind, limit), flags.CsvListSerializer(","), name, default, limit, text)


def _define(
    parser: flags.ArgumentParser,
    serializer: flags.ArgumentSerializer,
    name: str,
    default: Any,
    limit: Limit,
    text: str,
    required: bool = False,
    flag_values: flags.FlagValues | None = None,
) -> flags.FlagHolder:
    values = flags.FLAGS if flag_values is None else flag_values
    described = text if isinstance(limit, Text) else f"{text} Expected: {limit.words}."
    return flags.DEFINE(parser, name, default, described, flag_values=values, serializer=serializer, required=required)


class _OneParser(flags.ArgumentParser):
    def __init__(self, name: str, kind: type, limit: Limit) -> None:
        self._name, self._kind, self._limit = name, kind, limit

    def parse(self, argument: Any) -> Any:
        """The value; absl quotes the flag before the message."""
        try:
            value = parse_value(self._name, str(argument), self._kind)
            self._limit.check(self._name, value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    def flag_type(self) -> str:
        """As the help shows it."""
        return self._kind.__name__


class _ListParser(flags.ListParser):
    def __init__(self, name: str, kind: type, limit: Limit) -> None:
        super().__init__()
        self._part = _OneParser(name, kind, limit)

    def parse(self, argument: Any) -> list[str]:
        """The parts, as text."""
        parts = super().parse(argument)
        for part in parts:
            self._part.parse(part)
        return parts
