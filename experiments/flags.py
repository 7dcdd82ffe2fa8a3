"""Command-line flags for a config file, and an entry point that turns expected errors into one line.

Every field of `dsa_jax.config.Config` is an absl flag of its own: `--helpfull` lists them, both `--config.seed=3` and
`--config.seed 3` work, and a misspelt one is an error with the nearest name. `ml_collections.config_flags` offers neither the
list nor the suggestion, and its file loader calls an import function that Python has deprecated, hence this layer.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import logging
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config import Config, ConfigError
from dsa_jax.config.fields import set_field
from dsa_jax.extras import MissingExtraError
from dsa_jax.run.directory import RunError
from experiments.streams import LastingStream

_EXPECTED = (ConfigError, RunError, CheckpointError, MissingExtraError)
_KIND_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


class ConfigFlag:
    """The `--config` flag with its overrides."""

    def __init__(self, default: str | None, kind: type, flag_values: flags.FlagValues) -> None:
        self._flag_values, self._kind = flag_values, kind
        shown = default if default is not None else "none, it must be given"
        more = "Each of its fields is a flag, such as --config.seed=3: see --helpfull."
        self._file = flags.DEFINE_string(
            "config", default, f"Recipe: a Python file with get_config(); FILE:ARG passes ARG to it. Default: {shown}. {more}",
            flag_values=flag_values,
        )  # fmt: skip
        show_in_help("config", flag_values)
        self._fields = {f"config.{name}": annotation for name, annotation, *_ in _walk(kind)}
        for name, annotation, value, comment in _walk(kind):
            text = f"{_kind_name(annotation)}, {value!r} unless the recipe sets it. {comment}".strip()
            flags.DEFINE_string(f"config.{name}", None, text, flag_values=flag_values)

    @property
    def overrides(self) -> list[str]:
        """The fields that the command line sets, such as `config.train.warmup.steps`."""
        return list(self._overrides())

    def _overrides(self) -> dict[str, str]:
        texts = {name: self._flag_values[name].value for name in self._fields}
        return {name: text for name, text in texts.items() if text is not None}

    @property
    def value(self) -> Any:
        """A new config: the recipe's, with the overrides of the command line. Not validated: `main` calls `validate()`.

        Raises:
            ConfigError: for a missing recipe or an override of the wrong kind.
        """
        config = load_config(self._file.value, self._kind)
        for name, text in self._overrides().items():
            set_field(config, name.removeprefix("config."), parse_value(name, text, self._fields[name]))
        return config


def define_config(
    default: str | None = None, *, kind: type = Config, flag_values: flags.FlagValues = flags.FLAGS
) -> ConfigFlag:
    """Define `--config` and one override flag per field; read `.value` of the result in `main`.

    Args:
        default: recipe used when `--config` is not given; None makes the flag required.
        kind: dataclass that the recipe's get_config returns. A field with metadata `flag=False` gets no flag.
        flag_values: where to define them; tests give their own.
    """
    return ConfigFlag(default, kind, flag_values)


def load_config(path: str | None, kind: type = Config) -> Any:
    """The config of a recipe file, of class `kind`; `FILE:ARG` calls `get_config(ARG)`.

    Raises:
        ConfigError: when the file is missing (listing those there are), has no get_config, or that takes no argument, refuses
            it, or returns another class.
    """
    if not path:
        raise ConfigError(f"--config is not given; expected a recipe.{_available(Path('configs'))}")
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
    """What goes wrong in a recipe as a ConfigError that names the line."""
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
        raise ConfigError(f"{name} is {text!r}; expected {_kind_name(kind)}.") from None


class ProcessFlags:
    """The flags by which a process learns that it is one of several."""

    def __init__(self, flag_values: flags.FlagValues) -> None:
        self._coordinator = flags.DEFINE_string(
            "coordinator", "", "HOST:PORT where process 0 of several can be reached. Under srun none of the three is needed.",
            flag_values=flag_values,
        )  # fmt: skip
        self._num_processes = flags.DEFINE_integer(
            "num_processes", None, "How many processes there are.", flag_values=flag_values
        )
        self._process_id = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=flag_values)
        for name in ("coordinator", "num_processes", "process_id"):
            show_in_help(name, flag_values)

    def start(self) -> None:
        """Join the other processes, if any; only the first goes on logging what is no warning. Call it first in `main`."""
        from dsa_jax.run.processes import is_main, start_processes

        start_processes(self._coordinator.value, self._num_processes.value, self._process_id.value)
        if not is_main():
            absl_logging.set_verbosity(absl_logging.WARNING)


def show_in_help(name: str, flag_values: flags.FlagValues) -> None:
    """List a flag that is defined for a command elsewhere under that command's `--help`, too."""
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])


