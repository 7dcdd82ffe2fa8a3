"""A retrofit of a Hugging Face directory: where it may lie, that it may go, and what the export may replace."""

import json
import shutil

import jax
import numpy as np
import pytest

from dsa_jax import build_model, init_params, load_pretrained, save_pretrained
from dsa_jax.checkpoints.from_hf import keep_source, present_inputs, resolve_checkpoint
from dsa_jax.config import Config, ConfigError
from dsa_jax.params import count_parameters, is_indexer_path, parameter_paths, split_parameters
from dsa_jax.retrofit import _showable, check_places, retrofit
from dsa_jax.run.files import RunError
from dsa_jax.train.init import load_run
from tests.dsa_jax.train.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    config = tiny_config().model
    config.attention.indexer.enabled = False
    directory = tmp_path_factory.mktemp("models") / "dense"
    save_pretrained(directory, config, init_params(build_model(config), jax.random.key(0)))
    return directory


def recipe(directory, steps=1):
    config = tiny_config(steps=steps)
    config.train.pretrain.steps = config.train.warmup.steps = 0
    config.init.hf_dir, config.eval.rows = str(directory), ("dense",)
    return config


@pytest.mark.parametrize(
    ("source", "workdir"),
    [("m/hf", "m"), ("m", "m"), ("m", "m/runs/a"), ("m/../n", "n/x"), ("link/hf", "m"), ("m/hf", "link")],
)
def test_a_run_does_not_write_into_its_source(tmp_path, source, workdir):
    (tmp_path / "m" / "hf").mkdir(parents=True)
    (tmp_path / "n").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    config = Config()
    config.init.hf_dir = str(tmp_path / source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"init\.hf_dir is .* neither lies in the other"):
        retrofit(config, tmp_path / workdir)
    config.init.hf_dir, config.init.checkpoint = "", str(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"init\.checkpoint is"):
        check_places(config, tmp_path / "link")
    check_places(config, tmp_path / "m2")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_home_directory_is_no_way_round(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config()
    for source, workdir in (("~/m/hf", "m"), ("~/m", "m/runs/a"), ("~", "m")):
        config.init.hf_dir = source
        with pytest.raises(ConfigError, match=r"init\.hf_dir is ~.* neither lies in the other"):
            check_places(config, tmp_path / workdir)


def test_config_and_tokenizer_stay_when_the_source_goes(tmp_path, dense):
    source = shutil.copytree(dense, tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    content.pop("dtype", None), content.pop("torch_dtype", None)
    (source / "config.json").write_text(json.dumps(content))
    (source / "tokenizer.json").write_text("{}")
    config = recipe(source)
    config.data.text.tokenizer = "checkpoint"
    resolved = resolve_checkpoint(config)
    keep_source(str(source), tmp_path / "kept")
    shutil.rmtree(source)
    assert resolve_checkpoint(config, tmp_path / "kept") == resolved
    present = present_inputs(resolved, tmp_path / "kept")
    assert present.init.hf_dir == present.data.text.tokenizer == str(tmp_path / "kept")
    for name, stays in (("tokenizer.json", str(tmp_path / "kept" / "tokenizer.json")), ("", str(tmp_path / "kept"))):
        resolved.data.text.tokenizer = f"{source}/{name}"
        assert present_inputs(resolved, tmp_path / "kept").data.text.tokenizer == stays
    config.model.attention.indexer.topk += 1
    assert resolve_checkpoint(config, tmp_path / "kept") != resolved


@pytest.mark.slow
def test_a_run_outlives_its_source_and_takes_more_steps(tmp_path, dense, monkeypatch, caplog):
    source, workdir = shutil.copytree(dense, tmp_path / "source"), tmp_path / "run"
    report = retrofit(recipe(source), workdir)
    exported = load_pretrained(workdir / "hf").config

    source.rename(tmp_path / "moved")
    assert retrofit(recipe(tmp_path / "moved"), workdir)["rows"] == report["rows"]  # shown, by content
    shutil.rmtree(tmp_path / "moved")
    with monkeypatch.context() as patch:  # nothing is written to show it
        patch.setattr("dsa_jax.retrofit.claimed", None)
        assert retrofit(recipe(source), workdir)["rows"] == report["rows"]

    (workdir / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"hf is not what this run wrote"):
        retrofit(recipe(source, steps=2), workdir)
    (workdir / "hf" / "notes.txt").unlink()
    longer = retrofit(recipe(source, steps=2), workdir)
    assert longer["stages"]["sparse"]["steps"] == 2 and (workdir / "report_sparse_1.json").exists()
    assert load_pretrained(workdir / "hf").config == exported
    assert "before sparse training is left out" in caplog.text
    with pytest.raises(RunError, match=r"train\.sparse\.steps is 2 there and 1 here"):
        retrofit(recipe(source), workdir)


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_what_is_in_the_place_of_the_export_is_found_at_once(tmp_path, dense, kind):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "hf").write_text("mine") if kind == "file" else shutil.copytree(dense, workdir / "hf")
    with pytest.raises(RunError, match=r"hf is not what this run wrote"):
        retrofit(recipe(dense), workdir)
    assert [path.name for path in workdir.iterdir()] == ["hf"]


ROW = {"name": "dense", "text_loss": 2.0, "tasks": {"mqar": {"accuracy": 0.5}}}


@pytest.mark.parametrize(
    "damage",
    [
        {"coverage_by_layer": [0.5]},
        {"coverage_by_layer": {"sparse": 3}},
        {"rows": [ROW | {"tasks": {"mqar": {}}}]},
        {"rows": [ROW, ROW | {"name": "sparse", "tasks": {"mqar": {"accuracy": None}}}]},
        {"costs": True},
        {"costs": {"a": 1}},
    ],
)
def test_a_report_with_parts_of_other_kinds_is_made_again(tmp_path, caplog, damage):
    whole = {"rows": [ROW, ROW | {"name": "sparse"}], "stages": {}}
    assert _showable(whole, tmp_path) == whole and _showable(None, tmp_path) is None
    assert _showable(whole | damage, tmp_path) is None
    assert "is not what a run writes" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_base_is_exported_bit_for_bit(tmp_path, dense, dtype, capsys):
    config = recipe(dense, steps=2)
    config.train.sparse_trains, config.train.warmup.steps = "indexer", 1
    config.model.param_dtype, config.eval.recall_sequences = dtype, 2
    source = tmp_path / "source"
    loaded = load_pretrained(dense, dtype=dtype)
    save_pretrained(source, loaded.config, loaded.params)
    config.init.hf_dir = str(source)
    retrofit(config, tmp_path / "run")
    before, after = (read_tensors(directory) for directory in (source, tmp_path / "run" / "hf"))
    assert before.keys() == {name for name in after if "indexer" not in name} < after.keys()
    for name, tensor in before.items():
        assert tensor == after[name] and tensor[0] == {"float32": "F32", "bfloat16": "BF16"}[dtype], name
    start = load_run(tmp_path / "run", stage="warmup").params
    end = load_run(tmp_path / "run").params
    changed = {path for path, leaf in parameter_paths(start).items() if not np.array_equal(leaf, parameter_paths(end)[path])}
    assert changed and all(map(is_indexer_path, changed))
    n_indexer = count_parameters(split_parameters(end, is_indexer_path)[0])
    assert f"trained in warmup {n_indexer:,}, in sparse {n_indexer:,}" in capsys.readouterr().out


def read_tensors(directory):
    """(dtype, shape, bytes) of every tensor by name."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = entry["dtype"], entry["shape"], raw[start + first : start + last]
    return found
