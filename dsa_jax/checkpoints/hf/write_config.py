"""A `ModelConfig` as the config.json of the model family that comes closest.

A family expresses a model when reading back its config.json gives the same model. Settings that still differ, and leave the
meaning of the tensors alone, are added under a field that only this project reads.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.families import EXTRA_FIELD, FALLBACK_MODEL_TYPE, FAMILIES, UNSUPPORTED, Router
from dsa_jax.checkpoints.hf.index_rope import is_reordered
from dsa_jax.checkpoints.hf.read_config import parse_config
from dsa_jax.checkpoints.hf.rope_fields import write_rope
from dsa_jax.config.attention import FULL, WINDOW, AttentionConfig, IndexerConfig, RopeConfig, unused_fields
from dsa_jax.config.fields import flatten, to_dict
from dsa_jax.config.model import (
    FP8_BLOCKS,
    PLAIN,
    ModelConfig,
    MoEConfig,
)
from dsa_jax.model.attention.kinds import kinds_of
from dsa_jax.model.rope import yarn_mscale
from pallas_kernels.quantize.blocks import WEIGHT_BLOCK

# Differences under which a checkpoint keeps its family: other readers compute something close, and are told what.
_SOFT = frozenset(
    {
        "attention.mode", "attention.latent_norm_eps", "logits_scale", "attention.indexer.hadamard", "attention.indexer.fp8",
        "attention.indexer.topk", "attention.indexer.coarse_block_size", "attention.indexer.coarse_blocks",
        "attention.indexer.coarse_pooling", "max_positions",
    }
)  # fmt: skip
# How a model is run or trained, and where it came from: no part of a checkpoint.
_OF_THE_RUN = frozenset(
    {
        "family", "param_dtype", "dtype", "weight_format", "scan_layers", "remat", "initializer_range",
        "embedding_initializer_range", "attention.implementation",
        "attention.indexer.distill_shared", "attention.indexer.coarse_loss_weight", "moe.bias_update_rate",
        "moe.balance_loss_weight",
    }
)  # fmt: skip


class Layout(NamedTuple):
    """A config.json.

    Fields: `extra` holds the settings, by dotted name, that only this project reads; `refused` says why the family that comes
    closest cannot hold the model, and is empty where it does.
    """

    model_type: str
    content: dict[str, Any]
    extra: dict[str, Any]
    refused: str = ""


def choose_layout(config: ModelConfig) -> Layout:
    """The config.json for `config`: of a family with an indexer of its own where the model has one and latent attention
    (deepseek_v32, glm_moe_dsa), else of the model's own family, else with a model_type of this project.

    Raises:
        CheckpointError: for native sparse attention, and an indexer that is a variant under study: no published format holds
            either.
    """
    if titles := [mode.title for kind in kinds_of(config) for mode in kind.modes]:
        raise CheckpointError(
            f"model.attention.kind is {config.attention.kind!r}, but no published checkpoint format holds the weights of "
            f"{', '.join(titles)}. Keep the run directory, which holds it whole."
        )
    if fields := config.attention.indexer.unpublished():
        raise CheckpointError(
            f"model.attention.indexer has {', '.join(fields)}; expected the defaults, since no published checkpoint format "
            "holds this variant of the indexer and other programs would run another model. Keep the run directory, "
            "which holds it whole."
        )
    refused = ""
    for model_type in _candidates(config):
        content = family_content(config, model_type)
        try:
            back = parse_config(content, Path("config.json"))
        except CheckpointError as error:
            refused = refused or f"{model_type} cannot say it ({error})"
            continue
        extra = differences(config, back)
        soft = _SOFT | {"attention.indexer.rope_layout"} if is_reordered(config, model_type) else _SOFT
        if extra.keys() <= soft:
            if extra:
                content[EXTRA_FIELD] = extra
            return Layout(model_type, content, extra, refused)
        unsaid = ", ".join(f"{name} = {value}" for name, value in extra.items() if name not in soft)
        refused = refused or f"{model_type} cannot say {unsaid}"
    content = {
        "model_type": FALLBACK_MODEL_TYPE,
        "torch_dtype": config.param_dtype,
        "vocab_size": config.vocab_size,
        EXTRA_FIELD: {"model": to_dict(dataclasses.replace(config, weight_format=PLAIN))},
        **_quantization(config),
    }
    return Layout(FALLBACK_MODEL_TYPE, content, {}, refused)


def differences(config: ModelConfig, back: ModelConfig) -> dict[str, Any]:
    """Values of `config`, by dotted name, where `back` computes something else; what neither uses does not count."""
    ours, theirs = _canonical(config), _canonical(back)
    ours.moe.use_score_bias |= theirs.moe.use_score_bias  # a router without biases is written with biases of zero
    mine, read = flatten(to_dict(ours)), flatten(to_dict(theirs))
    return {name: value for name, value in mine.items() if name not in _OF_THE_RUN and value != read[name]}


def family_content(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The config.json of `config` as a `model_type`, unchecked: it may fail to express the model."""
    family, attention = FAMILIES[model_type], config.attention
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": float(config.norm_eps),
        "initializer_range": float(config.initializer_range),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_positions,
        "bos_token_id": config.bos_token_id if config.bos_token_id >= 0 else None,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None,
        "use_cache": True,
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
        **write_rope(attention.rope),
        **_quantization(config),
        **_ATTENTION_FIELDS[family.attention](attention),
        # A family's default may be another value than the one that is computed.
        **{name: neutral[0] if neutral else None for name, neutral in UNSUPPORTED.items() if name in family.defaults},
    }
    if family.biases == "qkv":
        del content["attention_bias"]
    if family.rope_layout == "rope_interleave":
        content["rope_interleave"] = attention.rope_layout == "interleaved"
    if family.windows == "layer_types":
        content["layer_types"] = ["full_attention"] * config.n_layers
    elif family.windows != "none":
        content["sliding_window"] = None
    if family.router is not None:
        content |= _expert_content(config, family.router)
    if family.mtp_layers:
        content["num_nextn_predict_layers"] = 0
    if attention.indexer.enabled:
        content |= _indexer_content(config, model_type)
    return content


