"""SIGTERM, SIGINT and SIGHUP become a request to stop after the current step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context manager under which the first SIGTERM, SIGINT or SIGHUP (a terminal that closed) only sets `requested`.

    A second signal of the same kind reaches its former handler (SIGTERM ends the process, SIGINT raises KeyboardInterrupt), for
    a step that never ends. A SIGHUP that is ignored, as under nohup, stays ignored. The former handlers are restored on exit.
    Only the main thread can set signal handlers: in another one this does nothing and `requested` stays False.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._first is not None

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal ("SIGTERM"), None before any."""
        return self._first.name if self._first is not None else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _CAUGHT:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number in list(self._former):
            self._restore(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or signal.Signals(number)
        # Restored now, so that a second signal of this kind reaches the former handler.
        self._restore(signal.Signals(number))

    def _restore(self, number: signal.Signals) -> None:
        former = self._former.pop(number, None)
        # None: the former handler was installed from C and cannot be put back from Python.
        signal.signal(number, signal.SIG_DFL if former is None else former)
