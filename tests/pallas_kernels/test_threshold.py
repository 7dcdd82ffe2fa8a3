"""The threshold selection against a stable sort, on rows made to be difficult."""

import jax
import numpy as np
import pytest

from pallas_kernels.common.topk import largest_by_threshold

WIDTH = 256
TINY = float(np.finfo(np.float32).tiny)


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((12, WIDTH)).astype(np.float32)
    hard = [
        np.zeros(WIDTH),  # one tie over the whole row
        np.where(normal[0] > 1, normal[0], 0),  # a zero plateau at the boundary
        np.where(normal[1] > 1.5, 0, -1),  # two values
        np.full(WIDTH, -np.inf),  # nothing visible
        np.where(np.arange(WIDTH) < 3, normal[2], -np.inf),  # fewer than topk visible
        np.where(np.arange(WIDTH) % 2, normal[3], -np.inf),
        np.full(WIDTH, np.finfo(np.float32).min),  # the lowest finite number counts as visible
        np.where(np.arange(WIDTH) == 200, np.finfo(np.float32).max, np.finfo(np.float32).min),
        np.where(normal[4] > 0, np.inf, -1),  # infinite scores
        np.where(normal[5] > 0, TINY, -TINY),
        np.sort(normal[6]),
        np.sort(normal[7])[::-1],
        np.repeat(normal[8][: WIDTH // 8], 8),  # ties of eight
    ]
    return np.concatenate([normal, np.stack(hard).astype(np.float32)])


@pytest.mark.parametrize("topk", [1, 7, 64, 255, WIDTH])
def test_equals_a_stable_sort(topk):
    ranked = rows()
    order = np.argsort(-ranked, axis=-1, kind="stable")[:, :topk]
    visible = np.take_along_axis(ranked, order, -1) > -np.inf
    want = np.sort(np.where(visible, order, WIDTH), axis=-1)
    np.testing.assert_array_equal(jax.jit(largest_by_threshold, static_argnums=1)(ranked, topk), want)