def _quantization(config: ModelConfig) -> dict[str, Any]:
    """`quantization_config` as DeepSeek's own config.json has it; readers scale activations dynamically."""
    if config.weight_format != FP8_BLOCKS:
        return {}
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(WEIGHT_BLOCK), "activation_scheme": "dynamic"}
    return {"quantization_config": blocks}


def _candidates(config: ModelConfig) -> list[str]:
    """Families with this kind of attention, the closest first: the family of origin before others that are as close."""
    attention, indexer = config.attention, config.attention.indexer

    def distance(model_type: str) -> tuple[bool, ...]:
        family = FAMILIES[model_type]
        theirs = family.indexer
        return (
            (theirs is not None) != indexer.enabled,
            (family.router is not None) != bool(config.moe.n_routed_experts),
            family.qk_norm != attention.qk_norm,
            theirs is not None and "shared" in attention.layer_types and not theirs.shares,
            model_type != config.family,
            theirs is not None and theirs.rope_layout != indexer.rope_layout,
        )

    return sorted((name for name, family in FAMILIES.items() if family.attention == attention.kind), key=distance)


def _gqa_fields(attention: AttentionConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.use_bias,
    }


def _mla_fields(attention: AttentionConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "head_dim": attention.qk_rope_head_dim,
        "attention_bias": False,
    }


_ATTENTION_FIELDS = {"gqa": _gqa_fields, "mla": _mla_fields}


def _expert_content(config: ModelConfig, router: Router) -> dict[str, Any]:
    moe = config.moe
    n_dense = moe.n_dense_layers if moe.n_routed_experts else config.n_layers
    content: dict[str, Any] = {
        router.n_experts: moe.n_routed_experts,
        "num_experts_per_tok": moe.n_experts_per_token,
        "moe_intermediate_size": moe.expert_dim,
        "norm_topk_prob": moe.normalize_weights and router.normalize != "never",
        router.dense_layers: list(range(n_dense)) if router.dense_layers == "mlp_only_layers" else n_dense,
        router.shared_experts: moe.n_shared_experts,
        router.routed_scale: float(moe.routed_scale),
    }
    if router.writes_layer_kinds:
        content["mlp_layer_types"] = ["dense"] * n_dense + ["sparse"] * (config.n_layers - n_dense)
    if router.topk_methods:
        content |= {
            "n_group": moe.n_groups,
            "topk_group": moe.topk_groups,
            "topk_method": router.topk_methods[-1 if moe.topk_groups < moe.n_groups else 0],
            "scoring_func": moe.scoring,
        }
    return {name: value for name, value in content.items() if name != "none"}


def _indexer_content(config: ModelConfig, model_type: str) -> dict[str, Any]:
    indexer, theirs = config.attention.indexer, FAMILIES[model_type].indexer
    content: dict[str, Any] = {
        "index_n_heads": indexer.n_heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.topk,
    }
    layer_types = config.attention.layer_types
    if layer_types or (theirs and theirs.shares):
        content["indexer_types"] = list(layer_types or [FULL] * config.n_layers)
    if theirs is None or theirs.rope_layout == "interleaved":
        content["indexer_rope_interleave"] = indexer.rope_layout == "interleaved" or is_reordered(config, model_type)
    if theirs is None:
        content |= {"index_rope_dim": indexer.rope_dim, "index_norm_eps": indexer.norm_eps}
    return content


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same model with every field that it does not use at its default."""
    config = copy.deepcopy(config)
    plain, attention = AttentionConfig(), config.attention
    if WINDOW not in attention.layer_types:
        attention.window = plain.window
    for name in unused_fields(attention.kind):
        setattr(attention, name, getattr(plain, name))
    if set(attention.layer_types) <= ({"full"} if attention.indexer.enabled else {"full", "shared"}):
        attention.layer_types = ()
    if not attention.indexer.enabled:
        # The budget of the baselines is there without an indexer, too.
        attention.indexer = IndexerConfig() if attention.mode == "dense" else IndexerConfig(topk=attention.indexer.topk)
    attention.rope = _canonical_rope(attention.rope)
    moe = config.moe
    if not moe.n_routed_experts or moe.n_dense_layers == config.n_layers:
        config.moe = MoEConfig()
    elif moe.topk_groups == moe.n_groups:
        moe.n_groups = moe.topk_groups = 1
        moe.group_score = MoEConfig().group_score
    return config


def _canonical_rope(rope: RopeConfig) -> RopeConfig:
    used = {
        "none": (),
        "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor", "original_max_positions", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"
        ),
    }[rope.scaling]  # fmt: skip
    canonical = RopeConfig(theta=rope.theta, scaling=rope.scaling, **{name: getattr(rope, name) for name in used})
    if canonical.attention_factor:
        canonical.mscale = 1.0
    elif not canonical.mscale_all_dim and canonical.mscale != 1.0:
        canonical.attention_factor, canonical.mscale = yarn_mscale(rope.factor, rope.mscale), 1.0
    return canonical
