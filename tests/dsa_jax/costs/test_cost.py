import numpy as np
import pytest

from configs import deepseek_v32, llama3_8b
from dsa_jax.config import ConfigError
from dsa_jax.costs.model import (
    H800_REPORT,
    active_weights,
    cache_bytes_per_token,
    dollars_per_million_tokens,
    kind_costs,
    pays_from,
    training_flops_per_token,
)
from dsa_jax.costs.report import PUBLISHED_DOLLARS, PUBLISHED_POSITIONS, cost_tables, format_costs, plot_costs


@pytest.fixture(scope="module")
def v32():
    return deepseek_v32.get_config().model


@pytest.mark.parametrize(("phase", "attention"), PUBLISHED_DOLLARS)
def test_curves_of_the_report(v32, phase, attention):
    """Within 2 percent at 32K, 64K, 96K and 128K as at every other position that was read off."""
    ours = dollars_per_million_tokens(v32, PUBLISHED_POSITIONS, phase=phase, attention=attention, rates=H800_REPORT)
    np.testing.assert_allclose(ours, PUBLISHED_DOLLARS[phase, attention], rtol=0.02)


def test_flops_of_v32_by_hand(v32):
    expanded, absorbed, score = kind_costs(v32)
    assert (expanded.forward_flops, absorbed.forward_flops) == (2 * 128 * (192 + 128), 2 * 128 * (576 + 512))
    assert (expanded.backward_flops, absorbed.logit_flops, score) == (
        2 * 128 * (3 * 192 + 2 * 128),
        2 * 128 * 576,
        2 * 64 * 128,
    )
    assert 36e9 < active_weights(v32).model < 37e9
    # wq_b, wk and weights_proj in each of the 61 layers
    assert active_weights(v32).indexers == 61 * (1536 * 64 * 128 + 7168 * 128 + 7168 * 64)


def test_flops_of_grouped_query_attention():
    model = llama3_8b.get_config().model
    expanded, absorbed, _ = kind_costs(model)
    assert expanded == absorbed and expanded.forward_flops == 4 * 32 * 128
    assert expanded.backward_flops == 2.5 * expanded.forward_flops


def test_cache_bytes(v32):
    """656 and 132 bytes per layer in fp8; 1152 and 256 in bfloat16; 2 x 8 heads of 128 for Llama."""
    assert cache_bytes_per_token(v32, "fp8", "dense") == 61 * 656
    assert cache_bytes_per_token(v32, "fp8", "sparse") == 61 * (656 + 132)
    assert cache_bytes_per_token(v32, "bfloat16", "sparse") == 61 * (1152 + 256)
    assert cache_bytes_per_token(llama3_8b.get_config().model, "bfloat16", "dense") == 32 * 2 * 8 * 128 * 2


def test_training_flops(v32):
    """Dense grows with length without bound, sparse only by its scores; the difference at topk tokens is overhead."""
    long, short = 131072, 2048
    dense, sparse = (training_flops_per_token(v32, long, a) for a in ("dense", "sparse"))
    assert sparse < dense / 1.5
    assert training_flops_per_token(v32, short, "sparse") > training_flops_per_token(v32, short, "dense")
    per_key = 2 * 128 * ((192 + 128) + (3 * 192 + 2 * 128))  # forward, and backward with its logits recomputed
    assert training_flops_per_token(v32, 2 * long, "dense") - dense == 61 * long / 2 * per_key
    grown = training_flops_per_token(v32, 2 * long, "sparse") - sparse
    # Scores of the added visible keys, and the first rows' shorter selections weighing half as much.
    assert grown == pytest.approx(61 * long / 2 * 16384, rel=0.05)


def test_pays_from_is_for_good():
    assert pays_from([1.0, 3.0, 3.0, 9.0], [2.0, 2.0, 4.0, 4.0], [0, 10, 20, 30]) == 30
    assert pays_from([1.0, 1.0], [2.0, 2.0], [0, 10]) is None


def test_tables_and_plot(v32, tmp_path):
    tables = cost_tables(v32, H800_REPORT, 131072)
    text = format_costs(tables)
    assert "0.6655" in text and "131,072" in text
    assert 2048 <= tables["pays_from"]["decode"] <= 8192
    plot_costs(tables, "v32", tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    v32.attention.indexer.enabled, v32.attention.mode = False, "dense"
    with pytest.raises(ConfigError, match="indexer"):
        cost_tables(v32, H800_REPORT, 131072)