def define_processes(*, flag_values: flags.FlagValues = flags.FLAGS) -> ProcessFlags:
    """Define `--coordinator`, `--num_processes` and `--process_id`; call `.start()` of the result in `main`."""
    return ProcessFlags(flag_values)


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run an absl `main`; never returns.

    A config, run or flag error, or an optional package that is missing, ends as one line `error: ...` on stderr, with exit
    status 2 where the command line or the config is at fault and 1 otherwise. Any other exception keeps its traceback. A reader
    of stdout or stderr who goes away stops nothing; a stdout that cannot be written otherwise is an error once `main` is done.
    """

    stdout, stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)

    def guarded(arguments: list[str]) -> int | None:
        absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("jax").setLevel(logging.WARNING)  # else it reports every backend that is not there
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r}; expected only flags such as --config=configs/quickstart.py.", 2)
        try:
            status = main(arguments)
        except flags.Error as error:
            _fail(str(error), 2)
        except _EXPECTED as error:
            _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
        if reason := stdout.finish():
            _fail(f"stdout cannot be written: {reason}. What was to be written to files is written.", 1)
        return status

    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            app.run(guarded, argv=argv, flags_parser=parse_flags)
        finally:
            stdout.finish()
            stderr.finish()


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse, and exit with status 2 and one line on a mistake; a request for help is none."""
    try:
        return flag_values(argv)
    except SystemExit:
        sys.exit(0)  # absl has shown the help and would exit with 1
    except flags.UnrecognizedFlagError as error:
        _fail(_unknown(error.flagname, flag_values), 2)
    except flags.Error as error:
        _fail(str(error), 2)


def _fail(message: str, status: int) -> typing.NoReturn:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def _unknown(name: str, flag_values: flags.FlagValues) -> str:
    known = list(flag_values)
    is_field = name.startswith("config.")
    below = [other for other in known if other.startswith(f"{name}.")]
    if below:
        return f"{name} is a section; set one of its fields: {', '.join(below)}."
    # Without the prefix that all fields share, which would make any two of them look alike.
    candidates = [other for other in known if other.startswith("config.") == is_field]
    bare = {other.removeprefix("config."): other for other in candidates}
    near = [bare[match] for match in difflib.get_close_matches(name.removeprefix("config."), bare, n=1)]
    kind, dashes = ("field ", "") if is_field else ("flag ", "--")
    hint = f"; did you mean {dashes}{near[0]}?" if near else "; --helpfull lists all."
    return f"unknown {kind}{dashes}{name}{hint}"


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, annotation, default, comment beside it in the source) of every leaf field."""
    kinds, comments = typing.get_type_hints(cls), _comments(cls.__module__)
    defaults = cls()
    for field in dataclasses.fields(cls):
        if not field.metadata.get("flag", True):
            continue
        kind, name = kinds[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from _walk(typing.cast(type, kind), f"{name}.")
        else:
            yield name, kind, getattr(defaults, field.name), comments.get((cls.__name__, field.name), "")


@functools.cache
def _comments(module_name: str) -> dict[tuple[str, str], str]:
    """The comment beside each field of each class of a module, by (class, field)."""
    found: dict[tuple[str, str], str] = {}
    owner = ""
    for line in inspect.getsource(sys.modules[module_name]).splitlines():
        if heading := re.match(r"class (\w+)", line):
            owner = heading[1]
        elif field := re.match(r"    (\w+):[^#]*#\s*(.+)$", line):
            found[owner, field[1]] = field[2]
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


def _kind_name(kind: Any) -> str:
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
