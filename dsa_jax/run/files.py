"""Files that are whole or absent, opened without following links, and directories that one process at a time writes to."""

import ctypes
import errno
import fcntl
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsa_jax.foreign import MOST_BYTES, parse_json

_LOG = logging.getLogger(__name__)
_SWAP, _HERE = 2, -100  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS; AT_FDCWD


class RunError(RuntimeError):
    """A run cannot start or continue: the message says why and what to do. Commands print it as one line, without traceback."""


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """A descriptor of the regular file `path`, opened without waiting and, unless `follow`, without following a link.

    Raises:
        OSError: also for a link, a directory, a FIFO or a device, which could hang, never end or lie elsewhere.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a symbolic link; expected a file of its own"
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def read_regular(path: str | os.PathLike[str], *, follow: bool = False) -> bytes:
    """The content of a file as `open_regular` opens it, and with its errors."""
    with open(open_regular(path, follow=follow), "rb") as file:
        return file.read()


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8, in which a file name that is no UTF-8 is written with escapes."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` so that `path` holds either its former content or all of the new one, whatever happens.

    Raises:
        RunError: when the file system refuses (full, read-only, no permission); `path` is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.unlink(missing_ok=True)  # of a killed process with this number, or a link
            with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
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


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two directories in one step of the file system; False where it has no such step."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, names[0], _HERE, names[1], ctypes.c_uint(_SWAP))
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, ctypes.c_uint(_SWAP))
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def make_writable_directory(path: Path, *, flag: str = "workdir") -> None:
    """Create `path` where it is missing, and check that a file can be written there.

    Raises:
        RunError: when it is a file, or the file system refuses; `flag` is the option that chose it.
    """
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{flag} {path} is a file; expected a directory. Choose another --{flag}.")
        path.mkdir(parents=True, exist_ok=True)
        # Without a name where the system can: a process that is killed here leaves nothing.
        with tempfile.TemporaryFile(dir=path, prefix=".probe."):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{flag} {path} cannot be written: {reason}. Choose another --{flag}, or make it writable.") from error


@contextmanager
def claimed(workdir: str | os.PathLike[str], name: str = ".lock", *, flag: str = "workdir") -> Iterator[None]:
    """Lock `workdir` against other processes of this host, and of others where the file system shares locks.

    The lock is the file `name`; it ends with the process, however that ends. Where the body raises, a lock file that was not
    there before is removed: a directory that is refused stays as it was.

    Raises:
        RunError: when `workdir` cannot be written, another process is using it, or `name` is a link, a FIFO or a device;
            `flag` is the option that chose it.
    """
    make_writable_directory(Path(workdir), flag=flag)
    path = Path(workdir) / name
    is_new = not path.exists()
    descriptor = _locked(path, flag)
    try:
        yield
    except BaseException:
        if is_new and descriptor is not None:
            path.unlink(missing_ok=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path, flag: str) -> int | None:
    """A descriptor that holds the lock on the file `path`; None where it cannot be locked, which is logged."""
    workdir = path.parent
    if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
        raise RunError(
            f"{path} is a link or no regular file; expected the run's own lock. Remove it, or choose another --{flag}."
        )
    while True:
        try:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): nothing stops a second process from writing there", workdir, error.strerror)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # removed by the process that held it, between the two calls
        except BlockingIOError:
            os.close(descriptor)
            raise RunError(
                f"another process is using {flag} {workdir}. Wait until it has ended, or choose another --{flag}."
            ) from None
        except OSError as error:
            os.close(descriptor)
            _LOG.warning("%s cannot be locked (%s): nothing stops a second process from writing there", workdir, error.strerror)
            return None


def read_object(path: Path, *, follow: bool = False) -> dict[str, Any]:
    """The JSON object in a regular file; RunError where there is none."""
    try:
        with open(open_regular(path, follow=follow), "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        values = parse_json(content)
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
