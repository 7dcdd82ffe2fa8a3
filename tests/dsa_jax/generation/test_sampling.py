"""The nucleus by hand, and draws that follow the distribution and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.generation.sampling import greedy_token, nucleus, row_keys, sample_token

PROBABILITY = jnp.array([[0.125, 0.5, 0.25, 0.125]])


def number(x, dtype=jnp.float32):
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.0, [0, 1, 0, 0]),  # what is left of 1e-50 in float32
        (0.01, [0, 1, 0, 0]),
        (0.5, [0, 1, 0, 0]),
        (0.51, [0, 1, 1, 0]),
        (0.75, [0, 1, 1, 0]),
        (0.8, [1, 1, 1, 0]),  # 0 and 3 are equally likely: the lower id comes first
        (1.0, [1, 1, 1, 1]),
    ],
)
def test_the_nucleus_is_the_smallest_set_with_the_mass(top_p, kept):
    np.testing.assert_array_equal(nucleus(PROBABILITY, number(top_p))[0], np.array(kept, bool))


def test_greedy_takes_the_lower_of_equal_tokens():
    assert greedy_token(jnp.array([[0.0, 3.0, 3.0], [-jnp.inf, -5.0, -jnp.inf]])).tolist() == [1, 1]


def test_draws_follow_the_tempered_distribution_inside_the_nucleus():
    n = 4000
    logits = jnp.broadcast_to(jnp.log(PROBABILITY[0]), (n, 4))
    keys = row_keys(number(7, jnp.uint32), number(0, jnp.int32), n)

    def shares(temperature, top_p, top_k=0):
        drawn = sample_token(logits, keys, number(temperature), None if top_p is None else number(top_p), top_k)
        return np.bincount(drawn, minlength=4) / n

    # 0.03 is four standard deviations of a share of one half.
    np.testing.assert_allclose(shares(1.0, None), PROBABILITY[0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.75), [0, 2 / 3, 1 / 3, 0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, None, 3), [1 / 7, 4 / 7, 2 / 7, 0], atol=0.03)  # of 0 and 3 the lower
    np.testing.assert_allclose(shares(1.0, 0.6, 2), [0, 1, 0, 0])  # two thirds of what is left
    np.testing.assert_allclose(shares(1.0, 0.7, 2), [0, 2 / 3, 1 / 3, 0], atol=0.03)
    np.testing.assert_allclose(shares(1.0, None, 9), PROBABILITY[0], atol=0.03)
    squared = PROBABILITY[0] ** 2
    np.testing.assert_allclose(shares(0.5, None), squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 0.0])  # 1e-40 is no normal number, 0.0 what float32 leaves of 1e-50
def test_the_smallest_temperatures_take_the_largest_logit(temperature, top_p):
    logits = jnp.broadcast_to(jnp.array([-jnp.inf, 30.0, -400.0, 31.0, 20.0]), (50, 5))
    keys = row_keys(number(3, jnp.uint32), number(0, jnp.int32), len(logits))
    drawn = sample_token(logits, keys, number(temperature), None if top_p is None else number(top_p))
    assert set(drawn.tolist()) == {3}


def test_a_row_draws_from_seed_row_and_step_alone():
    keys = lambda seed, step, n: jax.random.key_data(row_keys(number(seed, jnp.uint32), number(step, jnp.int32), n))
    np.testing.assert_array_equal(keys(1, 5, 4)[:2], keys(1, 5, 2))
    everything = np.concatenate([keys(seed, step, 4) for seed in (1, 2) for step in (0, 1)])
    assert len(np.unique(everything, axis=0)) == 16
