"""The verdict on a recipe: from a config.json alone, on the recipes of Qwen3-8B, and against hand calculation."""

import json

import pytest

from configs import retrofit_hf, retrofit_qwen3_8b
from dsa_jax.checkpoints.from_hf import resolve_checkpoint
from dsa_jax.config import ConfigError
from dsa_jax.costs.model import training_flops_per_token, warmup_flops_per_token
from dsa_jax.dryrun import Assumed, Machine, format_verdict, judge, parse_machine
from tests.dsa_jax.train.tiny import tiny_config
from tests.experiments.commands import ROOT

QWEN3_8B = ROOT / "tests" / "fixtures" / "configs" / "qwen3_8b"
ONE, EIGHT = Machine(1, 80.0), Machine(8, 80.0)


def fits(verdict, machine):
    return {name: stage["fits"] for name, stage in verdict["machines"][machine.words]["stages"].items()}


def test_a_config_alone_is_judged():
    config = retrofit_hf.get_config()
    config.init.hf_dir = str(QWEN3_8B)
    config = resolve_checkpoint(config, platform="gpu")
    config.validate()
    assert config.model.attention.indexer.n_heads == 16 and config.model.dtype == "bfloat16"
    verdict = judge(config, [ONE, EIGHT], Assumed())
    assert fits(verdict, ONE) == {"warmup": True, "sparse": False} and all(fits(verdict, EIGHT).values())
    # 8.19e9 parameters and the indexers: float32 parameters, and a gradient and two moments of each.
    whole = verdict["machines"][ONE.words]["stages"]["sparse"]
    assert whole["parameters"] == pytest.approx(4 * 8.514e9, rel=1e-3) and whole["optimizer"] == pytest.approx(
        8 * 8.514e9, rel=1e-3
    )
    text = format_verdict(verdict, config)
    assert "1 GPU of 80 GB (one device): DOES NOT FIT: sparse" in text and "8 GPUs of 80 GB (fsdp 8): fits" in text
    assert "mfu=0.35" in text and "dollars_per_gpu_hour=2.50" in text and "pays from 7,653 tokens on" in text
    json.dumps(verdict)


@pytest.mark.parametrize(("arg", "machine"), [("", EIGHT), ("1gpu", ONE)])
def test_recipes_fit_what_they_are_for(arg, machine):
    config = retrofit_qwen3_8b.get_config(arg)
    config.validate()
    verdict = judge(config, [machine], Assumed())
    assert all(fits(verdict, machine).values()) and fits(verdict, machine)
    tokens = {name: stage["tokens"] for name, stage in verdict["stages"].items()}
    expected = {"warmup": 100e6} if arg else {"warmup": 2.1e9, "sparse": 20e9}
    assert tokens == {name: pytest.approx(n, rel=0.01) for name, n in expected.items()}
    with pytest.raises(ValueError, match="expected none, or '1gpu'"):
        retrofit_qwen3_8b.get_config("2gpu")


def test_hours_and_dollars_by_hand():
    config = tiny_config("gqa")
    config.train.pretrain.steps, config.train.pretrain.curriculum = 10, ((4, 8),)
    stages = judge(config, [ONE], Assumed(mfu=0.5, dollars_per_gpu_hour=3.0, peak_tflops=2.0))["stages"]
    rows, length = config.train.pretrain.batch_size, config.train.pretrain.seq_len
    flops = rows * sum(n * each * training_flops_per_token(config.model, each, "dense") for n, each in ((4, 8), (6, length)))
    assert stages["pretrain"]["tokens"] == rows * (4 * 8 + 6 * length)
    assert stages["pretrain"]["gpu_hours"] == pytest.approx(flops / 1e12 / 3600)
    assert stages["pretrain"]["dollars"] == pytest.approx(3 * flops / 1e12 / 3600)
    warmup = config.train.warmup
    tokens = warmup.steps * warmup.batch_size * warmup.seq_len
    assert stages["warmup"]["flops"] == pytest.approx(tokens * warmup_flops_per_token(config.model, warmup.seq_len))
    # Cheaper than training the whole model, dearer than half of a forward pass.
    assert warmup_flops_per_token(config.model, 64) < training_flops_per_token(config.model, 64, "sparse")


def test_what_is_assumed_follows_the_dtype_and_the_attention():
    config = tiny_config("gqa")
    assert judge(config, [], Assumed())["assumed"]["peak_tflops"] == 67
    config.model.dtype = "bfloat16"
    assert judge(config, [], Assumed())["assumed"]["peak_tflops"] == 788
    config.train.sparse_attention = "window"
    verdict = judge(config, [], Assumed())
    assert verdict["stages"]["sparse"]["gpu_hours"] is None
    assert "no formula for its attention" in format_verdict(verdict, config)


def test_a_batch_that_machines_cannot_split_is_said_with_its_remedy():
    config = tiny_config("gqa")
    config.train.warmup.batch_size, config.train.pretrain.batch_size, config.train.sparse.batch_size = 4, 8, 8
    verdict = judge(config, [EIGHT, Machine(3, 1e-3)], Assumed())
    assert "--config.train.warmup.batch_size=8" in verdict["machines"][EIGHT.words]["error"]
    assert "cannot be split" in format_verdict(verdict, config)


@pytest.mark.parametrize("text", ["80", "8x", "x80", "0x80", "8x0", "8 x 80", "8x80GB"])
def test_machines_that_are_none(text):
    assert parse_machine("2x141.5") == Machine(2, 141.5)
    with pytest.raises(ConfigError, match="such as 8x80"):
        parse_machine(text)
