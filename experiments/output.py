"""The `--output` flag of commands that also write their results: checked first, written atomically."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from dsa_jax.run.files import atomic_write_text, make_writable_directory
from experiments.flags import show_in_help
from experiments.values import path_flag


class OutputFlag:
    """The file of results, if the user names one; in `main` call `check` first and `write` or `append` last."""

    def __init__(self, text: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
        self._flag = path_flag("output", "", text, flag_values=flag_values)
        show_in_help("output", flag_values)

    def check(self) -> None:
        """Create its directory, before anything is computed.

        Raises:
            RunError: where nothing can be written there.
        """
        if self._flag.value:
            path = Path(self._flag.value)
            make_writable_directory(path.parent, flag="output")
            if path.is_dir():
                raise flags.ValidationError(f"--output={path} is a directory; expected the name of a file.")
            try:
                path.read_text(encoding="utf-8")
            except FileNotFoundError:
                pass
            except (OSError, UnicodeDecodeError) as error:
                raise flags.ValidationError(f"--output={path} cannot be added to, as it is no text: {error}.") from error

    def write(self, results: Mapping[str, Any]) -> None:
        """Write a JSON object, if there is a file."""
        if self._flag.value:
            atomic_write_text(self._flag.value, _line(results, indent=1))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append a line of JSON for each row, if there is a file."""
        if self._flag.value:
            path = Path(self._flag.value)
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            atomic_write_text(path, before + "".join(map(_line, rows)))


def _line(results: Mapping[str, Any], indent: int | None = None) -> str:
    """One line of JSON, in which NaN and infinities are null."""
    from dsa_jax.report.report import to_plain

    return json.dumps(to_plain(results), indent=indent, allow_nan=False) + "\n"
