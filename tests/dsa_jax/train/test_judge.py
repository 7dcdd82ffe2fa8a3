"""The advice on a loss or an update that is not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import Config
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.metrics import MetricsLog
from dsa_jax.train.judge import Judge, NotFiniteError
from dsa_jax.train.stages import stage_of


def advice(tmp_path, step, *, policy="stop", stage="pretrain", in_a_row=1, **metrics):
    config = Config()
    config.train.nan_policy, config.train.max_skipped_steps = policy, 1
    judge = Judge(RunDirectory(tmp_path, resumed=False), stage_of(config, stage), config, MetricsLog(None), None, {})
    values = {"is_finite": False, "skipped_in_a_row": in_a_row, "grad_norm": np.nan} | metrics
    with pytest.raises(NotFiniteError) as caught:
        judge.take(step, {name: jnp.asarray(value) for name, value in values.items()})
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "metrics"),
    [
        ("pretrain", {"loss": np.nan}),
        ("pretrain", {"loss": np.inf}),
        ("warmup", {"kl_layers": [0.5, np.nan]}),
    ],
)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_no_update_has_made(policy, stage, metrics, tmp_path):
    said = advice(tmp_path, 1, policy=policy, stage=stage, **metrics)
    assert "before the first update" in said and "Check the scales" in said
    assert "Lower train." not in said


@pytest.mark.parametrize(
    ("step", "metrics"),
    [(1, {"loss": 2.0}), (2, {"loss": np.nan}), (7, {"kl_layers": [np.nan]})],
    ids=["an update beyond float32", "after an update", "after updates"],
)
def test_the_learning_rate_is_named_where_it_can_be_the_cause(step, metrics, tmp_path):
    said = advice(tmp_path, step, **metrics)
    assert "Lower train.pretrain.optimizer.learning_rate" in said
    assert "before the first update" not in said
