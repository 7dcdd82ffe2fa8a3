"""A checkpoint by its directory, its place in the cache, or its id."""

import pytest
from huggingface_hub import constants

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.locate import locate_checkpoint

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(root, name="models--some--model", revisions=(REVISION,), main=REVISION):
    folder = root / name
    for revision in revisions:
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    if main:
        (folder / "refs" / "main").write_text(main)
    return folder


def test_a_directory_is_itself_and_a_missing_path_stays(tmp_path):
    assert locate_checkpoint(tmp_path) == tmp_path
    assert locate_checkpoint(str(tmp_path / "absent" / "model")) == tmp_path / "absent" / "model"
    assert locate_checkpoint("a/b/c").parts == ("a", "b", "c")


def test_a_folder_of_the_cache_is_its_main_snapshot(tmp_path):
    folder = cached(tmp_path, revisions=(REVISION, "f" * 40))
    assert locate_checkpoint(folder) == folder / "snapshots" / REVISION
    alone = cached(tmp_path, name="models--other--model", main="")
    assert locate_checkpoint(alone) == alone / "snapshots" / REVISION
    unclear = cached(tmp_path, name="models--third--model", revisions=("a" * 40, "b" * 40), main="")
    with pytest.raises(CheckpointError, match="has no snapshot of its main revision"):
        locate_checkpoint(unclear)


def test_an_id_is_taken_from_the_cache_or_said_how_to_download(tmp_path, monkeypatch):
    folder = cached(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_checkpoint("some/model") == folder / "snapshots" / REVISION
    with pytest.raises(
        CheckpointError, match=r"some/other is no directory, is not in the Hugging Face cache .*: hf download some/other"
    ):
        locate_checkpoint("some/other")
    with pytest.raises(CheckpointError, match="hf download some/other --revision v2"):
        locate_checkpoint("some/other@v2")
