"""Standard output and error that survive a closed reader: a broken pipe does not end long work."""

import errno
import io
import os
from collections.abc import Callable
from typing import TextIO

from dsa_jax.foreign import printable_text


class LastingStream(io.TextIOBase):
    """Forwards text to `stream` until that fails, then drops it; `error` holds the failure. None drops everything.

    `plain`: what a terminal acts on, but for line ends and tabs, goes out as backslash codes, since models and files that
    others made decide on what is printed.
    """

    def __init__(self, stream: TextIO | None, *, plain: bool = False) -> None:
        self._stream, self._plain = stream, plain
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return (self._stream and self._stream.encoding) or "utf-8"

    def write(self, text: str) -> int:
        """Forward `text`, with escapes for characters that the encoding lacks."""
        shown = (printable_text(text) if self._plain else text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether the stream is a terminal that still works."""
        return self._stream is not None and self.error is None and self._stream.isatty()

    def finish(self) -> str | None:
        """Flush; the reason of a failure other than a closed reader, else None.

        The stream is redirected then, because the interpreter flushes it once more at exit, which must not fail.
        """
        self.flush()
        if self.error is None or self._stream is None:
            return None
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        return None if self.error.errno == errno.EPIPE else self.error.strerror

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is not None and self.error is None:
            try:
                action(self._stream)
            except OSError as error:
                self.error = error
