import os

import pytest

from dsa_jax.config import Config
from dsa_jax.run.directory import open_run
from dsa_jax.run.export import admit_export, require_own_export
from dsa_jax.run.files import RunError, exchange


def written(directory, text):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(text)
    (directory / "model.safetensors").write_bytes(text.encode() * 100)
    return directory


def test_an_export_replaces_only_what_the_run_wrote(tmp_path):
    run = open_run(tmp_path / "run", Config())
    require_own_export(run)
    written(run.export_path, "pretrained")
    for replacement in (None, written(tmp_path / "new", "trained")):
        with pytest.raises(RunError, match=r"hf is not what this run wrote.* Move it away"):
            require_own_export(run, replacement=replacement)
    with pytest.raises(RunError, match="is not what this run wrote"):
        admit_export(run, tmp_path / "new")
    assert run.exports == []
    admit_export(run, written(tmp_path / "same", "pretrained"))  # as a run of an earlier version left it


def test_a_run_killed_before_or_after_the_swap_goes_on(tmp_path):
    run = open_run(tmp_path / "run", Config())
    new = written(tmp_path / "new", "100 steps")
    admit_export(run, new)
    require_own_export(run)
    new.rename(run.export_path)
    require_own_export(run)
    admit_export(run, written(tmp_path / "newer", "200 steps"))
    require_own_export(run)
    assert exchange(tmp_path / "newer", run.export_path)
    require_own_export(run)
    assert len(run.exports) == 2 and run.environment()["history"] == []
    (run.export_path / "README.md").write_text("my notes")
    with pytest.raises(RunError, match="is not what this run wrote"):
        require_own_export(run)


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "fifo"])
def test_what_is_no_directory_is_no_place_for_an_export(tmp_path, kind):
    run = open_run(tmp_path / "run", Config())
    place = run.export_path
    if kind == "file":
        place.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(written(tmp_path / "theirs", "x") if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(RunError, match="is not what this run wrote"):
        require_own_export(run)
