import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsa_jax.config import ConfigError, OptimizerConfig
from dsa_jax.train.optimizer import learning_rate_schedule, make_optimizer

PARAMS = {
    "embed": {"embedding": jnp.ones((6, 4))},
    "layers": {"mlp": {"up": {"kernel": jnp.ones((3, 4, 5))}}, "norm": {"scale": jnp.ones((3, 4))}},
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1.0, 2.0, 2.0, 2.0]), ("linear", [1.0, 2.0, 1.5, 1.0]), ("cosine", [1.0, 2.0, 1.5, 1.0])],
)
def test_schedule_at_steps_0_2_5_8(schedule, expected):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=2, final_fraction=0.5)
    rate = learning_rate_schedule(config, 8)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 5, 8)], expected, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate_schedule(OptimizerConfig(learning_rate=0.1, warmup_steps=0), 10)(0) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_moves_matrices_only(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["layers"]["mlp"]["up"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0.0)


def test_what_muon_leaves_alone_moves_as_under_adamw():
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)

    def moved(name):
        optimizer = make_optimizer(OptimizerConfig(name=name, clip_norm=0.0, weight_decay=0.1), 10)
        state, params = optimizer.init(PARAMS), PARAMS
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    muon, adamw = moved("muon"), moved("adamw")
    np.testing.assert_array_equal(muon["embed"]["embedding"], adamw["embed"]["embedding"])
    np.testing.assert_array_equal(muon["layers"]["norm"]["scale"], adamw["layers"]["norm"]["scale"])
    assert not np.allclose(muon["layers"]["mlp"]["up"]["kernel"], adamw["layers"]["mlp"]["up"]["kernel"])


def test_muon_orthogonalises_each_stacked_matrix():
    config = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=0.0)
    optimizer = make_optimizer(config, 10)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    for matrix in updates["layers"]["mlp"]["up"]["kernel"]:
        singular = np.linalg.svd(matrix, compute_uv=False)
        # Newton-Schulz brings singular values near 1 (0.7 to 1.2), times 0.2 sqrt(5) from the RMS matching.
        assert singular.min() / (0.2 * 5**0.5) > 0.6 and singular.max() / (0.2 * 5**0.5) < 1.3


def test_clipping_bounds_the_gradient_before_the_update():
    grads = jax.tree.map(lambda p: 100.0 * jnp.ones_like(p), PARAMS)
    size = lambda clip: float(
        jnp.abs(
            make_optimizer(OptimizerConfig(eps=1.0, clip_norm=clip, warmup_steps=0), 10).update(
                grads, make_optimizer(OptimizerConfig(eps=1.0, clip_norm=clip, warmup_steps=0), 10).init(PARAMS), PARAMS
            )[0]["embed"]["embedding"]
        ).max()
    )
    assert size(0.01) < 0.01 * size(0.0)


WITH_INDEXER = PARAMS | {
    "attention": {"indexer": {"wk": {"kernel": jnp.ones((3, 4, 5))}, "k_norm": {"scale": jnp.ones((3, 4))}}}
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_indexers_have_a_rate_a_decay_and_a_bound_of_their_own(name):
    """Each group moves as it would alone; the large gradient of the other does not shrink it."""
    config = OptimizerConfig(name=name, learning_rate=0.01, warmup_steps=0, schedule="constant", clip_norm=1.0, eps=1e-2)
    config.indexer_learning_rate, config.indexer_weight_decay = 0.2, 0.3
    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(2), p.shape), WITH_INDEXER)
    grads["layers"] = jax.tree.map(lambda g: 1e6 * g, grads["layers"])
    together, _ = moved_once(config, grads, WITH_INDEXER)
    indexer = {"attention": WITH_INDEXER["attention"]}
    own = OptimizerConfig(name=name, learning_rate=0.2, warmup_steps=0, schedule="constant", weight_decay=0.3, eps=1e-2)
    alone, _ = moved_once(own, {"attention": grads["attention"]}, indexer)
    jax.tree.map(np.testing.assert_array_equal, together["attention"], alone["attention"])
    rest = {key: value for key, value in grads.items() if key != "attention"}
    plain = OptimizerConfig(name=name, learning_rate=0.01, warmup_steps=0, schedule="constant", eps=1e-2)
    without, _ = moved_once(plain, rest, PARAMS)
    for key in rest:
        jax.tree.map(np.testing.assert_array_equal, together[key], without[key])


def moved_once(config, grads, params):
    optimizer = make_optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(params), params)


def test_a_decay_of_indexers_without_their_rate_is_refused():
    with pytest.raises(ConfigError, match=r"indexer_weight_decay is 0\.1 without"):
        OptimizerConfig(indexer_weight_decay=0.1).validate("train.sparse.optimizer")


@pytest.mark.parametrize(
    ("name", "b1", "b2"), [("adamw", 0.9, 0.999), ("adamw", 0.9, 0.9999), ("adamw", 0.999, 0.95), ("muon", 0.9, 0.999)]
)
def test_moments_of_bfloat16_parameters_are_those_of_float32(name, b1, b2):
    """3000 steps of gradients that keep their size: in bfloat16 a moment that decays by 0.999 stops at about a quarter."""
    options = {"learning_rate": 1e-9, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    optimizer = make_optimizer(OptimizerConfig(name=name, b1=b1, b2=b2, **options), 3000)
    signs = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.8, (3000, 4, 5)), 1.0, -1.0).astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        params = {"up": {"kernel": jnp.ones((4, 5), dtype)}}

        def step(state, signs):
            updates, state = optimizer.update({"up": {"kernel": signs.astype(dtype)}}, state, params)
            return state, updates["up"]["kernel"]

        return jax.lax.scan(step, optimizer.init(params), signs)

    narrow, wide = run(jnp.bfloat16), run(jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    assert {x.dtype for x in jax.tree.leaves(narrow[0]) if x.ndim} == {jnp.dtype("float32")}


def test_float32_parameters_get_the_updates_of_optax():
    config = OptimizerConfig(schedule="constant", warmup_steps=0, clip_norm=0.0, b2=0.999, weight_decay=0.1)
    mask = {"embed": {"embedding": True}, "layers": {"mlp": {"up": {"kernel": True}}, "norm": {"scale": False}}}
    ours = make_optimizer(config, 10)
    theirs = optax.adamw(3e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, mask=mask)
    states, grads = [ours.init(PARAMS), theirs.init(PARAMS)], jax.tree.map(lambda p: 0.3 * p, PARAMS)
    assert len(jax.tree.leaves(states[0])) == len(jax.tree.leaves(states[1])) + 1  # the schedule counts its steps
    for _ in range(3):
        results = [o.update(grads, state, PARAMS) for o, state in zip((ours, theirs), states, strict=True)]
        states = [state for _, state in results]
        jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])
