"""The recipes for one GPU, configs/h200_code_8k.py and its continuation, at the size for a CPU."""

import pytest

from dsa_jax.retrofit import retrofit
from experiments.recipes import load_config
from tests.dsa_jax.conftest import compile_quickly

__all__ = ["compile_quickly"]  # two models and three stages each: most of the time is compilation


@pytest.mark.slow
def test_dense_extend_retrofit_evaluate(tmp_path):
    first, second = (load_config(f"configs/h200_code_{name}.py:small") for name in ("8k", "32k"))
    for config in (first, second):
        config.train.pretrain.steps = 3
        config.eval.rows = ("dense", "sparse")
    report = retrofit(first, tmp_path / "first")
    assert [row["name"] for row in report["rows"]] == ["dense, before sparse training", "dense", "sparse"]
    assert set(report["rows"][0]["tasks"]) == {"multi_needle", "passkey"}
    assert len(report["loss_by_position"]["positions"]) == 4

    second.init.checkpoint = str(tmp_path / "first")
    assert second.init.stage == "pretrain" and second.eval.text_len == 4 * first.eval.text_len
    longer = retrofit(second, tmp_path / "second")
    assert set(longer["stages"]) == {"pretrain", "warmup", "sparse", "evaluate"}
    assert longer["rows"][-1]["keys_per_query"] < longer["rows"][-2]["keys_per_query"]
