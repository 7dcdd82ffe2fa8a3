"""From a config to a model and its first parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dsa_jax.config import IndexerConfig, ModelConfig
from dsa_jax.config.implementations import parse_implementations
from dsa_jax.model.attention.gqa import GQA
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.model.attention.mla import MLA
from dsa_jax.model.attention.nsa import NSA
from dsa_jax.model.attention.selection import Budget
from dsa_jax.model.block import Block
from dsa_jax.model.mlp import MLP
from dsa_jax.model.moe.moe import MoE
from dsa_jax.model.rope import rope_from_config
from dsa_jax.model.stacks import LayerStack, layer_stacks
from dsa_jax.model.transformer import BlockStack, Transformer
from dsa_jax.parallel.ambient import no_mesh
from dsa_jax.parallel.placement import hold
from pallas_kernels import BlockGeometry, ForcedKeys


def build_model(config: ModelConfig) -> Transformer:
    """The transformer that `config` describes. It holds no parameters; equal configs give equal (and hashable) models.

    Raises:
        ConfigError: from `config.validate()`.
    """
    config.validate()
    stacks = tuple(
        BlockStack(name=s.name, n_layers=s.n_layers, shares_topk=s.indexer == "shared", block=_block(config, s))
        for s in layer_stacks(config)
    )
    return Transformer(
        vocab_size=config.vocab_size,
        hidden_dim=config.hidden_dim,
        stacks=stacks,
        topk=config.attention.indexer.topk,
        has_indexer=config.attention.indexer.enabled,
        distill_shared=config.attention.indexer.enabled and config.attention.indexer.distill_shared,
        has_nsa=config.attention.nsa.enabled,
        default_attention=config.attention.mode,
        tie_embeddings=config.tie_embeddings,
        embedding_init_std=config.embedding_initializer_range,
        init_std=config.initializer_range,
        logits_scale=config.logits_scale,
        norm_eps=config.norm_eps,
        remat=config.remat,
        scan_layers=config.scan_layers,
        parent=None,
        **_dtypes(config),
    )


def init_params(model: Transformer, key: PRNGKeyArray) -> dict[str, Any]:
    """Random parameters, a nested dict of arrays; the same key gives the same bits. Works under `jax.eval_shape`.

    On a mesh they come split by the sharding rules: every device draws its own part, of the bits that one device would draw.
    """
    return _init_params(model, key)


def abstract_params(model: Transformer) -> dict[str, Any]:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(model: Transformer, key: PRNGKeyArray) -> dict[str, Any]:
    with no_mesh():  # the single token that shapes are drawn from cannot be split
        params = model.init(key, jnp.ones((1, 1), jnp.int32), attention="dense")["params"]
    return hold(params)


def _dtypes(config: ModelConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def _weights(config: ModelConfig) -> dict[str, Any]:
    return {**_dtypes(config), "weight_format": config.weight_format}


def _init_stds(config: ModelConfig) -> dict[str, Any]:
    # What adds to the residual stream starts smaller, so that its variance does not grow with depth.
    return {
        "init_std": config.initializer_range,
        "out_init_std": config.initializer_range * (2 * config.n_layers) ** -0.5,
    }


def _block(config: ModelConfig, stack: LayerStack) -> Block:
    return Block(
        attention=_attention(config, with_indexer=stack.indexer == "full"),
        mlp=_moe(config) if stack.mlp == "moe" else _mlp(config, config.mlp_dim),
        hidden_dim=config.hidden_dim,
        norm_eps=config.norm_eps,
        dtype=jnp.dtype(config.dtype),
        parent=None,
    )


def _attention(config: ModelConfig, *, with_indexer: bool) -> MLA | GQA:
    attention = config.attention
    common: dict[str, Any] = {
        "hidden_dim": config.hidden_dim,
        "n_heads": attention.n_heads,
        "budget": _budget(attention.indexer),
        "indexer": _indexer(config) if with_indexer else None,
        "activation": attention.indexer.activation,
        "implementations": parse_implementations("model.attention.implementation", attention.implementation),
        "parent": None,
        **_init_stds(config),
        **_weights(config),
    }
    if attention.kind == "mla":
        return MLA(
            q_lora_rank=attention.q_lora_rank,
            kv_lora_rank=attention.kv_lora_rank,
            qk_nope_head_dim=attention.qk_nope_head_dim,
            v_head_dim=attention.v_head_dim,
            rope=rope_from_config(attention.rope, dim=attention.qk_rope_head_dim, layout=attention.rope_layout),
            latent_norm_eps=attention.latent_norm_eps,
            **common,
        )
    heads: dict[str, Any] = {
        "n_kv_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "rope": rope_from_config(attention.rope, dim=attention.head_dim, layout=attention.rope_layout),
        "qk_norm": attention.qk_norm,
        "qk_norm_eps": config.norm_eps,
        "use_bias": attention.use_bias,
    }
    nsa = _nsa(config, heads) if attention.nsa.enabled else None
    return GQA(use_out_bias=attention.use_out_bias, nsa=nsa, **heads, **common)


def _nsa(config: ModelConfig, heads: dict[str, Any]) -> NSA:
    nsa = config.attention.nsa
    geometry = BlockGeometry(
        compress_block=nsa.compress_block,
        compress_stride=nsa.compress_stride,
        select_block=nsa.select_block,
        topk=nsa.n_select_blocks,
        n_initial=nsa.n_initial_blocks,
        n_local=nsa.n_local_blocks,
    )
    return NSA(
        hidden_dim=config.hidden_dim,
        n_heads=config.attention.n_heads,
        geometry=geometry,
        window=nsa.window,
        init_std=config.initializer_range,
        parent=None,
        **heads,
        **_dtypes(config),
    )


def _budget(indexer: IndexerConfig) -> Budget:
    return Budget(
        topk=indexer.topk,
        block_size=indexer.coarse_block_size,
        n_blocks=indexer.coarse_blocks,
        forced=ForcedKeys(first=indexer.forced_sink, last=indexer.forced_local),
        pooling=indexer.coarse_pooling,
        coarse_loss_weight=indexer.coarse_loss_weight,
    )


def _indexer(config: ModelConfig) -> Indexer:
    attention, indexer = config.attention, config.attention.indexer
    has_query_latent = attention.kind == "mla" and attention.q_lora_rank > 0
    return Indexer(
        hidden_dim=config.hidden_dim,
        q_input_dim=attention.q_lora_rank if has_query_latent else config.hidden_dim,
        n_heads=indexer.n_heads,
        head_dim=indexer.head_dim,
        rope=rope_from_config(attention.rope, dim=indexer.rope_dim, layout=indexer.rope_layout),
        norm_eps=indexer.norm_eps,
        hadamard=indexer.hadamard,
        fp8=indexer.fp8,
        head_weights=indexer.head_weights,
        detach_input=indexer.detach_input,
        init_std=config.initializer_range,
        parent=None,
        **_weights(config),
    )


def _mlp(config: ModelConfig, mlp_dim: int) -> MLP:
    return MLP(hidden_dim=config.hidden_dim, mlp_dim=mlp_dim, parent=None, **_init_stds(config), **_weights(config))


def _moe(config: ModelConfig) -> MoE:
    moe = config.moe
    return MoE(
        hidden_dim=config.hidden_dim,
        expert_dim=moe.expert_dim,
        n_experts=moe.n_routed_experts,
        n_experts_per_token=moe.n_experts_per_token,
        scoring=moe.scoring,
        n_groups=moe.n_groups,
        topk_groups=moe.topk_groups,
        group_score=moe.group_score,
        normalize_weights=moe.normalize_weights,
        routed_scale=moe.routed_scale,
        use_score_bias=moe.use_score_bias,
        shared=_mlp(config, moe.n_shared_experts * moe.expert_dim) if moe.n_shared_experts else None,
        parent=None,
        **_init_stds(config),
        **_weights(config),
    )
