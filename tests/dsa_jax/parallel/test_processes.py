"""How a process learns that it is one of several, and what the helpers do where it is alone."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.parallel.placement import place_batch, placement_on, replicate
from dsa_jax.run.files import RunError
from dsa_jax.run.processes import Launch, find_launch, first_host, gather_to_main, is_main, on_main, wait_for, with_votes
from tests.dsa_jax.parallel.meshes import mesh

STEP = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def found(environment):
    return find_launch("", None, None, environment)


def test_alone_unless_told_otherwise():
    assert found({}) is None
    # The batch script itself, and a step of one task.
    assert found({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
    assert found(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_flags_come_first():
    assert find_launch("node1:99", 4, 3, STEP) == Launch("node1:99", 4, 3)


def test_a_step_of_several_tasks_meets_at_its_first_host():
    assert found(STEP) == Launch("gpu007:61444", 2, 1, None)
    assert found(STEP | {"JAX_COORDINATOR_PORT": "777"}).coordinator == "gpu007:777"


def test_tasks_that_share_a_node_take_a_gpu_each():
    shared = STEP | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"}
    assert found(shared).local_device_ids == [5]
    assert found(shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}).local_device_ids == [5]
    assert found(shared | {"CUDA_VISIBLE_DEVICES": "5"}).local_device_ids is None  # SLURM has given it one
    own = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}
    assert found(shared | own).local_device_ids is None  # all that it sees are its own
    assert found(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_device_ids is None  # a node each


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a1,b2", "a1"),
        ("gpu[007-010,012],login1", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("h-1.site.org,h-2", "h-1.site.org"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("node1:99", None, 0), "belong together"),
        (("", 2, 0), "belong together"),
        (("node1", 2, 0), "expected HOST:PORT"),
        (("node1:99", 2, 2), "expected 0 to 1"),
        (("node1:99", 2, -1), "--process_id is -1"),
    ],
)
def test_contradicting_flags_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        find_launch(*arguments, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS is 'two'"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is ''"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID is '-1'"),
    ],
)
def test_a_step_that_lacks_a_number_is_one_line(changes, message):
    with pytest.raises(ConfigError, match=f"{message} in a SLURM step; expected a number. Give --coordinator"):
        find_launch("", None, None, STEP | changes)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(("h:99999", 2, 1), "coordinator"), (("h:0", 2, 1), "coordinator"), (("h:1", 0, 0), "num_processes")],
)
def test_a_port_and_a_number_of_processes_that_cannot_be(arguments, flag):
    with pytest.raises(ConfigError, match=f"--{flag} is "):
        find_launch(*arguments, {})


def test_a_peer_that_never_comes_is_named_and_waited_for_aloud(caplog):
    done, forever = threading.Event(), threading.Event()
    wait_for(done.set, "nobody", seconds=5, every=1)
    assert done.is_set() and not caplog.text
    with pytest.raises(RunError, match=r"not all of 2 processes at a:1, have come after 0\.2 s\. Check that each was started"):
        wait_for(forever.wait, "2 processes at a:1", seconds=0.2, every=0.05)
    assert caplog.text.count("waiting for 2 processes at a:1") >= 2
    forever.set()


@pytest.mark.parametrize(
    "error", [RuntimeError("UNKNOWN: port in use\nmore"), ValueError("no address"), OSError("unreachable")]
)
def test_an_address_that_cannot_be_used_is_one_line(error):
    def join():
        raise error

    with pytest.raises(RunError, match=rf"cannot join us: {str(error).splitlines()[0]}\."):
        wait_for(join, "us", seconds=5)


def test_a_single_process_does_everything_itself():
    assert is_main()
    assert on_main(lambda: {"step": 3}) == {"step": 3}
    tree = {"a": jnp.ones(2)}
    assert gather_to_main(tree) is tree
    with pytest.raises(KeyError):
        on_main(lambda: {}["missing"])


def test_a_vote_rides_on_the_step():
    step = lambda state, batch: (state + batch.sum(), replicate({"loss": batch.mean()}))
    with jax.set_mesh(mesh("fsdp2_tp2_cp2")):
        batch = place_batch(np.arange(16.0, dtype=np.float32).reshape(2, 8))
        voted = with_votes(step)
        state, metrics = voted(jnp.zeros(()), batch, False)
        assert not metrics["stop"] and metrics["loss"] == 7.5
        state, metrics = voted(state, batch, True)
        assert metrics["stop"] and metrics["stop"].is_fully_replicated and state == 240


def test_parameters_are_placed_by_the_rules_over_the_axes_that_a_mesh_has():
    assert placement_on(mesh("tp8"))("lm_head/kernel").spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    tensor_only = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    assert placement_on(tensor_only)("lm_head/kernel").spec == jax.sharding.PartitionSpec(None, "tensor")
