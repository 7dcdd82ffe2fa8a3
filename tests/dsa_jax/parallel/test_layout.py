"""Micro-batches and evaluation batches that follow the layout, and what does not divide, said at once."""

import ast
import copy
import re

import pytest

from configs import retrofit_hf
from dsa_jax.checkpoints.from_hf import resolve_checkpoint
from dsa_jax.config import Config, ConfigError, StageConfig, to_dict
from dsa_jax.config.fields import set_field
from dsa_jax.model import build_model
from dsa_jax.parallel.check import check_layout
from dsa_jax.parallel.placement import on_mesh
from dsa_jax.run.directory import check_run, open_run
from dsa_jax.run.files import RunError
from dsa_jax.train.loop import rehearsed_steps
from dsa_jax.train.stages import stage_of
from tests.dsa_jax.train.tiny import tiny_config
from tests.experiments.commands import ROOT


@pytest.mark.parametrize(
    ("preset", "accumulation", "rows"), [("single", 8, 1), ("fsdp8", 1, 8), ("fsdp2_tp4", 4, 2), ("dp2_ep2_cp2", 2, 4)]
)
def test_each_device_gets_one_row(preset, accumulation, rows):
    config = retrofit_hf.get_config()
    config.parallel.preset = preset
    found = config.laid_out()
    assert {found.train.warmup.accumulation, found.train.sparse.accumulation} == {accumulation}
    assert found.eval.batch_size == rows == config.train.sparse.batch_size // accumulation
    assert config.train.sparse.accumulation == 0 and found.laid_out() == found  # a copy, and settled


def test_explicit_numbers_win():
    config = retrofit_hf.get_config()
    config.train.sparse.accumulation, config.eval.batch_size = 4, 16
    found = config.laid_out()
    assert (found.train.sparse.accumulation, found.train.warmup.accumulation, found.eval.batch_size) == (4, 8, 16)


def test_the_command_of_the_readme_on_eight_devices():
    """--config=configs/retrofit_hf.py --config.parallel.preset=fsdp8 as written, but for rows that a tiny model has positions
    for: it divides, and its steps can be computed."""
    config = retrofit_hf.get_config()
    config.init.hf_dir, config.parallel.preset = str(ROOT / "tests" / "fixtures" / "hf" / "qwen3"), "fsdp8"
    for stage in (config.train.warmup, config.train.sparse):
        stage.seq_len = 64
    config.eval.text_len = 64
    config = resolve_checkpoint(config)
    config.validate()
    check_layout(config)
    with on_mesh(config.parallel):
        steps = rehearsed_steps(build_model(config.model), [stage_of(config, name) for name in ("warmup", "sparse")], config)
    assert set(steps) == {"warmup", "sparse"}


def wrong(preset, **fields):
    config = tiny_config("gqa")
    config.parallel.preset, config.eval.batch_size = preset, 8
    for name in ("pretrain", "warmup", "sparse"):
        getattr(config.train, name).batch_size = 8
    for name, value in fields.items():
        set_field(config, name.replace("__", "."), value)
    return config


def needles(*lengths):
    return {"eval__text_tasks": ("needle",), "eval__text_task_lens": lengths}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (wrong("fsdp8", train__warmup__accumulation=8, train__sparse__accumulation=4, eval__batch_size=1), 3),
        (wrong("fsdp8", train__warmup__batch_size=12, train__sparse__batch_size=3, train__sparse__accumulation=0), 2),
        (wrong("dp2_cp4", train__sparse__seq_len=20, train__pretrain__seq_len=12, eval__text_len=4, eval__batch_size=3), 3),
        (
            wrong(
                "dp2_cp4", eval__text_sequences=4, eval__text_len=4, eval__text_tasks=("needle",), eval__text_task_lens=(64, 68)
            ),
            2,
        ),
    ],
)
def test_everything_is_said_at_once_and_the_overrides_mend_it(config, named):
    with pytest.raises(ConfigError) as refused:
        check_layout(config)
    message = str(refused.value)
    assert message.count("expected a multiple of") >= named and "\n" not in message
    mended, overrides = copy.deepcopy(config), re.findall(r"--config\.([\w.]+)=(\d+|\([^)]*\))", message)
    assert overrides
    for name, value in overrides:
        set_field(mended, name, ast.literal_eval(value))
    check_layout(mended)


def test_what_only_another_layout_mends_has_no_override():
    with pytest.raises(ConfigError, match=r"n_heads is 4; expected a multiple of 8 .*eval\.batch_size=0") as refused:
        check_layout(wrong("dp2_tp8", eval__batch_size=3))
    assert "--config.model" not in str(refused.value)


def test_a_run_goes_on_with_the_rows_of_another_layout(tmp_path):
    config = retrofit_hf.get_config()
    config.model.dtype, config.model.attention.indexer.n_heads, config.model.max_positions = "float32", 4, 8192
    run = open_run(tmp_path, config.laid_out())
    run.checkpoint_dir("warmup").joinpath("2").mkdir(parents=True)
    config.parallel.preset = "fsdp8"
    differing = check_run(run, config.laid_out())
    assert {"train.sparse.accumulation", "eval.batch_size"} <= set(differing)
    config.train.sparse.batch_size = 16
    with pytest.raises(RunError, match="batch_size"):
        check_run(run, config.laid_out())


def test_zero_is_for_these_two_alone():
    config = Config(name="zeros")
    config.train.pretrain = StageConfig(steps=1, batch_size=7, accumulation=0)
    config.eval.batch_size = 0
    config.validate()
    assert to_dict(config.laid_out())["train"]["pretrain"]["accumulation"] == 7
    config.train.pretrain.batch_size = 0
    with pytest.raises(ConfigError, match=r"train\.pretrain\.batch_size is 0"):
        config.validate()
