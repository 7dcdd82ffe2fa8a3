"""Steps that are traced before a run begins: what cannot be computed is one line, and the trace is used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import rehearsal
from dsa_jax.config import ConfigError
from dsa_jax.data import make_eval_data
from dsa_jax.evals.parity import evaluate_parity, rehearsed_rows
from dsa_jax.model import build_model, init_params
from dsa_jax.rehearsal import rehearse
from dsa_jax.train.loop import rehearsed_steps
from dsa_jax.train.stages import SPARSE, WARMUP
from tests.dsa_jax.train.tiny import tiny_config

SMALL = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def too_large(x):
    return (x[:, None] @ jnp.ones((8, 2**40)))[0, 0, :1]


def in_a_loop(x):
    return jax.lax.scan(lambda carry, _: (carry, jnp.sort(jnp.broadcast_to(x[0, 0], (2**36,)))[:1]), x, length=3)[1]


def refused(kind, message):
    def step(x):
        raise kind(message)

    return step


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (too_large, r"an array \[4, 1, 1099511627776\] has 17592\.2 GB, and the devices have"),
        (in_a_loop, r"an array \[68719476736\] has 274\.9 GB"),
        (refused(NotImplementedError, "pallas: there is no GPU.\nmore"), r"pallas: there is no GPU\."),
        (refused(ValueError, "topk is 1000000000"), r"topk is 1000000000\."),
        (refused(ImportError, "needs the jax-triton package"), r"needs the jax-triton package\."),
    ],
    ids=["memory", "memory-in-a-loop", "implementation", "setting", "package"],
)
def test_a_step_that_cannot_be_computed_is_one_line(step, message):
    with pytest.raises(ConfigError, match=rf"^the row 'sparse' cannot be computed: {message}"):
        rehearse("the row 'sparse'", jax.jit(step), SMALL)


def test_what_the_compiler_fuses_takes_no_memory():
    rehearse("a mask", jax.jit(lambda x: jnp.where(jnp.arange(2**40) > 3, 1.0, 0.0).sum() + x.sum()), SMALL)


def test_a_rehearsed_step_is_not_traced_again():
    traced = []
    step = jax.jit(lambda x: (traced.append(1), x + 1)[1])
    rehearse("a step", step, SMALL)
    step(np.ones((4, 8), np.float32))
    step(jnp.ones((4, 8)))
    assert len(traced) == 1


def test_an_implementation_that_is_not_installed_is_found_before_training():
    config = tiny_config()
    config.model.attention.implementation = "index_topk=triton"
    with pytest.raises(
        ConfigError, match=r"a step of stage sparse \(train\.sparse\.batch_size 4, 16 tokens\) cannot be computed: "
    ):
        rehearsed_steps(build_model(config.model), [SPARSE], config)


def test_the_table_is_found_wanting_before_training(monkeypatch):
    config = tiny_config()
    config.eval.rows, config.eval.recall_sequences, config.eval.batch_size = ("sparse",), 10**6, 10**6
    monkeypatch.setattr(rehearsal, "memory_bytes", lambda: 10**9)
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    message = (
        r"the row 'dense, before sparse training' \(eval\.batch_size 1000000, 1000000 rows of 16 tokens\) cannot be computed"
    )
    with pytest.raises(ConfigError, match=message):
        rehearsed_rows(build_model(config.model), data, config)


def test_a_batch_has_no_more_rows_than_there_are(monkeypatch):
    """Six sequences, a batch of a billion rows: one batch of six, the same values as in batches of four."""
    config = tiny_config()
    config.eval.rows = ("window",)
    config.train.sparse.steps = 0
    model = build_model(config.model)
    params = init_params(model, jax.random.key(0))
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    small = evaluate_parity(model, params, data, config).rows
    config.eval.batch_size = 10**9
    steps = rehearsed_rows(model, data, config)
    (row,) = evaluate_parity(model, params, data, config, steps=steps).rows
    assert row["recall_accuracy"] == small[0]["recall_accuracy"]
    assert row["coverage"] == pytest.approx(small[0]["coverage"], abs=1e-6)


def test_every_length_of_a_stage_is_traced():
    config, seen = tiny_config(), []
    config.train.warmup.curriculum = ((2, 8),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsa_jax.train.loop.rehearse", lambda what, step, state, batch: seen.append(batch.input_ids.shape))
        assert list(rehearsed_steps(build_model(config.model), [WARMUP], config)) == ["warmup"]
    assert seen == [(4, 8), (4, 16)]
