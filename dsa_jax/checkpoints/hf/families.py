"""The table of model families: how each one's config.json describes a model.

A row states everything that readers and writers would otherwise have to know by name. Every column is required, and a value
that stands for something the model does not compute is refused. To add a family, write its row (here, or anywhere and call
`register_family`), a case of the fixtures and its name in README. Tensor names are those of `names.py` for every family.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsa_jax.config.families import add_family, remove_family

FALLBACK_MODEL_TYPE = "dsa_jax"
"""model_type of a model that no family can express; its config.json holds the whole `ModelConfig`."""

EXTRA_FIELD = "dsa_jax"
"""Field of a family's config.json with the settings that only this project reads, by dotted name."""

EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
"""Spellings of the number of routed experts; all are read."""

ROPE_LAYOUT_SPELLINGS = {
    "rope_interleaved": True,
    "rotary_interleaved": True,
    "rotary_emb_interleaved": True,
    "is_neox_style": False,
    "rope_is_neox_style": False,
    "neox_style": False,
}
"""Other spellings of rope_interleave, or of its opposite where false; they may be there, but not against it."""


def _one_of(*values: Any) -> Any:
    """A required column with the values that it may have."""
    return dataclasses.field(metadata={"values": values})


class _Row:
    def __post_init__(self) -> None:
        for column in dataclasses.fields(self):  # type: ignore[arg-type]
            value, values = getattr(self, column.name), column.metadata.get("values")
            if values is not None and value not in values:
                raise ValueError(
                    f"{type(self).__name__}.{column.name} is {value!r}; expected one of {', '.join(map(repr, values))}. The "
                    "model computes nothing else: extend it first."
                )


@dataclass(frozen=True, kw_only=True)
class Router(_Row):
    """A family's mixture of experts; columns that name a field of config.json say "none" where it has no such field."""

    # Field with the number of routed experts, as it is written.
    n_experts: str = _one_of(*EXPERT_COUNTS)
    # Field that says which leading layers keep a dense MLP: their number, or the list of them.
    dense_layers: str = _one_of("first_k_dense_replace", "mlp_only_layers", "none")
    # mlp_layer_types is written as well; it is read in every family.
    writes_layer_kinds: bool
    # Of the router's logits.
    scoring: str = _one_of("sigmoid", "softmax")
    # A bias for the selection, e_score_correction_bias, is among the weights.
    score_bias: bool
    # Score of a group of experts: sum of its two best, or its best.
    group_score: str = _one_of("top2_sum", "max")
    # Values of topk_method, that of an absent field first; "greedy" ignores groups. (): neither groups nor scoring_func.
    topk_methods: tuple[str, ...] = _one_of((), ("noaux_tc",), ("greedy", "group_limited_greedy"))
    # Whether the chosen weights are normalised: by the field, or the same in every checkpoint.
    normalize: str = _one_of("norm_topk_prob", "always", "never")
    # Field with the number of shared experts.
    shared_experts: str = _one_of("n_shared_experts", "none")
    # Field with the factor on the output of the routed experts.
    routed_scale: str = _one_of("routed_scaling_factor", "none")


@dataclass(frozen=True, kw_only=True)
class FamilyIndexer(_Row):
    """The indexer that every checkpoint of a family has."""

    # "interleaved": index channels are always stored so that neighbours rotate together.
    rope_layout: str = _one_of("half_split", "interleaved")
    # Layers may reuse the selection of an earlier one (indexer_types).
    shares: bool


