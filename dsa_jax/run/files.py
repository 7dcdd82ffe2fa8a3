"""Files that are whole or absent, and directories that one process at a time writes to."""

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dsa_jax.foreign import parse_json

_LOG = logging.getLogger(__name__)


class RunError(RuntimeError):
    """A run cannot start or continue: the message says why and what to do. Commands print it as one line, without traceback."""


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` so that `path` holds either its former content or all of the new one, whatever happens.

    Raises:
        RunError: when the file system refuses (full, read-only, no permission); `path` is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Its former content is intact; free space or fix permissions, "
            "then run the same command again."
        ) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable_directory(path: Path, *, flag: str = "workdir") -> None:
    """Create `path` where it is missing, and check that a file can be written there.

    Raises:
        RunError: when it is a file, or the file system refuses; `flag` is the option that chose it.
    """
    probe = path / f".probe.{os.getpid()}"
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{flag} {path} is a file; expected a directory. Choose another --{flag}.")
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{flag} {path} cannot be written: {error.strerror or error}. Choose another --{flag}, or make it writable."
        ) from error


@contextmanager
def claimed(workdir: str | os.PathLike[str], name: str = ".lock", *, flag: str = "workdir") -> Iterator[None]:
    """Lock `workdir` against other processes of this host, and of others where the file system shares locks.

    The lock is the file `name`; it ends with the process, however that ends.

    Raises:
        RunError: when `workdir` cannot be written, or another process is using it; `flag` is the option that chose it.
    """
    make_writable_directory(Path(workdir), flag=flag)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(Path(workdir) / name, "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is using {flag} {workdir}. Wait until it has ended, or choose another --{flag}."
            ) from None
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): nothing stops a second process from writing there", workdir, error.strerror)
        yield


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; RunError where there is none."""
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}). Restore it, or choose another --workdir.") from error
    if not isinstance(values, dict):
        raise RunError(
            f"{path} holds a JSON {type(values).__name__}; expected an object. Restore it, or choose another --workdir."
        )
    return values


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, by `atomic_write_text`."""
    atomic_write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
