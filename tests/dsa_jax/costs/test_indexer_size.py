"""How many index heads pay, and from which length, against the costs themselves."""

import pytest

from configs import qwen3_8b
from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig
from dsa_jax.costs.indexer_size import MOST_HEADS, paying_heads, pays_from_length, with_index_heads
from dsa_jax.costs.model import forward_flops_per_token


def model(hidden, heads, topk=64, head_dim=16, kind="gqa"):
    indexer = IndexerConfig(enabled=True, n_heads=0, head_dim=head_dim, rope_dim=8, topk=topk)
    attention = AttentionConfig(kind=kind, n_heads=heads, n_kv_heads=heads, head_dim=32, indexer=indexer)
    return ModelConfig(hidden_dim=hidden, attention=attention, max_positions=2**20)


def excess(config, heads, length):
    """FLOPs that sparse attention takes beyond dense."""
    of = lambda attention: forward_flops_per_token(with_index_heads(config, heads), length, attention)
    return of("sparse") - of("dense")


@pytest.mark.parametrize("length", [64, 200, 256, 1024, 8192])
@pytest.mark.parametrize("config", [model(64, 2), model(256, 8), model(64, 4, topk=16, kind="mla")], ids=["2", "8", "mla"])
def test_no_more_than_pays_and_no_fewer(config, length):
    heads = paying_heads(config, length)
    assert heads in (1, 2, 4, 8, 16)
    assert heads == 1 or excess(config, heads, length) <= 0
    assert heads == MOST_HEADS or excess(config, 2 * heads, length) > 0


def test_nothing_pays_up_to_topk():
    assert paying_heads(model(256, 8, topk=512), 512) == 1
    assert excess(model(256, 8, topk=512), 1, 512) > 0


def test_by_hand():
    """One layer of one head: 4 x 32 x (S - K) saved, 2 x 16 x S and twice the projections' weights paid, per index head."""
    config = model(64, 1, topk=1)
    config.n_layers = 1
    length, seen = 1023, 512
    price = lambda heads: 2 * heads * 16 * seen + 2 * 64 * (heads * 16 + 16 + heads)
    saved = 4 * 32 * (seen - 1)
    assert excess(config, 4, length) == pytest.approx(price(4) - saved)
    assert price(2) < saved < price(4) and paying_heads(config, length) == 2


def test_the_first_length_that_pays():
    config = with_index_heads(model(256, 8), 4)
    start = pays_from_length(config)
    assert excess(config, 4, start) < 0 <= excess(config, 4, start - 1)
    assert pays_from_length(with_index_heads(model(64, 1, head_dim=64), 16)) is None


def test_of_a_real_model():
    config = qwen3_8b.get_config().model
    config.attention.indexer.head_dim = 128
    assert [paying_heads(config, length) for length in (2048, 4096, 8192, 32768)] == [1, 4, 16, 16]
