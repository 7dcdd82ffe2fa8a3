"""Sections of the config: to nested dicts of JSON values and back, by dotted path, and frozen for a model."""

import copy
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from dsa_jax.config.checks import ConfigError, did_you_mean, shown
from dsa_jax.config.limits import check_limit, limit_of


class Settings:
    """A section of the config. Its fields can be set; those of the copy that `frozen` makes cannot."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field.

        Raises:
            AttributeError: in a section that a model was built with.
        """
        if _FROZEN in vars(self):
            raise AttributeError(
                f"{type(self).__name__}.{name} belongs to a model that is built. Change a copy (copy.deepcopy) and build again."
            )
        super().__setattr__(name, value)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields that an earlier version wrote, by their names of today."""
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> "Settings":
        """A copy whose fields can be set, at every depth."""
        return type(self)(**{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in dataclasses.fields(self)})  # type: ignore[arg-type]


LONGEST_TUPLE = 10_000
_FROZEN = "_is_frozen"
S = TypeVar("S", bound=Settings)


def frozen(config: S) -> S:
    """A copy whose fields cannot be set, hashable, lists as tuples: modules hold it."""
    config = copy.deepcopy(config)
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        setattr(config, f.name, frozen(value) if isinstance(value, Settings) else _tuples(value))
    vars(config)[_FROZEN] = True
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Mapping[str, Any], prefix: str | None = None) -> Any:
    """Build the dataclass `cls` from nested dicts as `to_dict` writes them; missing fields keep their defaults.

    Args:
        cls: the class.
        values: its fields.
        prefix: what messages put before the names of fields, "" or "model."; None: the name of the class.

    Raises:
        ConfigError: for a field that `cls` does not have, with the nearest name, or a value of another kind than its field or
            beyond its limit.
    """
    prefix = f"{cls.__name__}." if prefix is None else prefix
    if not isinstance(values, Mapping):
        name = prefix.removesuffix(".") or cls.__name__
        raise ConfigError(f"{name} is {shown(values)}; expected an object with its fields.")
    if issubclass(cls, Settings):
        values = cls.upgraded(values)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{cls.__name__} has no field {shown(name)}.{did_you_mean(name, fields)}")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            arguments[name] = from_dict(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            check_field(f"{prefix}{name}", fields[name], value)
            arguments[name] = _tuples(value)
    return cls(**arguments)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name, each name after `prefix`; an empty mapping leaves nothing."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def set_field(config: Any, path: str, value: Any) -> None:
    """Set the field of a config at a dotted path.

    Raises:
        ConfigError: where there is none, with the nearest name of that section.
    """
    *parents, name = path.split(".")
    node = config
    for part in parents:
        node = getattr(node, _known(node, part, path))
    setattr(node, _known(node, name, path), value)


def _known(node: Any, name: str, path: str) -> str:
    names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    if name not in names:
        raise ConfigError(f"there is no config field {path}: {name!r} is unknown.{did_you_mean(name, names)}")
    return name


def check_kinds(config: Any, prefix: str = "") -> None:
    """Require every field of a config, which a recipe may have set to anything, to be of its own kind and within its limit.

    Nothing else may be set. How fields fit each other is for `validate`, and so are fields that are no flags.

    Raises:
        ConfigError: naming the field by its path.
    """
    fields = [field.name for field in dataclasses.fields(config)]
    if others := sorted(vars(config).keys() - {*fields, _FROZEN}):
        hint = did_you_mean(others[0], fields)
        raise ConfigError(f"{prefix}{others[0]} is set, which is no field of {type(config).__name__}.{hint}")
    for field in dataclasses.fields(config):
        if not field.metadata.get("flag", True):
            continue
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if not dataclasses.is_dataclass(field.type):
            check_field(name, field, value)
        elif isinstance(value, field.type):  # type: ignore[arg-type]
            check_kinds(value, f"{name}.")
        else:
            raise ConfigError(f"{name} is {shown(value)}; expected a {field.type.__name__}.")  # type: ignore[union-attr]


def check_field(name: str, field: dataclasses.Field, value: Any) -> None:
    """Require a value of the field's kind, at every depth of a tuple, within its limit; messages call it `name`.

    Raises:
        ConfigError: naming the field, its value and what was expected.
    """
    _check_kind(name, field.type, value)
    check_limit(name, limit_of(field), value)


def _check_kind(name: str, kind: Any, value: Any) -> None:
    fits = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(kind, (list, tuple))
    # float64 of NumPy is a float; bool is an int, and not meant.
    if type(value) not in fits and not (kind is float and isinstance(value, float)):
        raise ConfigError(f"{name} is {shown(value)}; expected {' or '.join(each.__name__ for each in fits)}.")
    inner = typing.get_args(kind) if isinstance(kind, types.GenericAlias) else ()
    if not inner:
        return
    if len(value) > LONGEST_TUPLE:
        raise ConfigError(f"{name} has {len(value)} entries; expected at most {LONGEST_TUPLE}.")
    # How many values an entry has is for `validate`, which knows what they are called.
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
    for each, entry in zip(kinds, value, strict=False):
        _check_kind(name, each, entry)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
