"""Frequencies by literal values, rotation by its defining properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.model.rope import (
    inverse_frequencies,
    rotary_magnitude,
    rotate,
    softmax_scale_factor,
    yarn_mscale,
    yarn_ramp,
)
from tests.dsa_jax.model.small import small_rope

V32 = small_rope(dim=64, layout="interleaved", scaling="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0)


def test_yarn_of_deepseek_v32_has_the_published_ramp_and_temperature():
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    scaled = inverse_frequencies(V32)
    assert yarn_ramp(V32) == (10, 23)
    np.testing.assert_allclose(scaled[:11], plain[:11], rtol=1e-6)
    np.testing.assert_allclose(scaled[23:], plain[23:] / 40, rtol=1e-6)
    keep = 1 - (15 - 10) / 13
    np.testing.assert_allclose(scaled[15], plain[15] * (keep + (1 - keep) / 40), rtol=1e-6)
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.36889, abs=1e-5)
    assert rotary_magnitude(V32) == 1.0
    assert 192**-0.5 * softmax_scale_factor(V32) == pytest.approx(0.135234, abs=1e-6)


def test_a_ramp_that_ends_before_it_begins_is_as_published_code_has_it():
    """4 positions: even the fastest pair turns less than once, so that the last of the ramp, -5, lies before its first, 0."""
    rope = small_rope(dim=64, scaling="yarn", factor=40.0, original_max_positions=4)
    assert yarn_ramp(rope) == (0, -1)
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(inverse_frequencies(rope), plain, rtol=1e-6)


def test_an_attention_factor_replaces_the_temperature_of_the_rotation():
    assert rotary_magnitude(V32._replace(config=dataclasses.replace(V32.config, attention_factor=1.25))) == 1.25


def test_yarn_without_mscale_all_dim_puts_the_temperature_on_the_rotation():
    rope = small_rope(dim=64, scaling="yarn", factor=40.0)
    assert rotary_magnitude(rope) == pytest.approx(1.36889, abs=1e-5)
    assert softmax_scale_factor(rope) == 1.0


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
    rope = small_rope(dim=128, theta=500000.0, scaling="llama3", factor=8.0, original_max_positions=8192)
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    turns = 8192 * plain / (2 * np.pi)
    scaled = inverse_frequencies(rope)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    i = int(np.flatnonzero((turns > 1) & (turns < 4))[0])
    smooth = (turns[i] - 1) / 3
    np.testing.assert_allclose(scaled[i], (1 - smooth) * plain[i] / 8 + smooth * plain[i], rtol=1e-6)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_rotation_by_one_radian_by_hand(layout):
    # theta = 1 turns every pair by one radian per position; position 0 must not move anything.
    rope = small_rope(dim=4, layout=layout, theta=1.0)
    x = jnp.array([1.0, 3.0, 4.0, 2.0]).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 1), jnp.int32), rope), x)
    y = rotate(x, jnp.ones((1, 1), jnp.int32), rope)[0, 0, 0]
    cos, sin = np.cos(1.0), np.sin(1.0)
    a, b, c, d = 1.0, 3.0, 4.0, 2.0
    expected = {
        "half_split": [a * cos - c * sin, b * cos - d * sin, c * cos + a * sin, d * cos + b * sin],
        "interleaved": [a * cos - b * sin, b * cos + a * sin, c * cos - d * sin, d * cos + c * sin],
    }[layout]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_dot_products_depend_on_distance_only(layout):
    rope = small_rope(dim=16, layout=layout)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    dots = [jnp.sum(rotate(q, jnp.array([[p + 7]]), rope) * rotate(k, jnp.array([[p]]), rope)) for p in (0, 5, 300)]
    np.testing.assert_allclose(dots, dots[0], rtol=1e-4)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="expected none, yarn or llama3"):
        inverse_frequencies(small_rope(dim=8, scaling="ntk"))
    with pytest.raises(ValueError, match="expected one of half_split, interleaved"):
        rotate(jnp.ones((1, 1, 1, 8)), jnp.ones((1, 1), jnp.int32), small_rope(dim=8, layout="neox"))
