"""Configuration to nested dicts of JSON values, and back."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from dsa_jax.config_checks import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Build the dataclass `cls` from nested dicts as `to_dict` writes them; missing fields keep their defaults.

    Raises:
        ConfigError: for a field that `cls` does not have, with the nearest name, or a value of another kind than its field.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__} is {values!r}; expected an object with its fields.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{cls.__name__} has no field {name!r}.{hint}")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            arguments[name] = from_dict(kind, value)  # type: ignore[arg-type]
        else:
            _check_kind(f"{cls.__name__}.{name}", kind, value)
            arguments[name] = _tuples(value)
    return cls(**arguments)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def check_kinds(config: Any, prefix: str = "") -> None:
    """Require every field of a config, which a recipe may have set to anything, to be of its own kind, and no others to be set.

    Raises:
        ConfigError: naming the field by its path.
    """
    fields = [field.name for field in dataclasses.fields(config)]
    if others := sorted(vars(config).keys() - fields):
        near = difflib.get_close_matches(others[0], fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{prefix}{others[0]} is set, which is no field of {type(config).__name__}.{hint}")
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if not dataclasses.is_dataclass(field.type):
            _check_kind(name, field.type, value)
        elif isinstance(value, field.type):  # type: ignore[arg-type]
            check_kinds(value, f"{name}.")
        else:
            raise ConfigError(f"{name} is {value!r}; expected a {field.type.__name__}.")  # type: ignore[union-attr]


def _check_kind(name: str, kind: Any, value: Any) -> None:
    fits = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(kind, (list, tuple))
    # float64 of NumPy is a float; bool is an int, and not meant.
    if type(value) not in fits and not (kind is float and isinstance(value, float)):
        raise ConfigError(f"{name} is {value!r}; expected {' or '.join(each.__name__ for each in fits)}.")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
