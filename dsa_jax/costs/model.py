"""What attention costs, analytically: FLOPs, cache bytes and rental dollars per token, dense and sparse, by position.

One multiply-add is two FLOPs. Latent attention is counted in its cheaper form: expanded per head in prefill and training,
absorbed in decode and wherever keys are selected. Nothing here is measured; `Rates` says what speeds are assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.model import abstract_params, build_model
from dsa_jax.model.attention.kinds import is_of_own_mode
from dsa_jax.params import is_indexer_path, parameter_paths
from pallas_kernels.quantize import latent_row_bytes, vector_row_bytes

PHASES = ("prefill", "decode")
ATTENTIONS = ("dense", "sparse")
N_POINTS = 512
"""Steps from the first to the last position of a curve."""
_BY_PHASE = ("linear", "dense", "index", "sparse")


class KeyFlops(NamedTuple):
    """FLOPs of one query and key in one layer: `expanded` and `absorbed` attention over all heads, and the index `score`."""

    expanded: float
    absorbed: float
    score: float


class Weights(NamedTuple):
    """Numbers of parameters that a token multiplies with: `model` without its indexers, and the `indexers`."""

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
(640 TFLOP/s sparse prefill, 410 sparse decode, 660 dense decode) publish is. `linear` counts bf16 FLOPs of fp8 products.
"""


def require_indexer(config: ModelConfig) -> None:
    """Make sure that there is sparse attention to compare with dense attention.

    Raises:
        ConfigError: when the model has no indexer.
    """
    if not config.attention.indexer.enabled:
        raise ConfigError("the model has no indexer, so there is no sparse cost. Set model.attention.indexer.enabled=True.")


def key_flops(config: ModelConfig) -> KeyFlops:
    """FLOPs per query, key and layer, from the shape of the model."""
    attention, indexer = config.attention, config.attention.indexer
    index = 2.0 * indexer.n_heads * indexer.head_dim if indexer.enabled else 0.0
    if attention.kind == "gqa":
        each = 4.0 * attention.n_heads * attention.head_dim
        return KeyFlops(each, each, index)
    per_head = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    latent = 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    return KeyFlops(2.0 * attention.n_heads * per_head, 2.0 * attention.n_heads * latent, index)


def active_weights(config: ModelConfig) -> Weights:
    """Parameters that one token multiplies with: matrices, of experts the chosen ones; no table that is only looked up.

    Native sparse attention's own are left out, as its cost is not modelled.
    """
    model = build_model(config)
    shapes = parameter_paths(abstract_params(model))
    moe = config.moe
    totals = {True: 0.0, False: 0.0}
    for path, leaf in shapes.items():
        if is_of_own_mode(path):  # neither dense nor sparse attention multiplies with it
            continue
        is_matrix = path.endswith("/kernel") or (path == "embed/embedding" and config.tie_embeddings)
        if is_matrix:
            share = moe.n_experts_per_token / moe.n_routed_experts if "/experts/" in path else 1.0
            totals[is_indexer_path(path)] += share * leaf.size
    return Weights(totals[False], totals[True])


def n_indexers(config: ModelConfig) -> int:
    """Layers with an indexer of their own."""
    return sum(layer.has_indexer for layer in config.layers())


def cache_bytes_per_token(config: ModelConfig, dtype: str, attention: str) -> float:
    """Bytes that one token occupies in the cache of all layers.

    Args:
        config: the model.
        dtype: "bfloat16", "float32", or "fp8": e4m3 with one float32 scale per 128 latent channels, per key or value vector and
            per index key; the rotated channels of a latent stay bfloat16.
        attention: "sparse" adds the index keys.
    """
    shape, indexer = config.attention, config.attention.indexer
    if dtype == "fp8":
        index = vector_row_bytes(indexer.head_dim)
        latent = latent_row_bytes(shape.kv_lora_rank, shape.qk_rope_head_dim)
        heads = 2 * shape.n_kv_heads * vector_row_bytes(shape.head_dim)
    else:
        width = {"bfloat16": 2, "float32": 4}[dtype]
        index = width * indexer.head_dim
        latent = width * (shape.kv_lora_rank + shape.qk_rope_head_dim)
        heads = width * 2 * shape.n_kv_heads * shape.head_dim
    per_layer = latent if shape.kind == "mla" else heads
    return float(config.n_layers * per_layer + (n_indexers(config) * index if attention == "sparse" else 0))


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
    per_key = key_flops(config)
    if attention == "dense":
        each = per_key.expanded if phase == "prefill" else per_key.absorbed
        return config.n_layers * position * each / (rates.dense[phase] * 1e12)
    scores = n_indexers(config) * position * per_key.score
    selected = config.n_layers * min(position, config.attention.indexer.topk) * per_key.absorbed
    by_selection = scores / (rates.index[phase] * 1e12) + selected / (rates.sparse[phase] * 1e12)
    if phase == "decode":
        return by_selection
    return min(by_selection, (scores + config.n_layers * position * per_key.expanded) / (rates.masked * 1e12))


def forward_flops_per_token(config: ModelConfig, length: int, attention: str) -> float:
    """FLOPs of one token's forward pass in a causal sequence of `length` tokens, on average; keys are selected absorbed."""
    weights, per_key = active_weights(config), key_flops(config)
    if attention == "dense":
        return 2.0 * weights.model + config.n_layers * (length + 1) / 2 * per_key.expanded
    scores = n_indexers(config) * (length + 1) / 2 * per_key.score
    selected = config.n_layers * mean_selected(config, length) * per_key.absorbed
    return 2.0 * (weights.model + weights.indexers) + scores + selected


def mean_selected(config: ModelConfig, length: int) -> float:
    """Keys that a query attends to, on average over a causal sequence of `length` tokens."""
    topk = min(config.attention.indexer.topk, length)
    return topk * (length - (topk - 1) / 2) / length


def training_flops_per_token(config: ModelConfig, length: int, attention: str) -> float:
    """FLOPs of one training token, forward and backward, in a causal sequence of `length` tokens, on average.

    Weights count three times (forward, gradient of the input, gradient of the weight), attention 3.5 times (its backward
    recomputes the logits), and sparse training adds the scores of every visible key, forward, and for the selected ones the
    attention logits of the KL's target and the backward of their scores.
    """
    weights, per_key = active_weights(config), key_flops(config)
    visible = (length + 1) / 2
    if attention == "dense":
        return 6.0 * weights.model + 3.5 * config.n_layers * visible * per_key.expanded
    selected = mean_selected(config, length)
    n_targets = config.n_layers if config.attention.indexer.distill_shared else n_indexers(config)
    target = n_targets * selected * (per_key.absorbed / 2 + 3.0 * per_key.score)
    scores = n_indexers(config) * visible * per_key.score
    return 6.0 * (weights.model + weights.indexers) + 3.5 * config.n_layers * selected * per_key.absorbed + scores + target


def pays_from(dense: Sequence[float], sparse: Sequence[float], positions: Sequence[int]) -> int | None:
    """The first position from which sparse stays below dense; None if it never does."""
    for i, position in enumerate(positions):
        if all(s < d for s, d in zip(sparse[i:], dense[i:], strict=True)):
            return position
    return None
