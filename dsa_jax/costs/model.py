"""FLOPs, KV cache bytes and rental dollars per token of a model, dense and sparse, by position, from formulas.

Operations are counted per op by `dsa_jax.costs.ops`. Latent attention is counted in its cheaper form: expanded per head in
prefill and training, absorbed in decode and wherever keys are selected. Nothing here is measured; `Rates` holds the speeds that
are assumed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.costs.kinds import KindCosts, gqa_costs, mla_costs
from dsa_jax.costs.ops import kl_flops
from dsa_jax.model import Transformer, abstract_params, build_model
from dsa_jax.params import is_indexer_path, is_nsa_path, parameter_paths

PHASES = ("prefill", "decode")
ATTENTIONS = ("dense", "sparse")
N_POINTS = 512
"""Steps from the first to the last position of a curve."""
_BY_PHASE = ("linear", "dense", "index", "sparse")


class Weights(NamedTuple):
    """Parameters that a token multiplies with: `model` without its indexers, and the `indexers`."""

    model: float
    indexers: float


@dataclass(frozen=True)
class Rates:
    """Sustained speeds in TFLOP/s and a price. `linear` is everything whose cost does not grow with the position.

    `masked` is dense attention with a mask at the selection plus the indexer, which prefill uses while it is the cheaper form.
    """

    linear: dict[tuple[str, str], float]  # (phase, attention)
    dense: dict[str, float]  # phase
    index: dict[str, float]
    sparse: dict[str, float]
    masked: float
    dollars_per_hour: float = 2.0

    def faster(self, factor: float) -> "Rates":
        """The same, `factor` times as fast in everything."""
        scaled: dict[str, Any] = {
            name: {key: factor * value for key, value in getattr(self, name).items()} for name in _BY_PHASE
        }
        return replace(self, masked=factor * self.masked, **scaled)


H800_REPORT = Rates(
    linear={
        ("prefill", "dense"): 769.3,
        ("prefill", "sparse"): 666.0,
        ("decode", "dense"): 577.2,
        ("decode", "sparse"): 427.9,
    },
    dense={"prefill": 594.0, "decode": 594.0},
    index={"prefill": 792.0, "decode": 693.0},
    sparse={"prefill": 567.0, "decode": 398.0},
    masked=549.0,
)
"""Speeds at which this model reproduces figure 3 of the DeepSeek-V3.2-Exp report, H800 at 2 dollars an hour.

