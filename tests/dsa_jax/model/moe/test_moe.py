"""Mixture of experts: routing by hand, the grouped product, the layer against a sum over all experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ModelConfig, MoEConfig
from dsa_jax.config.fields import frozen
from dsa_jax.model.moe.grouped_matmul import grouped_matmul
from dsa_jax.model.moe.moe import MoE
from dsa_jax.model.moe.router import Routing, expert_load, route, updated_score_bias

PLAIN = MoEConfig(n_experts_per_token=2, scoring="sigmoid")


@pytest.mark.parametrize("implementation", ["tiles", "ragged_dot"])
@pytest.mark.parametrize("sizes", [[3, 0, 20, 1, 0], [0, 0, 0, 0, 24], [300, 0, 0, 140, 7]])
def test_grouped_matmul_and_its_gradients_equal_the_reference(implementation, sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (sum(sizes), 6))
    kernels = jax.random.normal(keys[1], (len(sizes), 6, 10))
    cotangent = jax.random.normal(keys[2], (sum(sizes), 10))

    def run(implementation):
        out, pull = jax.vjp(
            lambda x, kernels: grouped_matmul(x, kernels, jnp.array(sizes, jnp.int32), implementation=implementation),
            x,
            kernels,
        )
        return out, *pull(cotangent)

    for actual, expected in zip(run(implementation), run("reference"), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_grouped_matmul_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="'dense'; expected one of reference, tiles, ragged_dot"):
        grouped_matmul(jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2], jnp.int32), implementation="dense")


def test_the_bias_moves_the_choice_and_not_the_weights():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    plain, biased = route(logits, None, PLAIN), route(logits, bias, PLAIN)
    assert plain.experts[0].tolist() == [0, 1] and biased.experts[0].tolist() == [3, 0]
    scores = jax.nn.sigmoid(logits[0])
    np.testing.assert_allclose(biased.weights[0], jnp.array([scores[3], scores[0]]) / (scores[3] + scores[0]), rtol=1e-6)
    gradient = jax.grad(lambda bias: route(logits, bias, PLAIN).weights[0, 0])(bias)
    assert np.all(np.asarray(gradient) == 0)


def test_groups_are_limited_by_the_sum_of_their_best_two_or_by_their_best():
    # Groups {0, 1}, {2, 3}, {4, 5}: the second has the best expert, the first the best pair.
    logits = jnp.array([[1.0, 1.0, 1.5, -3.0, 0.0, -2.0]])
    grouped = dataclasses.replace(PLAIN, n_groups=3)
    assert route(logits, None, grouped).experts[0].tolist() == [0, 1]
    assert route(logits, None, dataclasses.replace(grouped, group_score="max")).experts[0].tolist() == [2, 3]
    assert sorted(route(logits, None, dataclasses.replace(grouped, topk_groups=2)).experts[0].tolist()) == [0, 2]


def test_softmax_routing_without_normalisation_keeps_the_probabilities():
    logits = jnp.array([[1.0, 3.0, 2.0]])
    softmax = dataclasses.replace(PLAIN, scoring="softmax", normalize_weights=False, routed_scale=2.0)
    routing = route(logits, None, softmax)
    assert routing.experts[0].tolist() == [1, 2]
    np.testing.assert_allclose(routing.weights[0], 2 * jax.nn.softmax(logits[0])[jnp.array([1, 2])], rtol=1e-6)


def test_load_by_hand_ignores_padding_and_averages_rows():
    # Row 0: two valid tokens, both to expert 0. Row 1: one valid token to expert 1. Row 2: padding only.
    experts = jnp.array([0, 0, 1, 0, 1, 1], jnp.int32)[:, None]
    scores = jnp.array([[0.6, 0.2], [0.5, 0.5], [9.0, 0.0], [0.0, 9.0], [0.2, 0.6], [9.0, 0.0]])
    order = jnp.array([0, 1, 4, 2, 3, 5])
    valid = jnp.array([[True, True], [True, False], [False, False]])
    load = expert_load(Routing(jnp.ones((3, 2, 1)), experts[order].reshape(3, 2, 1), scores[order].reshape(3, 2, -1)), valid)
    assert load.expert_counts.tolist() == [2, 1]
    # f * P: row 0 has f = (2, 0) and P[0] = (0.75 + 0.5) / 2, row 1 has f = (0, 2) and P[1] = 0.75.
    np.testing.assert_allclose(load.balance_loss, (2 * 0.625 + 2 * 0.75) / 2, rtol=1e-6)


def test_the_bias_update_raises_the_idle_and_lowers_the_busy():
    bias, counts = jnp.array([[0.0, 0.5, 0.1]]), jnp.array([[9.0, 0.0, 4.5]])
    np.testing.assert_allclose(updated_score_bias(bias, counts, 0.01), [[-0.01, 0.51, 0.1]], rtol=1e-6)


def test_the_layer_equals_a_sum_over_all_experts():
    n_experts, hidden_dim, expert_dim = 6, 12, 8
    options = MoEConfig(
        n_routed_experts=n_experts, n_experts_per_token=2, n_shared_experts=1, expert_dim=expert_dim, n_groups=3, topk_groups=2,
        routed_scale=2.5,
    )  # fmt: skip
    layer = MoE(frozen(ModelConfig(hidden_dim=hidden_dim, initializer_range=0.5, moe=options)))
    x = jax.random.normal(jax.random.key(0), (2, 7, hidden_dim))
    valid = jnp.ones((2, 7), bool)
    params = layer.init(jax.random.key(1), x, valid)["params"]
    params["router"]["score_bias"] = jnp.linspace(-0.3, 0.3, n_experts)

    def naive(params, x):
        flat = x.reshape(-1, hidden_dim)
        routing = route(flat @ params["router"]["kernel"], params["router"]["score_bias"], options)
        gates = jnp.zeros((len(flat), n_experts)).at[jnp.arange(len(flat))[:, None], routing.experts].set(routing.weights)
        out = swiglu({name: kernel["kernel"] for name, kernel in params["shared"].items()}, flat)
        for e in range(n_experts):
            out += gates[:, e, None] * swiglu({name: kernel["kernel"][e] for name, kernel in params["experts"].items()}, flat)
        return out.reshape(x.shape)

    def swiglu(kernels, x):
        return (jax.nn.silu(x @ kernels["gate"]) * (x @ kernels["up"])) @ kernels["down"]

    probe = jax.random.normal(jax.random.key(2), x.shape)

    def run(f):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(f(p, x) * probe), argnums=(0, 1)))(params, x)

    actual, expected = run(lambda p, x: layer.apply({"params": p}, x, valid).out), run(naive)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), actual, expected)
