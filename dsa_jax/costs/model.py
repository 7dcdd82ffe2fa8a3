"""FLOPs, KV cache bytes and rental dollars per token of a model, dense and sparse, by position, from formulas.

Operations are counted per op by `dsa_jax.costs.ops`. Latent attention is counted in its cheaper form: expanded per head in
prefill and training, absorbed in decode and wherever keys are selected. Nothing here is measured; `Rates` holds the speeds that
are assumed.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.config.attention import FULL, SHARED, WINDOW
from dsa_jax.costs.kinds import KindCosts
from dsa_jax.costs.ops import HeadSizes, kl_flops
from dsa_jax.model import Transformer, abstract_params, build_model
from dsa_jax.model.attention.kinds import attention_kind, is_of_own_mode
from dsa_jax.params import is_indexer_path, parameter_paths

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
    """Work of one attention layer of the model's kind per query and key."""
    return attention_kind(config.attention.kind).costs(config.attention)


class AttentionWork(NamedTuple):
    """FLOPs of one query in all layers: `dense` where it reads every visible key or a window, `selected` where topk keys."""

    dense: float
    selected: float


def attention_work(
    config: ModelConfig,
    attention: str,
    form: str,
    seen: float | int,
    kept: Callable[[int], float],
    flops: Callable[[HeadSizes], float] = lambda heads: heads.forward_flops,
) -> AttentionWork:
    """Attention of every layer by its role and kind.

    Args:
        config: the model.
        attention: "dense" or "sparse".
        form: of heads that are not selected for, a field of `KindCosts`: "expanded" or "absorbed".
        seen: visible keys of a query.
        kept: keys of a query that reads at most so many.
        flops: of one query and key.
    """
    dense = selected = 0.0
    for (kind, role), n in Counter((layer.kind, layer.role) for layer in config.layers()).items():
        costs = attention_kind(kind).costs(config.attention)
        if attention == "sparse" and role in (FULL, SHARED):
            selected += n * kept(config.attention.indexer.topk) * flops(costs.absorbed)
        else:
            dense += n * (kept(config.attention.window) if role == WINDOW else seen) * flops(getattr(costs, form))
    return AttentionWork(dense, selected)


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
        if is_of_own_mode(path):  # neither dense nor sparse attention multiplies with it
            continue
        if path.endswith("/kernel") or (path == "embed/embedding" and model.config.tie_embeddings):
            totals[is_indexer_path(path)] += (expert_share if "/experts/" in path else 1.0) * leaf.size
    return Weights(totals[False], totals[True])


def n_indexers(config: ModelConfig) -> int:
    """Layers with an indexer of their own."""
    return sum(layer.has_indexer for layer in config.layers())


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
    form, kept = "expanded" if phase == "prefill" else "absorbed", lambda most: min(position, most)
    work = attention_work(config, attention, form, position, kept)
    if attention == "dense":
        return work.dense / (rates.dense[phase] * 1e12)
    scores = n_indexers(config) * position * kind_costs(config).score
    by_selection = scores / (rates.index[phase] * 1e12) + work.selected / (rates.sparse[phase] * 1e12)
    by_selection += work.dense / (rates.dense[phase] * 1e12)
    if phase == "decode":
        return by_selection
    masked = attention_work(config, "dense", form, position, kept).dense
    return min(by_selection, (scores + masked) / (rates.masked * 1e12))


def forward_flops_per_token(config: ModelConfig, length: int, attention: str) -> float:
    """FLOPs of one token's forward pass in a causal sequence of `length` tokens, on average; keys are selected absorbed."""
    weights = active_weights(config)
    work = attention_work(config, attention, "expanded", (length + 1) / 2, lambda most: mean_kept(most, length))
    if attention == "dense":
        return 2.0 * weights.model + work.dense
    scores = n_indexers(config) * (length + 1) / 2 * kind_costs(config).score
    return 2.0 * (weights.model + weights.indexers) + scores + work.selected + work.dense


def mean_kept(most: int, length: int) -> float:
    """Keys that a query reads, at most so many, on average over a causal sequence of `length` tokens."""
    most = min(most, length)
    return most * (length - (most - 1) / 2) / length


def training_flops_per_token(config: ModelConfig, length: int, attention: str) -> float:
    """FLOPs of one training token, forward and backward, in a causal sequence of `length` tokens, on average.

    Weights count three times (forward, gradient of the input, gradient of the weight), attention as its forward and backward
    pass. Sparse training adds the index scores of every visible key, forward, and the KL over the selected ones.
    """
    weights, costs, visible = active_weights(config), kind_costs(config), (length + 1) / 2
    kept = lambda most: mean_kept(most, length)
    both = lambda heads: heads.forward_flops + heads.backward_flops
    work = attention_work(config, attention, "expanded", visible, kept, both)
    if attention == "dense":
        return 6.0 * weights.model + work.dense
    roles = [layer.role for layer in config.layers()]
    taught = (FULL, SHARED) if config.attention.indexer.distill_shared else (FULL,)
    n_targets = sum(role in taught for role in roles)
    kl = n_targets * kept(config.attention.indexer.topk) * kl_flops(costs.absorbed, costs.score)
    scores = n_indexers(config) * visible * costs.score
    return 6.0 * (weights.model + weights.indexers) + work.selected + work.dense + scores + kl


def warmup_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of one token of the indexer's warm-up, in a causal sequence of `length` tokens, on average.

    The frozen model's forward pass under dense attention up to its last layer, without the head; the indexers' weights three
    times, an upper bound since no gradient reaches their input; and the KL over every visible key.
    """
    weights, costs, visible = active_weights(config), kind_costs(config), (length + 1) / 2
    work = attention_work(config, "dense", "expanded", visible, lambda most: mean_kept(most, length))
    head = config.vocab_size * config.hidden_dim
    kl = n_indexers(config) * visible * kl_flops(costs.expanded, costs.score)
    return 2.0 * (weights.model - head) + 6.0 * weights.indexers + work.dense + kl


def pays_from(dense: Sequence[float], sparse: Sequence[float], positions: Sequence[int]) -> int | None:
    """The first position from which sparse stays below dense; None if it never does."""
    for i, position in enumerate(positions):
        if all(s < d for s, d in zip(sparse[i:], dense[i:], strict=True)):
            return position
    return None
