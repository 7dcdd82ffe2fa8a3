"""What saving does to the directory that a checkpoint goes to: replaced as a whole, or left as it was."""

import errno
import inspect
import json
import os

import pytest

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf import save as save_module
from dsa_jax.checkpoints.hf.weights import INDEX_FILE
from tests.dsa_jax.checkpoints.hf.tiny import assert_same


def test_an_older_checkpoint_is_replaced_as_a_whole(saved):
    target, loaded = saved
    save_pretrained(target, loaded.config, loaded.params, shard_bytes=10_000)
    assert not (target / "model.safetensors").exists()
    assert_same(load_pretrained(target).params, loaded.params)
    save_pretrained(target, loaded.config, loaded.params)
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(entry.name for entry in target.parent.iterdir()) == ["target", "theirs"]


def test_a_full_disk_leaves_the_older_checkpoint_alone(saved, monkeypatch):
    target, loaded = saved
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    fsync = os.fsync

    def full(descriptor):
        if any(target.parent.glob(".target.*/config.json")):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(save_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"target cannot be written: the disk is full\. What was there before"):
        save_pretrained(target, loaded.config, loaded.params)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(entry.name for entry in target.parent.iterdir()) == ["target", "theirs"]


def test_a_move_that_fails_puts_the_older_checkpoint_back(saved, monkeypatch, caplog):
    """Where the file system cannot swap two names, which is said."""
    target, loaded = saved
    replace = os.replace
    monkeypatch.setattr(save_module, "exchange", lambda one, other: False)

    def fails(source, destination):
        if str(source).endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(save_module.os, "replace", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_pretrained(target, loaded.config, loaded.params)
    assert_same(load_pretrained(target).params, loaded.params)
    assert sorted(entry.name for entry in target.parent.iterdir()) == ["target", "theirs"]


@pytest.mark.parametrize("call", ["exchange", "rmtree", "_sync"])
def test_a_process_killed_at_any_call_leaves_a_whole_checkpoint(saved, monkeypatch, call):
    """Onto its own source, too; what it leaves beside goes with the next."""
    target, loaded = saved

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(save_module.shutil if call == "rmtree" else save_module, call, killed)
        with pytest.raises(Killed):
            save_pretrained(target, loaded.config, loaded.params, shard_bytes=10_000)
    assert_same(load_pretrained(target).params, loaded.params)
    save_pretrained(target, loaded.config, loaded.params)
    assert sorted(entry.name for entry in target.parent.iterdir()) == ["target", "theirs"]


def test_the_older_checkpoint_stays_where_the_new_one_is_not_wanted(saved):
    target, loaded = saved
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    seen = []

    def refuse(complete):
        seen.append(load_pretrained(complete).config)
        raise RuntimeError("not mine")

    with pytest.raises(RuntimeError, match="not mine"):
        save_pretrained(target, loaded.config, loaded.params, before_replacing=refuse)
    assert seen and {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_nothing_but_a_checkpoint_is_replaced(saved):
    target, loaded = saved

    def refused(directory, match):
        before = sorted(directory.rglob("*")) if directory.is_dir() else directory.read_bytes()
        with pytest.raises(CheckpointError, match=match):
            save_pretrained(directory, loaded.config, loaded.params)
        assert (sorted(directory.rglob("*")) if directory.is_dir() else directory.read_bytes()) == before

    others = ("my_lora.safetensors", "optimizer.safetensors", "model-two.safetensors", "consolidated.safetensors")
    for name in ("results.json", "thesis.txt", *others):
        (target / name).write_text("years of work")
        refused(target, f"also holds {name}")
        (target / name).unlink()
    other = target.parent / "other"
    other.mkdir()
    (other / "notes.txt").write_text("notes")
    refused(other, r"holds notes\.txt and is no checkpoint")
    refused(other / "notes.txt", "is a file")
    (other / "notes.txt").rename(other / "config.json")
    (other / "embeddings.safetensors").write_text("years of work")
    refused(other, r"holds config\.json and is no checkpoint")
    empty = target.parent / "deep" / "empty"
    empty.mkdir(parents=True)
    save_pretrained(empty, loaded.config, loaded.params)
    assert (empty / "config.json").is_file()


def test_files_that_the_index_names_are_the_checkpoints_own(saved):
    target, loaded = saved
    (target / "model.safetensors").rename(target / "pytorch_model-1.safetensors")
    (target / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.safetensors"}}))
    save_pretrained(target, loaded.config, loaded.params)
    assert not (target / "pytorch_model-1.safetensors").exists() and (target / "model.safetensors").is_file()


def test_a_hidden_directory_with_other_files_is_no_leftover(saved):
    target, loaded = saved
    dated = target.parent / f".{target.name}.20240101.old"
    dated.mkdir()
    (dated / "thesis.txt").write_text("years of work")
    save_pretrained(target, loaded.config, loaded.params)
    assert (dated / "thesis.txt").read_text() == "years of work"


def test_what_killed_calls_left_behind_goes_with_the_next(saved):
    target, loaded = saved
    leftovers = [target.parent / f".{target.name}.{name}" for name in ("ab_12xyz.part", "00000000.old")]
    others = [target.parent / f".{target.name}-two.ab_12xyz.part", target.parent / f".{target.name}.backup.old"]
    for folder in leftovers + others:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"0")
    save_pretrained(target, loaded.config, loaded.params)
    assert not any(folder.exists() for folder in leftovers) and all(folder.exists() for folder in others)


@pytest.mark.parametrize("size", [0, "5GB", 1e9])
def test_a_size_of_files_that_is_none(saved, size):
    target, loaded = saved
    with pytest.raises(ValueError, match=r"shard_bytes is .*; expected a positive number of bytes"):
        inspect.unwrap(save_pretrained)(target, loaded.config, loaded.params, shard_bytes=size)


def test_a_link_to_a_directory_is_followed(saved):
    target, loaded = saved
    link = target.parent / "link"
    link.symlink_to(target)
    save_pretrained(link, loaded.config, loaded.params)
    assert link.is_symlink() and sorted(entry.name for entry in target.parent.iterdir()) == ["link", "target", "theirs"]
