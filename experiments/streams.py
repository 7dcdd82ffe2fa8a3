"""Standard output and error that outlast their readers: long work does not end because nobody reads its lines any more."""

import errno
import io
import os
from collections.abc import Callable
from typing import TextIO


class LastingStream(io.TextIOBase):
    """Passes text on to `stream` until that fails; from then on it drops it, and `error` says why. None has no readers."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return (self._stream and self._stream.encoding) or "utf-8"

    def write(self, text: str) -> int:
        """Pass it on, characters that the encoding lacks as escapes."""
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Pass on what is held back."""
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether a person is watching."""
        return self._stream is not None and self.error is None and self._stream.isatty()

    def finish(self) -> str | None:
        """Write what is held back; why that failed, if it did and not because the reader went away.

        The interpreter flushes the stream once more when it ends, which must not fail then.
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
