"""Checks that every part of the configuration shares, and the error that all of them raise."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST_SHOWN = 80


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the field, its value, what was expected and what to do."""


def shown(value: Any) -> str:
    """A value as messages show it: short enough to read, whatever it is."""
    try:
        text = repr(value) if isinstance(value, str) or not isinstance(value, int | float) else str(value)
    except ValueError:
        return "a number of thousands of digits"  # which Python refuses to write
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]}...{text[-LONGEST_SHOWN // 4 :]}"


def user_path(name: str, text: str) -> Path:
    """The path that the setting `name` gives, `~` and `~user` being the home of a user.

    Raises:
        ConfigError: where there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{name} is {shown(text)}, but no home directory of that user is known. Write it out.") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message, " Did you mean 'nearest'?"; empty where no name of `known` is near."""
    near = difflib.get_close_matches(name[:LONGEST_SHOWN], list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Require `value` to be one of `allowed`; the error names the nearest of them."""
    if value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; expected one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}")


def positive(name: str, value: int | float) -> None:
    """Require `value` > 0."""
    if not value > 0:
        raise ConfigError(f"{name} is {shown(value)}; expected a positive number.")


def random_seed(name: str, value: int) -> None:
    """Require a seed that `jax.random.key`, which keeps 32 bits of it, tells from all others; the last is left for seed + 1."""
    if not 0 <= value < 2**32 - 1:
        raise ConfigError(f"{name} is {value}; expected a whole number from 0 to 2**32 - 2.")


def fraction(name: str, value: int | float) -> None:
    """Require 0 <= `value` <= 1."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} is {value}; expected a fraction from 0 to 1.")
