"""Recipes: loading a Python file with get_config(), and its fields as flags: names, kinds, and values from text."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsa_jax.config import Config, ConfigError
from dsa_jax.config.attention import kinds as attention_kinds
from dsa_jax.config.checks import shown
from dsa_jax.config.limits import PATH, Range, limit_of
from dsa_jax.config.selections import eval_rows, selections

_CHOICES = {"{selections}": selections, "{eval_rows}": eval_rows, "{kinds}": attention_kinds}
"""Words of comments that stand for the choices which rows make."""
_KIND_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def load_config(path: str | None, kind: type = Config) -> Any:
    """The config of a recipe file, of class `kind`; `FILE:ARG` calls `get_config(ARG)`.

    Raises:
        ConfigError: when the file is missing (listing those there are), has no get_config, or that takes no argument, refuses
            it, or returns another class.
    """
    if not path:
        raise ConfigError(f"--config is not given; expected a recipe.{_available(Path('configs'))}")
    PATH.check("--config", path)
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise ConfigError(f"--config={path}: there is no file {file}.{_available(Path(file).parent)}")
    spec = importlib.util.spec_from_file_location("recipe", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path}: {file} is no Python file; expected a recipe with get_config().")
    module = importlib.util.module_from_spec(spec)
    with _recipe_errors(path, file):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"--config={path}: {file} has no function get_config(); expected one that returns a {kind.__name__}.")
    parameters = inspect.signature(module.get_config).parameters.values()
    if argument and not parameters:
        raise ConfigError(f"--config={path}: the recipe {file} takes no argument. Leave out ':{argument}'.")
    if not argument and any(parameter.default is parameter.empty for parameter in parameters):
        raise ConfigError(f"--config={path}: the recipe {file} needs an argument. Give --config={file}:ARG.")
    with _recipe_errors(path, file):
        config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, kind):
        other = {"Ablation": " Sweeps are for experiments.ablate.", "Config": " One run is for experiments.retrofit."}
        raise ConfigError(
            f"--config={path}: get_config returned a {type(config).__name__}; expected a {kind.__module__}.{kind.__name__}."
            f"{other.get(type(config).__name__, '')}"
        )
    return config


@contextlib.contextmanager
def _recipe_errors(path: str, file: str) -> Iterator[None]:
    """Turn errors of a recipe into a ConfigError that names its line."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"--config={path}: {error}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == Path(file)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise ConfigError(f"--config={path}: {file}, line {line}: {type(error).__name__}: {error}") from error


def parse_value(name: str, text: str, kind: Any) -> Any:
    """Text from the command line as a value of the field's annotation `kind`: int, float, bool, str or (nested) tuples.

    Raises:
        ConfigError: naming the field, the text and what was expected.
    """
    try:
        if kind is str:
            return text
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return _checked(float(text), float)
        return _checked(ast.literal_eval(text.strip()), kind)
    except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ConfigError(f"{name} is {shown(text)}; expected {kind_name(kind)}.") from None


def recipe_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, annotation, default, comment beside it in the source and its limit) of every leaf field."""
    kinds, comments = typing.get_type_hints(cls), _comments(cls.__module__)
    defaults = cls()
    for field in dataclasses.fields(cls):
        if not field.metadata.get("flag", True):
            continue
        kind, name = kinds[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from recipe_fields(typing.cast(type, kind), f"{name}.")
        else:
            comment = comments.get((cls.__name__, field.name), "")
            for word, choices in _CHOICES.items():
                comment = comment.replace(word, ", ".join(choices()))
            if isinstance(limit := limit_of(field), Range):
                comment = f"{comment}; {limit.words}".removeprefix("; ")
            yield name, kind, getattr(defaults, field.name), comment


@functools.cache
def _comments(module_name: str) -> dict[tuple[str, str], str]:
    """The comment beside each field of each class of a module, by (class, field)."""
    source = inspect.getsource(sys.modules[module_name])
    lines = source.splitlines()
    found: dict[tuple[str, str], str] = {}
    for owner in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in owner.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.end_lineno:
                after = lines[field.end_lineno - 1].encode()[field.end_col_offset or 0 :].decode()
                if comment := re.match(r"\s*#\s*(.+)$", after):
                    found[owner.name, field.target.id] = comment[1]
    return found


def _checked(value: Any, kind: Any) -> Any:
    """`value`, a literal, as `kind`; lists count as tuples and whole numbers as floats, nothing else is converted."""
    if isinstance(kind, types.GenericAlias):
        inner = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            raise ValueError
        if inner[-1] is Ellipsis:
            return tuple(_checked(item, inner[0]) for item in value)
        return tuple(_checked(item, each) for item, each in zip(value, inner, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError
    return value


def kind_name(kind: Any) -> str:
    """The annotation of a field in words."""
    if not isinstance(kind, types.GenericAlias):
        return _KIND_NAMES[kind]
    return f"a tuple like {_example(kind)}"


def _example(kind: Any) -> str:
    if not isinstance(kind, types.GenericAlias):
        return {int: "8", float: "0.5", bool: "True", str: "'name'"}[kind]
    inner = [_example(each) for each in typing.get_args(kind) if each is not Ellipsis]
    return f"({inner[0]},)" if len(inner) == 1 else f"({', '.join(inner)})"


def _available(folder: Path) -> str:
    found = sorted(str(path) for path in folder.glob("*.py") if path.name != "__init__.py")
    if not found and folder != Path("configs"):
        return _available(Path("configs"))
    return f" Available: {', '.join(found)}." if found else " Run it in the folder that holds configs/, or give a full path."
