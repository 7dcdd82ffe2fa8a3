"""The selections that need no training: what they pick, by hand and by property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.config import AttentionConfig, IndexerConfig
from dsa_jax.model.attention.selection import Choice, choose, rule_of, share_held
from pallas_kernels import IndexHeads, Visible

LENGTH, BLOCK_KEYS = 64, 16
_KEYS = jax.random.split(jax.random.key(0), 3)
INDEX = IndexHeads(
    jax.random.normal(_KEYS[0], (1, LENGTH, 2, 8)),
    jax.random.normal(_KEYS[1], (1, LENGTH, 8)),
    jax.random.normal(_KEYS[2], (1, LENGTH, 2)),
)


def pick(name, start, end, topk):
    """Indices of every query; `start` and `end` are lists of LENGTH numbers."""
    start, end = (jnp.asarray([x], jnp.int32) for x in (start, end))
    indexer = IndexerConfig(topk=topk, coarse_block_size=BLOCK_KEYS, coarse_blocks=1)
    config = AttentionConfig(indexer=indexer, implementation="reference")
    return np.asarray(rule_of(name).select(Choice(config, Visible(start, end), INDEX))[0])


@pytest.mark.parametrize("name", ["window", "sink_window", "random", "blocks", "sparse", "coarse_to_fine"])
def test_a_budget_beyond_the_keys_is_theirs(name):
    """`choose` keeps as many slots as there are keys, with what topk = keys selects; blocks need the budget that was asked."""
    start, end = (jnp.asarray([x], jnp.int32) for x in causal(3))
    least, most = (
        choose(rule_of(name), Choice(config, Visible(start, end), INDEX, n_keys=LENGTH))
        for topk in (LENGTH, 10**6)
        for config in [AttentionConfig(indexer=IndexerConfig(topk=topk, coarse_block_size=BLOCK_KEYS, coarse_blocks=9))]
    )
    np.testing.assert_array_equal(most, least)
    assert most.shape == (1, LENGTH, LENGTH)


def causal(start=0):
    return [start] * LENGTH, [max(t + 1, start) for t in range(LENGTH)]


def test_sink_and_window():
    rows = pick("sink_window", *causal(), 6)
    assert rows[3].tolist() == [0, 1, 2, 3, -1, -1]
    assert rows[20].tolist() == [0, 1, 2, 3, 19, 20]
    assert pick("sink_window", *causal(10), 6)[20].tolist() == [10, 11, 12, 13, 19, 20]
    assert pick("sink_window", *causal(), 2)[20].tolist() == [0, 1]


def test_own_block_is_always_in():
    rows = pick("blocks", *causal(), 2 * BLOCK_KEYS)
    assert rows[BLOCK_KEYS - 1].tolist() == [*range(BLOCK_KEYS), *[-1] * BLOCK_KEYS]
    for t in (BLOCK_KEYS, 40, 63):
        own = range(t // BLOCK_KEYS * BLOCK_KEYS, t + 1)
        others = [key for key in rows[t] if 0 <= key < own[0]]
        assert set(own) < set(rows[t].tolist())
        assert len(others) == BLOCK_KEYS and others[0] % BLOCK_KEYS == 0 and others[-1] == others[0] + BLOCK_KEYS - 1


def test_blocks_follow_the_index_score_of_their_mean_key():
    t, pooled = 63, INDEX.k[0].reshape(-1, BLOCK_KEYS, 8).mean(axis=1)
    scores = np.asarray((jax.nn.relu(INDEX.q[0, t] @ pooled.T) * INDEX.weights[0, t, :, None]).sum(0))
    best = int(scores[: t // BLOCK_KEYS].argmax())
    assert pick("blocks", *causal(), 2 * BLOCK_KEYS)[t][0] == best * BLOCK_KEYS


@pytest.mark.parametrize("name", ["window", "sink_window", "random", "blocks", "coarse_to_fine"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), topk=st.sampled_from([1, 5, 16, 40, 80]))
def test_every_selection_is_canonical_and_within_its_budget(name, data, topk):
    """Ascending, distinct, visible, -1 last; everything where the budget covers it (blocks: a multiple of the block)."""
    bounds = [sorted(data.draw(st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)))) for _ in range(LENGTH)]
    start, end = zip(*bounds, strict=True)
    for row, a, b in zip(pick(name, list(start), list(end), topk), start, end, strict=True):
        kept = row[row >= 0]
        assert row.shape == (topk,) and (row[: len(kept)] == kept).all()
        assert (np.diff(kept) > 0).all() and ((kept >= a) & (kept < b)).all()
        if name == "blocks":
            assert b == a or b - 1 in kept
        elif name != "coarse_to_fine" or b - a <= BLOCK_KEYS:
            assert len(kept) == min(topk, b - a)


def test_share_of_wanted_keys_that_are_held():
    wanted = jnp.asarray([[[0, 3, 7, -1], [1, 2, 3, 4], [-1, -1, -1, -1], [5, 6, -1, -1]]], jnp.int32)
    kept = jnp.asarray([[[0, 7, 9], [0, 5, -1], [-1, -1, -1], [-1, -1, -1]]], jnp.int32)
    np.testing.assert_allclose(share_held(kept, wanted)[0], [2 / 3, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(share_held(wanted, wanted), 1.0)


def test_random_keys_are_spread_over_the_range():
    """Eight stretches of 2 to 8 keys: anywhere in a stretch about as often, and by other draws for every query."""
    rows = pick("random", *causal(), 8)
    lengths = np.arange(2, LENGTH // 8 + 1)
    offsets = np.stack([rows[8 * length - 1] - length * np.arange(8) for length in lengths])
    assert (offsets >= 0).all() and (offsets < lengths[:, None]).all()
    assert 0.4 < ((offsets + 0.5) / lengths[:, None]).mean() < 0.6
    assert len({tuple(row) for row in offsets.tolist()}) == len(lengths)
