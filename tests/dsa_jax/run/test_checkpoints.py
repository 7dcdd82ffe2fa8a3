import gc
import json
import os
import resource
import shutil
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsa_jax.run import checkpoints, manifest
from dsa_jax.run.checkpoints import CheckpointStore
from dsa_jax.run.manifest import StageCheckpointError


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_tree(scale=1.0):
    kernel = jnp.arange(4096, dtype=jnp.float32).reshape(64, 64) * scale
    return {
        "params": {"embed": {"kernel": kernel, "bias": (kernel[0] / 3).astype(jnp.bfloat16)}},
        "optimizer": (Moments(jnp.asarray(7, jnp.int32), {"kernel": jnp.full((3,), jnp.nan)}), None, ()),
        "key": jax.random.PRNGKey(3),
        "host": np.array([2**40, -1]),
        "epoch": 3,
        "rate": 0.1,
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree)


def bits(tree):
    return [(type(x), np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "sparse", keep=2) as opened:
        yield opened


def save(store, *steps):
    for step in steps:
        store.save(step, make_tree(step), {"step": step})
    store.wait()


def largest_array_file(store, step):
    files = (store.directory / str(step) / "state").rglob("*")
    return max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip_is_bitwise(store):
    tree = make_tree()
    store.save(100, tree, {"skipped": 2, "name": "x"})
    restored = store.restore(100, abstract(tree))
    assert restored.step == 100 and restored.meta == {"skipped": 2, "name": "x"}
    assert jax.tree.structure(restored.tree) == jax.tree.structure(tree)
    assert bits(restored.tree) == bits(tree)
    assert store.describe(100)["params/embed/bias"] == ((64,), "bfloat16")


def test_saved_bits_survive_donation_during_the_save(store):
    @jax.jit
    def same(x):
        return x + 0

    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    array = same(jnp.arange(2_000_000, dtype=jnp.float32))
    store.save(1, {"w": array}, {})
    overwrite(array).block_until_ready()
    restored = store.restore(1, {"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)})
    np.testing.assert_array_equal(restored.tree["w"], np.arange(2_000_000, dtype=np.float32))


def test_restores_onto_a_mesh(store):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    save(store, 1)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), PartitionSpec("data"))
    target = {"params": {"embed": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)}}}
    kernel = store.restore(1, target, subset=True).tree["params"]["embed"]["kernel"]
    assert kernel.sharding == sharding
    np.testing.assert_array_equal(kernel, make_tree(1)["params"]["embed"]["kernel"])


def test_keeps_the_newest(store):
    save(store, 1, 2, 10, 11)
    assert store.steps() == [10, 11] and store.latest_valid() == 11


