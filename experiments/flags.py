"""Flags of the commands, and the entry point that prints expected errors as one line.

Every field of `dsa_jax.config.Config` is an absl flag of its own: `--helpfull` lists them, both `--config.seed=3` and
`--config.seed 3` work, and a misspelt one is an error with the nearest name. `ml_collections.config_flags` offers neither the
list nor the suggestion, and its file loader calls an import function that Python has deprecated, hence this layer.
"""

import contextlib
import difflib
import logging
import sys
import typing
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config import Config, ConfigError
from dsa_jax.config.checks import shown
from dsa_jax.config.fields import check_kinds, set_field
from dsa_jax.config.limits import NAME, Range
from dsa_jax.extras import MissingExtraError
from dsa_jax.foreign import printable_text
from dsa_jax.run.files import RunError
from experiments.recipes import kind_name, load_config, parse_value, recipe_fields
from experiments.streams import LastingStream
from experiments.values import limited_flag, path_flag

_LONGEST_WORD = 300
_EXPECTED = (ConfigError, RunError, CheckpointError, MissingExtraError)


class ConfigFlag:
    """`--config` and one override flag per field; read `value` in `main`."""

    def __init__(self, default: str | None = None, *, kind: type = Config, flag_values: flags.FlagValues = flags.FLAGS) -> None:
        """Define the flags.

        Args:
            default: recipe used when `--config` is not given; None makes the flag required.
            kind: dataclass that the recipe's get_config returns. A field with metadata `flag=False` gets no flag.
            flag_values: the flags to add to; tests give their own.
        """
        self._flag_values, self._kind = flag_values, kind
        preset = default if default is not None else "none, it must be given"
        more = "Each of its fields is a flag, such as --config.seed=3: see --helpfull."
        text = f"Recipe: a Python file with get_config(); FILE:ARG passes ARG to it. Default: {preset}. {more}"
        self._file = path_flag("config", default, text, flag_values=flag_values)
        show_in_help("config", flag_values)
        self._fields = {f"config.{name}": annotation for name, annotation, *_ in recipe_fields(kind)}
        for name, annotation, value, comment in recipe_fields(kind):
            text = f"{kind_name(annotation)}, {value!r} unless the recipe sets it. {comment}".strip()
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

    @property
    def checked(self) -> Any:
        """`value`, each of whose fields is of its kind and within its limit; how they fit each other is for `validate()`.

        Raises:
            ConfigError: as `value`, and for a field beyond its limit, by the name of its flag.
        """
        config = self.value
        check_kinds(config, "config.")
        return config


class ProcessFlags:
    """`--coordinator`, `--num_processes` and `--process_id`; call `start` first in `main`."""

    def __init__(self, flag_values: flags.FlagValues = flags.FLAGS) -> None:
        where = "HOST:PORT where process 0 of several can be reached. Under srun none of the three is needed."
        count, place = Range(1, 2**20), Range(0, 2**20)
        values: Any = {"flag_values": flag_values}
        self._coordinator = limited_flag("coordinator", "", str, NAME, where, **values)
        self._num_processes = limited_flag("num_processes", None, int, count, "Number of processes.", **values)
        self._process_id = limited_flag("process_id", None, int, place, "Index of this process, from 0.", **values)
        for name in ("coordinator", "num_processes", "process_id"):
            show_in_help(name, flag_values)

    def start(self) -> None:
        """Join the other processes, if any; all but the first log warnings only."""
        from dsa_jax.run.processes import is_main, start_processes

        start_processes(self._coordinator.value, self._num_processes.value, self._process_id.value)
        if not is_main():
            absl_logging.set_verbosity(absl_logging.WARNING)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_text(super().format(record))


def show_in_help(name: str, flag_values: flags.FlagValues) -> None:
    """List a flag that another module defines under the `--help` of the command."""
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run an absl `main`; never returns.

    A config, run or flag error, or a missing optional package, ends as one line `error: ...` on stderr, with exit status 2
    where the command line or the config is at fault and 1 otherwise; Ctrl-C, where `main` does not answer it, as one line with
    130, as of a shell. Any other exception keeps its traceback. Work continues when a reader of stdout or stderr goes away; any
    other failure to write stdout is an error once `main` is done.
    """

    # Not stderr, on which a live progress line is redrawn by escape sequences.
    stdout, stderr = LastingStream(sys.stdout, plain=True), LastingStream(sys.stderr)

    def guarded(arguments: list[str]) -> int | None:
        absl_logging.get_absl_handler().setFormatter(_Plain("%(message)s"))
        logging.getLogger("jax").setLevel(logging.WARNING)  # else it reports every missing backend
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r}; expected only flags such as --config=configs/quickstart.py.", 2)
        try:
            status = main(arguments)
        except flags.Error as error:
            _fail(str(error), 2)
        except _EXPECTED as error:
            _fail(str(error), 2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            _fail("interrupted; what is on disk stays, and the same command starts again.", 130)
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
    except RecursionError:
        # Of absl, which looks for the nearest name letter by letter.
        _fail("the command line has an unknown flag of hundreds of letters; --helpfull lists all.", 2)
    except flags.UnrecognizedFlagError as error:
        _fail(_unknown(error.flagname, flag_values), 2)
    except flags.Error as error:
        _fail(str(error), 2)


def _fail(message: str, status: int) -> typing.NoReturn:
    # What absl quotes of the command line may be of any length.
    line = " ".join(word if len(word) <= _LONGEST_WORD else shown(word)[1:-1] for word in message.split())
    print(f"error: {printable_text(line)}", file=sys.stderr, flush=True)
    sys.exit(status)


def _unknown(name: str, flag_values: flags.FlagValues) -> str:
    known = list(flag_values)
    is_field = name.startswith("config.")
    depth = name.count(".") + 2
    below = dict.fromkeys(".".join(other.split(".")[:depth]) for other in known if other.startswith(f"{name}."))
    if below:
        return f"{name} is a section; set one of its fields: {', '.join(below)}."
    # Without the common prefix, which would make any two fields look alike.
    candidates = [other for other in known if other.startswith("config.") == is_field]
    bare = {other.removeprefix("config."): other for other in candidates}
    near = [bare[match] for match in difflib.get_close_matches(name.removeprefix("config.")[:_LONGEST_WORD], bare, n=1)]
    kind, dashes = ("field ", "") if is_field else ("flag ", "--")
    hint = f"; did you mean {dashes}{near[0]}?" if near else "; --helpfull lists all."
    return f"unknown {kind}{dashes}{name}{hint}"
