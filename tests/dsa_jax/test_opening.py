"""The first line of the commands."""

import pytest

from configs import quickstart
from dsa_jax.benchmarks.train_step import recipe
from dsa_jax.checkpoints.convert import to_hf, to_run
from dsa_jax.config import ParallelConfig
from dsa_jax.model import abstract_params, build_model
from dsa_jax.opening import opening_line, opening_of
from dsa_jax.params import count_parameters, is_indexer_path, split_parameters
from dsa_jax.retrofit import retrofit
from dsa_jax.run.files import RunError
from tests.dsa_jax.train.tiny import tiny_config
from tests.experiments.commands import ROOT


def test_all_of_it_in_one_line():
    config = tiny_config("gqa")
    config.parallel.preset, config.model.dtype = "fsdp4_tp2", "bfloat16"
    params = abstract_params(build_model(config.model))
    whole, indexers = count_parameters(params), count_parameters(split_parameters(params, is_indexer_path)[0])
    assert opening_of(config) == (
        f"8 x cpu; mesh fsdp 4 x tensor 2; parameters float32, computed in bfloat16; {whole:,} parameters, "
        f"trained in pretrain {whole - indexers:,}, in warmup {indexers:,}, in sparse {whole:,}"
    )


def test_a_cpu_says_why_it_leaves_the_dtype_of_the_checkpoint():
    model = tiny_config("gqa").model
    assert "computed in float32 (on a CPU, which emulates bfloat16); " in opening_line(model, dtype="checkpoint")
    assert "emulates" not in opening_line(model, dtype="float32")


def test_what_does_not_train_counts_no_stage_and_a_benchmark_no_parameters():
    line = opening_line(quickstart.get_config().model, ParallelConfig("tp2"))
    assert "mesh tensor 2" in line and line.endswith(" parameters")
    assert opening_line(None) == "8 x cpu; no mesh, one device computes; dtypes and sizes as in each row"
    assert "trained in sparse" in opening_of(recipe(64, 16))


def test_a_retrofit_prints_it_first(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        retrofit(tiny_config(), tmp_path / "run")
    assert capsys.readouterr().out.startswith("8 x cpu; ")


def test_a_conversion_says_what_it_read(tmp_path):
    models = []
    to_run(ROOT / "tests" / "fixtures" / "hf" / "qwen3", tmp_path / "run", opened=models.append)
    to_hf(tmp_path / "run", tmp_path / "hf", opened=models.append)
    assert [model.family for model in models] == ["qwen3", "qwen3"]