Fitted to that figure, hence agreement with it is no test of them; that they lie near the speeds which the READMEs of FlashMLA
(640 TFLOP/s sparse prefill, 410 sparse decode, 660 dense decode) publish is. `linear` counts bf16 FLOPs of fp8 matmuls.
"""


def require_indexer(config: ModelConfig) -> None:
    """Make sure that there is sparse attention to compare with dense attention.

    Raises:
        ConfigError: when the model has no indexer.
    """
    if not config.attention.indexer.enabled:
        raise ConfigError("the model has no indexer, so there is no sparse cost. Set model.attention.indexer.enabled=True.")


def kind_costs(config: ModelConfig) -> KindCosts:
    """Work of one attention layer per query and key."""
    return {"gqa": gqa_costs, "mla": mla_costs}[config.attention.kind](config.attention)


def active_weights(config: ModelConfig) -> Weights:
    """Parameters that one token multiplies with: matrices, of experts the chosen ones; no table that is only looked up.

    Native sparse attention's own are left out, as its cost is not modelled.
    """
    moe = config.moe
    return _active_weights(build_model(config), moe.n_experts_per_token / moe.n_routed_experts if moe.n_routed_experts else 1.0)


@functools.lru_cache(maxsize=8)
def _active_weights(model: Transformer, expert_share: float) -> Weights:
    totals = {True: 0.0, False: 0.0}
    for path, leaf in parameter_paths(abstract_params(model)).items():
        if is_nsa_path(path):  # neither dense nor sparse attention multiplies with it
            continue
        if path.endswith("/kernel") or (path == "embed/embedding" and model.tie_embeddings):
            totals[is_indexer_path(path)] += (expert_share if "/experts/" in path else 1.0) * leaf.size
    return Weights(totals[False], totals[True])


def n_indexers(config: ModelConfig) -> int:
    """Layers with an indexer of their own."""
    indexer = config.attention.indexer
    if not indexer.enabled:
        return 0
    return indexer.layer_types.count("full") if indexer.layer_types else config.n_layers


def cache_bytes_per_token(config: ModelConfig, dtype: str, attention: str) -> float:
    """Bytes that one token occupies in the KV cache of all layers.

    Args:
        config: the model.
        dtype: of the cache, "bfloat16", "float32" or "fp8".
        attention: "sparse" adds the index keys.
    """
    model = build_model(config)
    cache = jax.eval_shape(lambda: model.init_cache(1, 1, dtype=dtype, with_index_keys=attention == "sparse"))
    return float(cache.n_bytes)


def dollars_per_million_tokens(
    config: ModelConfig, positions: Sequence[int], *, phase: str, attention: str, rates: Rates
) -> list[float]:
    """Rental cost of a million tokens at each position; a token at position p sees p keys.

    Sparse prefill takes the cheaper of its two forms, dense attention under a mask and absorbed attention to the selection.
    """
    linear = 2.0 * active_weights(config).model / (rates.linear[phase, attention] * 1e12)
    seconds = (linear + _attention_seconds(config, p, phase, attention, rates) for p in positions)
    return [each * 1e6 * rates.dollars_per_hour / 3600.0 for each in seconds]


def _attention_seconds(config: ModelConfig, position: int, phase: str, attention: str, rates: Rates) -> float:
    costs = kind_costs(config)
    if attention == "dense":
        heads = costs.expanded if phase == "prefill" else costs.absorbed
        return config.n_layers * position * heads.forward_flops / (rates.dense[phase] * 1e12)
    scores = n_indexers(config) * position * costs.score
    selected = config.n_layers * min(position, config.attention.indexer.topk) * costs.absorbed.forward_flops
    by_selection = scores / (rates.index[phase] * 1e12) + selected / (rates.sparse[phase] * 1e12)
    if phase == "decode":
        return by_selection
    return min(by_selection, (scores + config.n_layers * position * costs.expanded.forward_flops) / (rates.masked * 1e12))


def forward_flops_per_token(config: ModelConfig, length: int, attention: str) -> float:
    """FLOPs of one token's forward pass in a causal sequence of `length` tokens, on average; keys are selected absorbed."""
    weights, costs = active_weights(config), kind_costs(config)
    if attention == "dense":
        return 2.0 * weights.model + config.n_layers * (length + 1) / 2 * costs.expanded.forward_flops
    scores = n_indexers(config) * (length + 1) / 2 * costs.score
    selected = config.n_layers * mean_selected(config, length) * costs.absorbed.forward_flops
    return 2.0 * (weights.model + weights.indexers) + scores + selected


def mean_selected(config: ModelConfig, length: int) -> float:
    """Keys that a query attends to, on average over a causal sequence of `length` tokens."""
    topk = min(config.attention.indexer.topk, length)
    return topk * (length - (topk - 1) / 2) / length


def training_flops_per_token(config: ModelConfig, length: int, attention: str) -> float:
    """FLOPs of one training token, forward and backward, in a causal sequence of `length` tokens, on average.

    Weights count three times (forward, gradient of the input, gradient of the weight), attention as its forward and backward
    pass. Sparse training adds the index scores of every visible key, forward, and the KL over the selected ones.
    """
    weights, costs = active_weights(config), kind_costs(config)
    visible = (length + 1) / 2
    if attention == "dense":
        heads = costs.expanded
        return 6.0 * weights.model + config.n_layers * visible * (heads.forward_flops + heads.backward_flops)
    selected, heads = mean_selected(config, length), costs.absorbed
    n_targets = config.n_layers if config.attention.indexer.distill_shared else n_indexers(config)
    kl = n_targets * selected * kl_flops(heads, costs.score)
    scores = n_indexers(config) * visible * costs.score
    attend = config.n_layers * selected * (heads.forward_flops + heads.backward_flops)
    return 6.0 * (weights.model + weights.indexers) + attend + scores + kl


def pays_from(dense: Sequence[float], sparse: Sequence[float], positions: Sequence[int]) -> int | None:
    """The first position from which sparse stays below dense; None if it never does."""
    for i, position in enumerate(positions):
        if all(s < d for s, d in zip(sparse[i:], dense[i:], strict=True)):
            return position
    return None
