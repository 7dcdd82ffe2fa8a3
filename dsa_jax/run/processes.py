"""Several processes as one run: launch, agreement, and files that only the first writes.

All processes run the same program on the same data. Actions and decisions of one process (files, which checkpoint is valid) go
through `on_main`; a request of any process (a signal) through `with_votes`.
"""

import functools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dsa_jax.config import ConfigError
from dsa_jax.run.files import RunError
from dsa_jax.run.manifest import first_line

_LOG = logging.getLogger(__name__)
_BLOCK = 4096  # messages are padded to a multiple of this, so that few lengths are compiled
_JOIN_SECONDS, _SAY_SECONDS = 300.0, 15.0
_SHUTDOWN_SECONDS = 60
_FLAGS = "--coordinator, --num_processes and --process_id"


class ProcessError(RunError):
    """Another process of the run failed, with this message."""


class Launch(NamedTuple):
    """Address of process 0, number of processes, index of this one, and the GPUs it may use (None: all visible)."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def find_launch(
    coordinator: str, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> Launch | None:
    """The launch that the arguments describe, else that of a SLURM step of several tasks, else None: a single process.

    A batch script outside `srun` is not a step, whatever the job asked for. Of several tasks on a node each takes the GPU of
    its local index, unless SLURM shows it a single GPU; a task alone on a node takes all GPUs.

    Raises:
        ConfigError: when only some of the arguments are given, or they contradict each other.
    """
    if coordinator or num_processes is not None or process_id is not None:
        if not coordinator or num_processes is None or process_id is None:
            raise ConfigError(f"{_FLAGS} belong together; expected all three or none.")
        address = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
        if not address or not 0 < int(address[1]) < 2**16:
            raise ConfigError(f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0, such as node001:12345.")
        if num_processes < 1:
            raise ConfigError(f"--num_processes is {num_processes}; expected a positive number.")
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"--process_id is {process_id}; expected 0 to {num_processes - 1} (--num_processes).")
        return Launch(coordinator, num_processes, process_id)
    nodes = environment.get("SLURM_STEP_NODELIST")
    n_tasks = _of_slurm(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)
    if not nodes or n_tasks == 1:
        return None
    # The same port in all tasks, which two jobs are unlikely to share; chosen as by JAX.
    port = environment.get("JAX_COORDINATOR_PORT") or str(61440 + _of_slurm(environment, "SLURM_JOB_ID") % 4096)
    n_visible = len(environment.get("CUDA_VISIBLE_DEVICES", "").split(","))
    shares_node = n_tasks > _of_slurm(environment, "SLURM_STEP_NUM_NODES", default=1)
    is_given_its_own = "SLURM_GPUS_PER_TASK" in environment
    sees_others = not is_given_its_own and ("CUDA_VISIBLE_DEVICES" not in environment or n_visible > 1)
    local = [_of_slurm(environment, "SLURM_LOCALID")] if shares_node and sees_others else None
    return Launch(f"{first_host(nodes)}:{port}", n_tasks, _of_slurm(environment, "SLURM_PROCID"), local)


def _of_slurm(environment: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """The number in the first variable of `names` that is set, else `default`."""
    name = next((name for name in names if environment.get(name)), names[0])
    value = environment.get(name)
    if not value and default is not None:
        return default
    if not re.fullmatch("[0-9]{1,18}", value or ""):
        raise ConfigError(f"{name} is {value!r} in a SLURM step; expected a number. Give {_FLAGS} instead.")
    return int(value or 0)


def first_host(nodes: str) -> str:
    """First host of a SLURM node list such as `gpu[007-010,012],login1`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {nodes!r}; expected a list of hosts. Give {_FLAGS} instead.")
    return match[1] + (match[2] or "")


