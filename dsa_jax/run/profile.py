"""A profiler trace of some training steps, which leaves out compilation and whose failure stops nothing."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

_LOG = logging.getLogger(__name__)


class StepProfile:
    """The trace of the steps of one stage, into a directory that XProf, TensorBoard and Perfetto read.

    Call `around` with every step: what it encloses is traced where the step is among those wanted and compiles nothing. Steps
    overlap with their dispatch, so the caller waits for the one before the first and for the last.
    """

    def __init__(self, directory: Path | None, steps: range) -> None:
        """`steps` are 1-based; without a directory nothing is traced: for processes beside the first."""
        self._directory, self._steps = directory, steps if directory else range(0)
        self._traced: list[int] = []
        self._is_tracing = self._has_failed = False

    def starts_at(self, step: int, *, compiles: bool) -> bool:
        """Whether the trace starts with `step`: with the first one wanted, or the next after it that compiles nothing."""
        return step in self._steps and not compiles and not self._is_tracing and not self._has_failed and not self._traced

    def ends_before(self, *, compiles: bool) -> bool:
        """Whether the trace has to end before the next step."""
        return self._is_tracing and compiles

    def ends_after(self, step: int) -> bool:
        """Whether `step` is the last of the trace."""
        return self._is_tracing and step >= self._steps[-1]

    def start(self) -> None:
        """Start the trace; the caller has waited for all steps before."""
        try:
            assert self._directory is not None
            self._directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._is_tracing = True
        except (RuntimeError, OSError, ValueError) as error:
            self._fail(error)

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Mark what is done inside as `step` in the trace, if there is one."""
        if not self._is_tracing:
            yield
            return
        self._traced.append(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def stop(self) -> None:
        """End the trace, if there is one, and say how to open it; the caller has waited for its steps."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError, ValueError) as error:
            self._fail(error)
            return
        _LOG.info(
            "profiled steps %d to %d: xprof --logdir=%s (pip install xprof; or tensorboard), or perfetto_trace.json.gz in it "
            "at https://ui.perfetto.dev",
            *(self._traced[0], self._traced[-1], self._directory),
        )

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        _LOG.warning("train.profile_steps: no profile, the run goes on: %s", error)
