"""Work on a device in a process of its own: what crashes it, or hangs, costs one item and not the run."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

Task = Callable[[Any], dict[str, Any]]
"""Does one item; returns {status, ...}. A function of a module, so that another process can import it."""

START_SECONDS = 150.0
STOP_SECONDS = 10.0


class NoGpuError(RuntimeError):
    """There is no GPU here."""


def describe_device() -> dict[str, Any]:
    """{backend, environment} of this process; starts JAX on its device."""
    import jax

    from dsa_jax.run.environment import describe_environment

    return {"backend": jax.default_backend(), "environment": describe_environment()}


def _serve(connection: Any, task: Task, describe: Callable[[], dict[str, Any]], variables: Mapping[str, str]) -> None:
    os.environ.update(variables)
    connection.send(describe())
    while (item := connection.recv()) is not None:
        try:
            result = task(item)
        except Exception as error:
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
        connection.send(result)


class Worker:
    """A process that does items; where it has died or run too long, the next item gets another."""

    def __init__(
        self,
        task: Task,
        *,
        on_cpu: bool = False,
        describe: Callable[[], dict[str, Any]] = describe_device,
        start_seconds: float = START_SECONDS,
    ) -> None:
        """Starts the process.

        Args:
            on_cpu: for a dry run; otherwise there must be a GPU.
            describe: what the process says about itself, at least {backend, environment}.

        Raises:
            NoGpuError: no GPU that JAX can use, and not `on_cpu`.
            RuntimeError: the process did not start.
        """
        self._task, self._on_cpu, self._describe, self._start_seconds = task, on_cpu, describe, start_seconds
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self.environment = self._start()

    def _start(self) -> dict[str, Any]:
        self._connection, theirs = self._context.Pipe()
        variables = {"JAX_PLATFORMS": "cpu"} if self._on_cpu else {}
        arguments = theirs, self._task, self._describe, variables
        self._process = self._context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            hello = self._connection.recv() if self._connection.poll(self._start_seconds) else None
        except (EOFError, ConnectionResetError):
            self._process.join(STOP_SECONDS)
            code = self._process.exitcode
            self.stop()
            raise RuntimeError(f"the process that does the items died with exit code {code}.") from None
        if hello is None:
            self.stop()
            raise RuntimeError(f"the process that does the items did not start within {self._start_seconds:.0f} s.")
        if hello["backend"] != "gpu" and not self._on_cpu:
            self.stop()
            raise NoGpuError(f"this is {hello['backend']!r}, not a GPU that jax can use; expected one. Install jax[cuda13].")
        return hello["environment"]

    def do(self, item: Any, seconds: float) -> dict[str, Any]:
        """What the task returns; {status: "failed", reason} if it raises, dies, takes over `seconds`, or no process starts.

        A process that has to be started first takes its own time.
        """
        try:
            if self._process is None:
                self._start()
            self._connection.send(item)
            if self._connection.poll(seconds):
                result = self._connection.recv()
                if result["status"] == "failed" and "CheckError" not in result["reason"]:
                    self.stop()  # an error of the device outlives the call that made it
                return result
            reason = f"took more than {seconds:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(STOP_SECONDS)
            reason = f"its process died with exit code {self._process.exitcode}"
        except RuntimeError as error:
            return {"status": "failed", "reason": str(error)}
        self.stop()
        return {"status": "failed", "reason": reason}

    def stop(self) -> None:
        """Ends the process; one that is stuck in a driver, which nothing ends, is left behind."""
        if self._process is None:
            return
        self._process.kill()
        self._process.join(STOP_SECONDS)
        self._connection.close()
        self._process = None