def start_processes(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes of the run, if any; call it before JAX initialises its devices.

    Returns once all have joined; a line every quarter of a minute says for whom it waits.

    Raises:
        RunError: when not all have joined after five minutes, or the address cannot be used.
    """
    launch = find_launch(coordinator, num_processes, process_id, os.environ)
    if launch is None or launch.num_processes == 1:
        return
    # It would catch SIGTERM and ignore it: until training begins, a signal must end the process.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = functools.partial(
        jax.distributed.initialize,
        launch.coordinator,
        launch.num_processes,
        launch.process_id,
        local_device_ids=launch.local_device_ids,
        # By default JAX hides all GPUs but one from a SLURM task, even one that is alone on its node.
        cluster_detection_method="deactivate",
        # At its own end it would abort the process with a stack of C++.
        initialization_timeout=2 * int(_JOIN_SECONDS),
        # After an error a process waits this long for the others, which may wait for it, and then ends them all.
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    wait_for(initialize, f"{launch.num_processes} processes at {launch.coordinator}, of which this is {launch.process_id}")


def wait_for(
    join: Callable[[], object], whom: str, *, seconds: float | int = _JOIN_SECONDS, every: float | int = _SAY_SECONDS
) -> None:
    """Run `join`, which blocks until others come, and say for whom it waits.

    Args:
        join: it runs in a thread of its own, which ends with the process where nobody comes.
        whom: for the lines and the error.
        seconds: how long to wait in all.
        every: pause between the lines.

    Raises:
        RunError: when `join` fails or takes too long.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            join()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and (left := until - time.monotonic()) > 0:
        thread.join(min(every, left))
        if thread.is_alive():
            _LOG.warning("waiting for %s: %.0f s left", whom, max(until - time.monotonic(), 0))
    if failures:
        raise RunError(f"cannot join {whom}: {first_line(failures[0])}") from failures[0]
    if thread.is_alive():
        raise RunError(
            f"not all of {whom}, have come after {seconds:g} s. Check that each was started and can reach that address, then "
            "start all of them again."
        )


def is_main() -> bool:
    """Whether this process writes the files: the first, or the only one."""
    return jax.process_index() == 0


def on_main(function: Callable[[], Any]) -> Any:
    """Run `function` in the first process only and broadcast its result, a JSON value; every process calls this.

    It is a barrier, so files that `function` wrote can be read afterwards. With one process this is `function()`.

    Raises:
        ProcessError: in the others, when `function` raises; in the first, what it raised.
    """
    if jax.process_count() == 1:
        return function()
    error, message = None, ""
    if is_main():
        try:
            message = json.dumps({"result": function()})
        except Exception as raised:
            error, message = raised, json.dumps({"error": f"process 0 failed: {raised}"})
    answer = json.loads(_broadcast(message))
    if error is not None:
        raise error
    if "error" in answer:
        raise ProcessError(answer["error"])
    return answer["result"]


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process calls this, between steps."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _broadcast(message: str) -> str:
    text = message.encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(-(-size // _BLOCK) * _BLOCK, np.uint8)
    if is_main():
        padded[:size] = np.frombuffer(text, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]).decode()


def with_votes(step: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`step`, (state, batch) to (state, metrics), as (state, batch, wants) whose metrics also hold `stop`, the OR of all wants.

    The votes are reduced inside the step and the result comes with its metrics, equal in every process, so that all stop after
    the same step without an extra collective to wait for. The state is donated.
    """
    mesh = jax.sharding.get_mesh()
    votes = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def voted(state: Any, batch: Any, wants: jax.Array) -> tuple[Any, dict[str, Any]]:
        state, metrics = step(state, batch)
        return state, metrics | {"stop": jnp.any(wants)}

    jitted = jax.jit(voted, donate_argnums=0)

    def call(state: Any, batch: Any, wants: bool) -> tuple[Any, dict[str, Any]]:
        cast = jax.make_array_from_callback((mesh.size,), votes, lambda index: np.full(1, wants))
        return jitted(state, batch, cast)

    return call


def gather_to_main(tree: Any) -> Any:
    """The arrays of `tree` gathered into host memory of the first process, None in the others; `tree` with one process.

    Stacked parameters are gathered layer by layer, so a device holds one full layer of one parameter beside its shards.
    """
    return tree if jax.process_count() == 1 else jax.tree.map(_gather, tree)


def _gather(leaf: jax.Array) -> np.ndarray | None:
    replicated = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    if leaf.ndim < 3:
        whole = jax.jit(lambda x: x, out_shardings=replicated)(leaf)
        return np.asarray(whole) if is_main() else None
    one = jax.jit(lambda x, i: x[i], out_shardings=replicated)
    out = np.empty(leaf.shape, leaf.dtype) if is_main() else None
    for i in range(leaf.shape[0]):
        layer = one(leaf, i)
        if out is not None:
            out[i] = np.asarray(layer)
        # One at a time: dispatched ahead, they would pile up in device memory.
        layer.block_until_ready()
    return out
