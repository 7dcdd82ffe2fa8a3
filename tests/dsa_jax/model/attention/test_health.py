"""Health of a selection: literal cases, NumPy on random ones, and what a model reports by layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.model.attention.health import n_choosing, selection_health
from dsa_jax.model.attention.visibility import causal_visibility
from pallas_kernels import IndexHeads
from tests.dsa_jax.model.small import LENGTH, built, forward, random_ids

NONE = [[[-1, -1]] * 4]


def health(selected, neighbour=NONE, segments=((1, 1, 1, 1),), hidden=None, heads=None):
    visible = causal_visibility(jnp.asarray(segments))
    hidden = jnp.zeros((*np.shape(segments), 3)) if hidden is None else jnp.asarray(hidden)
    selected, neighbour = (jnp.asarray(x, jnp.int32) for x in (selected, neighbour))
    return selection_health(selected, neighbour, visible, hidden, heads, topk=2)


def test_only_queries_with_a_choice_count():
    # Queries 0 and 1 see two keys at most; 2 and 3 choose.
    first = [[[0, -1], [0, 1], [0, 1], [0, 1]]]
    before = [[[0, -1], [0, 1], [1, 2], [2, 3]]]
    result = health(first, before)
    assert float(result.local_share) == pytest.approx((1 / 2 + 0) / 2)  # the last two keys are 1, 2 and 2, 3
    assert float(result.overlap) == pytest.approx((1 / 2 + 0) / 2)
    # Positions 0 and 1 twice each, of four that are seen.
    assert float(result.entropy) == pytest.approx(np.log(2) / np.log(4))
    assert float(result.n_not_finite) == 0
    np.testing.assert_allclose(health(before, before).overlap, 1.0)
    np.testing.assert_allclose(health(before, first).local_share, 1.0)


def test_without_a_choice_a_selection_or_a_neighbour_there_is_no_number():
    some = [[[0, -1], [0, 1], [0, 1], [0, 1]]]
    assert np.isnan(health(some).overlap) and np.isfinite(health(some).entropy)
    assert np.all(np.isnan(health(NONE, some)[:3]))
    for segments in ([[1, 1, 2, 2]], [[1, 1, 0, 0]], [[0, 0, 0, 0]]):
        assert np.all(np.isnan(health(some, some, segments)[:3]))
        assert int(n_choosing(causal_visibility(jnp.asarray(segments)), 2)) == 0


def test_values_that_are_not_finite_are_counted_by_query_and_not_at_padding():
    hidden = np.zeros((1, 4, 3), np.float32)
    hidden[0, 1, 2], hidden[0, 2], hidden[0, 3] = np.nan, np.inf, np.nan
    assert float(health(NONE, hidden=hidden, segments=[[1, 1, 1, 0]]).n_not_finite) == 2
    heads = IndexHeads(jnp.zeros((1, 4, 2, 3)), jnp.zeros((1, 4, 3)).at[0, 0, 1].set(jnp.nan), jnp.zeros((1, 4, 2)))
    assert float(health(NONE, heads=heads).n_not_finite) == 1
    heads = heads._replace(weights=heads.weights.at[0, 1].set(-jnp.inf))
    assert float(health(NONE, heads=heads).n_not_finite) == 2


def test_random_selections_in_packed_rows_equal_numpy():
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 3, [1] * 7 + [0]])
    visible = causal_visibility(jnp.asarray(segments))
    start, end = (np.asarray(x) for x in visible)
    draw = lambda b, t: np.sort(rng.permutation(np.arange(start[b, t], end[b, t]))[:2])
    pad = lambda keys: [*keys, *[-1] * (2 - len(keys))]
    selected, neighbour = ([[pad(draw(b, t)) for t in range(8)] for b in range(2)] for _ in range(2))
    chosen = [(b, t) for b in range(2) for t in range(8) if end[b, t] - start[b, t] > 2]
    keys = lambda selection, b, t: set(selection[b][t]) - {-1}
    overlap = [len(keys(selected, *q) & keys(neighbour, *q)) / 2 for q in chosen]
    local = [np.mean([key >= end[q] - 2 for key in keys(selected, *q)]) for q in chosen]
    entropies = []
    for b, _ in chosen:
        counts = np.bincount([key for q in chosen if q[0] == b for key in keys(selected, *q)], minlength=8)
        share = counts[counts > 0] / counts.sum()
        seen = {key for q in chosen if q[0] == b for key in range(start[q], end[q])}
        entropies.append(-(share * np.log(share)).sum() / np.log(len(seen)))
    result = health(selected, neighbour, segments)
    np.testing.assert_allclose(result[:3], [np.mean(entropies), np.mean(local), np.mean(overlap)], rtol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_reports_every_layer_from_the_pass_that_measures_coverage(scan):
    model, params = built("gqa", layer_types=("full", "shared", "dense", "full"), scan_layers=scan)
    out = forward(model, params, random_ids(), attention="sparse", everything=True)
    assert out.health.entropy.shape == (4,)
    np.testing.assert_array_equal(np.isnan(out.health.overlap), [True, False, True, True])
    np.testing.assert_array_equal(np.isnan(out.health.entropy), [False, False, True, False])
    assert float(out.health.overlap[1]) == 1.0 and not np.any(out.health.n_not_finite)
    assert np.all(np.asarray(out.health.local_share)[[0, 1, 3]] <= 1)
    window = forward(model, params, random_ids(), attention="window", everything=True)
    np.testing.assert_allclose(np.asarray(window.health.local_share)[[0, 1, 3]], 1.0)
    np.testing.assert_allclose(np.asarray(window.health.overlap)[1], 1.0)
    assert model.config.attention.indexer.topk < LENGTH
    assert forward(model, params, random_ids(), attention="sparse").health is None
    assert forward(model, params, random_ids(), attention="dense", everything=True).health is None
