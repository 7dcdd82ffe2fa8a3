"""The progress line: live on a terminal, plain lines now and then elsewhere."""

import io
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_LIVE_SECONDS = 0.2
_WINDOW = 50


class Discard(io.TextIOBase):
    """A stream that shows nothing, for processes beside the one that reports."""

    def write(self, text: str, /) -> int:
        """Drop `text`."""
        return len(text)


class Timing(NamedTuple):
    """Time and tokens of a stage in this process; `seconds`, `timed_tokens` and the rate exclude steps that compiled."""

    steps: int
    seconds: float
    compile_seconds: float
    tokens: int
    timed_tokens: int
    tokens_per_second: float | None


class Progress:
    """Reports the steps of one stage.

    Call `update` once per step, after its result has arrived (JAX returns before the work is done). The first step of the
    process, and every step flagged `compiled`, count as compilation and not in the rate, which is that of the last 50 other
    steps. On a terminal one line is redrawn at most five times a second; elsewhere a plain line is written after compilation,
    every `every_seconds`, and at the last step.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        *,
        start_step: int = 0,
        every_seconds: float | int = 10.0,
        peak_flops: float | int | None = None,
        tokens_left: Callable[[int], int] | None = None,
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
    ) -> None:
        """Start the clock.

        Args:
            stage: name shown first.
            total_steps: steps of the whole stage.
            start_step: steps done before this process.
            every_seconds: pause between plain lines.
            peak_flops: peak FLOP/s of all devices together, for the MFU.
            tokens_left: from the steps done to the tokens of the remaining ones; default: as many per step as lately.
            stream: where to write, default stderr.
            clock: monotonic seconds.
            live: redraw one line; default: whether the stream is a terminal.
        """
        self._stage, self._total, self._step = stage, total_steps, start_step
        self._every = every_seconds
        self._peak_flops = peak_flops
        self._tokens_left = tokens_left
        self._stream: Any = stream if stream is not None else sys.stderr
        self._clock = clock
        self._live = _is_terminal(self._stream) if live is None else live
        self._display: Any = None
        self._seen: int | None = None
        self._values: dict[str, float] = {}
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=_WINDOW)
        self._steps = self._tokens = self._timed_tokens = 0
        self._seconds = self._compile_seconds = 0.0
        self._before = self._clock()
        self._written: float | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        tokens: int,
        values: Mapping[str, Any] | None = None,
        compiled: bool = False,
        flops: float | int | None = None,
        seen: int | None = None,
    ) -> None:
        """Report that `step` steps of the stage are done.

        Args:
            step: 1 after the first step of the stage.
            tokens: tokens of this step.
            values: values to show (`loss`, `kl`, ...), until given again.
            compiled: this step included a compilation, for instance because the sequence length changed.
            flops: FLOPs of this step; None where unknown.
            seen: tokens of the stage so far, those before this process included; None: not shown.
        """
        now = self._clock()
        elapsed, self._before = now - self._before, now
        compiled = compiled or self._steps == 0
        self._step, self._steps, self._tokens = step, self._steps + 1, self._tokens + tokens
        if compiled:
            self._compile_seconds += elapsed
        else:
            self._seconds += elapsed
            self._timed_tokens += tokens
            self._recent.append((elapsed, tokens, math.nan if flops is None else flops))
        self._seen = seen
        self._values |= {name: float(value) for name, value in (values or {}).items()}
        due = self._written is None or now - self._written >= (_LIVE_SECONDS if self._live else self._every)
        if due or step >= self._total or (compiled and not self._live):
            self._written = now
            self._show(f"{self.line()}, compiled in {_duration(elapsed)}" if compiled else self.line())

    def extend(self, total_steps: int) -> None:
        """Let the stage have `total_steps` steps."""
        self._total = total_steps

    def pause(self) -> None:
        """Exclude the time since the last step from the rate: call it after a checkpoint or an evaluation."""
        self._before = self._clock()

    def timing(self) -> Timing:
        """Totals of this process so far."""
        rate = self._timed_tokens / self._seconds if self._seconds > 0 else None
        return Timing(self._steps, self._seconds, self._compile_seconds, self._tokens, self._timed_tokens, rate)

    def line(self) -> str:
        """The text shown: stage, step, values, tokens seen, tokens/s, and MFU and time left where known."""
        parts = [f"{self._stage} {self._step}/{self._total}"]
        parts += [f"{name} {_number(value)}" for name, value in self._values.items()]
        if self._seen is not None:
            parts.append(f"{_quantity(self._seen)} tokens")
        seconds, tokens, flops = (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0.0, 0, 0.0)
        if seconds > 0:
            rate = tokens / seconds
            parts.append(f"{_quantity(rate)} tokens/s")
            if self._peak_flops is not None and not math.isnan(flops):
                parts.append(f"MFU {flops / seconds / self._peak_flops:.1%}")
            if self._step < self._total and rate:
                as_lately = (self._total - self._step) * tokens / len(self._recent)
                left = as_lately if self._tokens_left is None else self._tokens_left(self._step)
                parts.append(f"{_duration(left / rate)} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Show the last line and release the terminal."""
        if self._display is not None:
            self._display.update(self._text(self.line()), refresh=True)
            self._display.stop()
            self._display = None

    def _show(self, text: str) -> None:
        if not self._live:
            self._stream.write(text + "\n")
            self._stream.flush()
            return
        if self._display is None:
            from rich.console import Console
            from rich.live import Live

            self._display = Live(console=Console(file=self._stream), auto_refresh=False)
            self._display.start()
        self._display.update(self._text(text), refresh=True)

    def _text(self, text: str) -> Any:
        from rich.text import Text

        return Text(text, no_wrap=True, overflow="ellipsis")


def _is_terminal(stream: Any) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def _quantity(value: float | int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes}:{int(seconds % 60):02d} min" if hours == 0 else f"{hours}:{minutes % 60:02d} h"