def test_empty_store(tmp_path):
    with CheckpointStore(tmp_path / "absent", keep=1) as store:
        assert store.latest_valid() is None and store.steps() == []
        with pytest.raises(StageCheckpointError, match="no complete checkpoint"):
            store.restore(5, {})
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def zero(path):
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGE = {
    "truncated_array": lambda store: truncate(largest_array_file(store, 2)),
    "empty_array": lambda store: largest_array_file(store, 2).write_bytes(b""),
    "zeroed_array": lambda store: zero(largest_array_file(store, 2)),
    "missing_array": lambda store: largest_array_file(store, 2).unlink(),
    "missing_state": lambda store: shutil.rmtree(store.directory / "2" / "state"),
    "truncated_meta": lambda store: truncate(store.directory / "2" / "meta" / "metadata"),
    "missing_manifest": lambda store: (store.directory / "2" / "manifest.json").unlink(),
    "torn_manifest": lambda store: truncate(store.directory / "2" / "manifest.json"),
    "foreign_manifest": lambda store: (store.directory / "2" / "manifest.json").write_text("[]"),
    "emptied": lambda store: [shutil.rmtree(store.directory / "2"), (store.directory / "2").mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_is_skipped_with_a_warning_and_can_be_replaced(tmp_path, caplog, damage):
    with CheckpointStore(tmp_path, keep=2) as store:
        save(store, 1, 2)
        damage(store)
    with CheckpointStore(tmp_path, keep=2) as store:
        with pytest.raises(StageCheckpointError, match=r"damaged|no complete"):
            store.restore(2, abstract(make_tree()))
        restored = store.restore(store.latest_valid(), abstract(make_tree()))
        assert restored.step == 1 and bits(restored.tree) == bits(make_tree(1))
        assert str(tmp_path / "2") in caplog.text
        save(store, 2)
        assert store.latest_valid() == 2
        assert bits(store.restore(2, abstract(make_tree())).tree) == bits(make_tree(2))


def outside(store):
    """A file outside the store that equals the largest array of step 2."""
    file = largest_array_file(store, 2)
    return shutil.copy(file, store.directory.parent / "outside"), file


def linked(store):
    there, file = outside(store)
    file.unlink()
    file.symlink_to(there)


def folder_linked(store):
    state = store.directory / "2" / "state"
    shutil.copytree(state, store.directory.parent / "state")
    shutil.rmtree(state)
    state.symlink_to(store.directory.parent / "state")


def fifo(store):
    largest_array_file(store, 2).unlink()
    os.mkfifo(store.directory / "2" / "state" / "pipe")


def renamed(new):
    """The largest array by another name in the manifest, that of a file with the same content."""

    def change(store):
        there, file = outside(store)
        path = store.directory / "2" / "manifest.json"
        content = json.loads(path.read_text())
        entry = content["files"].pop(str(file.relative_to(path.parent)))
        content["files"][new.format(there)] = entry
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    "change",
    [linked, folder_linked, fifo, renamed("{}"), renamed("../../outside")],
    ids=["file", "folder", "fifo", "abs", "up"],
)
def test_a_checkpoint_that_leaves_its_directory_does_not_count(tmp_path, change, caplog):
    with CheckpointStore(tmp_path / "sparse", keep=2) as store:
        save(store, 1, 2)
        change(store)
    with CheckpointStore(tmp_path / "sparse", keep=2) as store:
        assert store.latest_valid() == 1
        assert "is a link or no regular file" in caplog.text or "lies outside the checkpoint" in caplog.text
        (tmp_path / "sparse" / "7").symlink_to(tmp_path / "sparse" / "1")
        assert store.steps() == [1, 2]
        save(store, 7)
        assert store.latest_valid() == 7 and not (tmp_path / "sparse" / "7").is_symlink()


def test_what_a_killed_process_left_of_checkpoints_goes(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path, keep=1) as store:
        save(store, 1)
        with monkeypatch.context() as patch:  # killed while it removes step 1
            patch.setattr(checkpoints.shutil, "rmtree", lambda path, **_: None)
            save(store, 2)
        assert (tmp_path / "1.pruned").is_dir() and store.steps() == [2]
        (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
        save(store, 4)
        assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_numeric_directories_and_leftovers_do_not_count(store, caplog):
    save(store, 1)
    for name in ("40", "50.orbax-checkpoint-tmp", "07x"):
        (store.directory / name).mkdir()
    (store.directory / "60").write_text("a file")
    assert store.latest_valid() == 1
    assert "50.orbax-checkpoint-tmp" in caplog.text and str(store.directory / "40") in caplog.text
    save(store, 50)
    assert store.latest_valid() == 50


def test_pruning_never_counts_broken_checkpoints(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        save(store, 1, 2, 3)
        zero(largest_array_file(store, 3))
    with CheckpointStore(tmp_path, keep=2) as store:
        save(store, 4)
        assert store.latest_valid() == 4
        assert {1, 2} & set(store.steps()) == {2}
        zero(largest_array_file(store, 4))
        assert store.latest_valid() == 2


def test_reading_needs_none_of_the_files_outside_the_manifest(store):
    save(store, 1)
    for path in list((store.directory / "1").iterdir()):
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    assert bits(store.restore(store.latest_valid(), abstract(make_tree())).tree) == bits(make_tree(1))


def test_saving_a_valid_step_again_leaves_it(store):
    save(store, 1)
    before = (store.directory / "1" / "manifest.json").stat().st_mtime_ns
    save(store, 1)
    assert (store.directory / "1" / "manifest.json").stat().st_mtime_ns == before


@contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(store, capfd):
    save(store, 1)
    noise = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
    with (
        file_size_limit(100_000),
        pytest.raises(StageCheckpointError, match=r"cannot be written.*Earlier checkpoints are intact"),
    ):
        store.save(2, noise, {})
        store.wait()
    assert store.steps() == [1] and store.latest_valid() == 1
    assert [path.name for path in store.directory.iterdir()] == ["1"]
    assert "Traceback" not in capfd.readouterr().err
    store.save(2, noise, {})
    assert store.latest_valid() == 2


def test_a_full_disk_is_said_once_however_many_arrays_there_are(store, capfd, caplog):
    noise = {f"w{i}": jax.random.normal(jax.random.key(i), (50_000,)) for i in range(30)}
    with file_size_limit(10_000), pytest.raises(StageCheckpointError, match="cannot be written"):
        store.save(2, noise, {})
        store.wait()
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_crash_before_the_manifest_leaves_the_one_before(store, monkeypatch):
    save(store, 1)

    def crash(path, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "atomic_write_text", crash)
        with pytest.raises(StageCheckpointError, match=r"2 cannot be written: .*No space left"):
            save(store, 2)
    assert store.latest_valid() == 1
    save(store, 2)
    assert store.latest_valid() == 2


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with CheckpointStore(tmp_path / "file" / "stage", keep=1) as store:
        assert store.latest_valid() is None
        with pytest.raises(StageCheckpointError, match="Not a directory"):
            store.save(1, make_tree(), {})


MISFITS = {
    "missing": (lambda t: t["params"].update(new=np.zeros(2)), "params/new is missing in the checkpoint"),
    "extra": (lambda t: t.pop("key"), "key is in the checkpoint but not expected"),
    "shape": (
        lambda t: t["params"]["embed"].update(kernel=jax.ShapeDtypeStruct((64, 32), jnp.float32)),
        r"params/embed/kernel is float32\[64, 64\] in the checkpoint; expected float32\[64, 32\]",
    ),
    "dtype": (
        lambda t: t["params"]["embed"].update(bias=jax.ShapeDtypeStruct((64,), jnp.float16)),
        r"params/embed/bias is bfloat16\[64\] in the checkpoint; expected float16\[64\]",
    ),
}


def test_misfit_names_path_and_both(store):
    save(store, 1)
    for change, message in MISFITS.values():
        target = abstract(make_tree())
        change(target)
        with pytest.raises(StageCheckpointError, match=message):
            store.restore(store.latest_valid(), target)


def test_subset_reads_only_what_is_asked_for(store):
    save(store, 1)
    target = {"params": abstract(make_tree())["params"]}
    assert bits(store.restore(1, target, subset=True).tree) == bits({"params": make_tree(1)["params"]})
    with pytest.raises(StageCheckpointError, match="optimizer/0/count is in the checkpoint but not expected"):
        store.restore(1, target)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "no arrays"),
        ({"a": "text"}, "leaf a is a str"),
        ({"a": jax.random.key(0)}, r"typed PRNG key; store jax\.random\.key_data"),
        ({"a": {"b": 1}, "a/b": 2}, "share the path 'a/b'"),
    ],
    ids=["empty", "text", "typed_key", "same_path"],
)
def test_trees_that_cannot_be_saved(store, tree, message):
    with pytest.raises(ValueError, match=message):
        store.save(1, tree, {})
    assert store.steps() == []


def test_manifest_records_files_and_leaves(store):
    save(store, 1)
    manifest = json.loads((store.directory / "1" / "manifest.json").read_text())
    assert manifest["step"] == 1 and manifest["leaves"]["epoch"] == {"shape": [], "dtype": "int64"}
    assert "meta/metadata" in manifest["files"]