@dataclass(frozen=True, kw_only=True)
class Family(_Row):
    """One `model_type`."""

    # Class name in `architectures`.
    architecture: str
    # Kind of attention.
    attention: str = _one_of("gqa", "mla")
    # The field head_dim is the size of a head (absent: hidden_size over heads), must equal qk_rope_head_dim, or is ignored.
    head_dim: str = _one_of("stated", "rotary", "unread")
    # RMSNorm over each head of q and k.
    qk_norm: bool
    # Of the projections: "qkv" always has those of q, k and v; "attention_bias" those of q, k, v and output where this field is
    # true, "attention_bias_qkv" only those of q, k and v.
    biases: str = _one_of("none", "qkv", "attention_bias", "attention_bias_qkv")
    # Field that turns a sliding window on, which is refused in any layer: a size; a switch; the switch, from this layer on; or
    # a kind per layer.
    windows: str = _one_of("none", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    # Rotary layout of attention; "rope_interleave": by this field.
    rope_layout: str = _one_of("half_split", "interleaved", "rope_interleave")
    # Channels and layers with rotation: all, or by a field, which is refused unless it says all.
    rotated: str = _one_of("all", "partial_rotary_factor", "no_rope_layers")
    # Names of all else in the forward pass that no column can say (attention sinks, norms after a sublayer, norm weights of
    # 1 + w, a scaled embedding, ...): the model computes none of it.
    extras: tuple[str, ...] = _one_of(())
    # Of the layers with experts; None: there are none.
    router: Router | None
    # Of every checkpoint; None: only a retrofit has one.
    indexer: FamilyIndexer | None
    # Multi-token-prediction layers may follow the last one, and are skipped.
    mtp_layers: bool
    # Values of absent fields, as in the configuration classes of transformers 5.23; without one here a field must be present.
    defaults: Mapping[str, Any]


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
_QWEN3 = _COMMON | {"sliding_window": 4096, "use_sliding_window": False}
_MLA = _COMMON | {"moe_layer_freq": 1, "rope_interleave": True}
_V3 = _MLA | {"first_k_dense_replace": 3, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
_DEEPSEEK_V3 = _V3 | {"n_group": 8, "topk_group": 4}
_GLM = _V3 | {"rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1}
_INDEX = {"index_head_dim": 128, "index_topk": 2048}

# fmt: off
_V3_ROUTER = Router(
    n_experts="n_routed_experts", dense_layers="first_k_dense_replace", writes_layer_kinds=False, scoring="sigmoid",
    score_bias=True, group_score="top2_sum", topk_methods=("noaux_tc",), normalize="norm_topk_prob",
    shared_experts="n_shared_experts", routed_scale="routed_scaling_factor",
)
_V32_ROUTER = dataclasses.replace(_V3_ROUTER, writes_layer_kinds=True)
# norm_topk_prob is always false here: published code disagrees on what true means.
_V2_ROUTER = dataclasses.replace(
    _V3_ROUTER, scoring="softmax", score_bias=False, group_score="max", topk_methods=("greedy", "group_limited_greedy"),
    normalize="never",
)
_QWEN3_ROUTER = Router(
    n_experts="num_experts", dense_layers="mlp_only_layers", writes_layer_kinds=False, scoring="softmax", score_bias=False,
    group_score="max", topk_methods=(), normalize="norm_topk_prob", shared_experts="none", routed_scale="none",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM", attention="gqa", head_dim="stated", qk_norm=False, biases="attention_bias",
        windows="none", rope_layout="half_split", rotated="all", extras=(), router=None, indexer=None, mtp_layers=False,
        defaults=_COMMON,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", attention="gqa", head_dim="stated", qk_norm=True, biases="attention_bias",
        windows="max_window_layers", rope_layout="half_split", rotated="all", extras=(), router=None, indexer=None,
        mtp_layers=False, defaults=_QWEN3 | {"head_dim": 128, "max_window_layers": 28},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM", attention="gqa", head_dim="stated", qk_norm=True, biases="attention_bias",
        windows="use_sliding_window", rope_layout="half_split", rotated="all", extras=(), router=_QWEN3_ROUTER, indexer=None,
        mtp_layers=False, defaults=_QWEN3 | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM", attention="mla", head_dim="unread", qk_norm=False, biases="none",
        windows="none", rope_layout="rope_interleave", rotated="all", extras=(), router=_V3_ROUTER, indexer=None,
        mtp_layers=True, defaults=_DEEPSEEK_V3,
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM", attention="mla", head_dim="unread", qk_norm=False, biases="none",
        windows="none", rope_layout="interleaved", rotated="all", extras=(), router=_V2_ROUTER, indexer=None,
        mtp_layers=True, defaults=_MLA | {"first_k_dense_replace": 0, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
    ),
    "deepseek_v32": Family(
        architecture="DeepseekV32ForCausalLM", attention="mla", head_dim="unread", qk_norm=False, biases="none",
        windows="none", rope_layout="interleaved", rotated="all", extras=(), router=_V32_ROUTER,
        indexer=FamilyIndexer(rope_layout="half_split", shares=False), mtp_layers=True,
        defaults=_DEEPSEEK_V3 | _INDEX | {"index_n_heads": 64},
    ),
    "glm_moe_dsa": Family(
        architecture="GlmMoeDsaForCausalLM", attention="mla", head_dim="unread", qk_norm=False, biases="none",
        windows="none", rope_layout="interleaved", rotated="all", extras=(), router=_V32_ROUTER,
        indexer=FamilyIndexer(rope_layout="interleaved", shares=True), mtp_layers=True,
        defaults=_GLM | _INDEX | {"index_n_heads": 32, "index_topk_freq": 1, "index_skip_topk_offset": 2},
    ),
    "glm4_moe_lite": Family(
        architecture="Glm4MoeLiteForCausalLM", attention="mla", head_dim="rotary", qk_norm=False, biases="none",
        windows="none", rope_layout="rope_interleave", rotated="all", extras=(), router=_V32_ROUTER, indexer=None,
        mtp_layers=True, defaults=_GLM | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
    ),
}
# fmt: on
"""The rows by model_type. Where several can express a model that came from none, an earlier one is written."""


def register_family(model_type: str, family: Family) -> None:
    """Add a row to the table: `load_pretrained` then reads checkpoints of that model_type and `save_pretrained` writes them.

    Raises:
        ValueError: for a model_type that has a row already, or that stands for models of no family.
    """
    if model_type in FAMILIES or model_type == FALLBACK_MODEL_TYPE:
        raise ValueError(f"model_type {model_type!r} is taken; expected one other than {', '.join(FAMILIES)}.")
    FAMILIES[model_type] = family
    add_family(model_type)


@contextlib.contextmanager
def registered_family(model_type: str, family: Family) -> Iterator[None]:
    """`register_family` for the length of a `with` block."""
    register_family(model_type, family)
    try:
        yield
    finally:
        del FAMILIES[model_type]
        remove_family(model_type)


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "partial_rotary_factor": (1, 1.0),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "no_rope_layers": (),
    "rope_local_base_freq": (),
    "swiglu_limit": (),
    "attention_chunk_size": (),
}
"""Fields that change the computation, with the values under which they do not; null means that it is off."""

HARMLESS = frozenset(
    {
        "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "attn_implementation",
        "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
        "dsa_tokenizer", "dtype", "eos_token_id", "ep_size", "finetuning_task", "head_dim", "id2label",
        "index_rope_dim", "index_share_for_mtp_iteration", "indexer_rope_interleave", "is_decoder", "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id", "max_window_layers", "mlp_only_layers", "model_type", "moe_router_dtype", "name_or_path",
        "num_mtp_layers", "num_nextn_predict_layers", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "qk_head_dim", "qk_rope_head_dim",
        "quantization_config", "return_dict", "rope_parameters", "rope_scaling", "router_aux_loss_coef",
        "router_jitter_noise", "sep_token_id", "seq_aux", "sliding_window", "task_specific_params", "tokenizer_class",
        "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
        "use_sliding_window",
    }
)  # fmt: skip
"""Fields that do not change what is computed here, or that are read and checked by name elsewhere."""
