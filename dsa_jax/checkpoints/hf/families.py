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

FALLBACK_MODEL_TYPE = "dsa_jax"
"""model_type of a model that no family can express; its config.json holds the whole `ModelConfig`."""

EXTRA_FIELD = "dsa_jax"
"""Field of a family's config.json with the settings that only this project reads, by dotted name."""


class _Row:
    """Checks columns against the values in `_ALLOWED`."""

    def __post_init__(self) -> None:
        for column, allowed in _ALLOWED[type(self).__name__].items():
            value = getattr(self, column)
            if value not in allowed:
                raise ValueError(
                    f"{type(self).__name__}.{column} is {value!r}; expected one of {', '.join(map(repr, allowed))}. The model "
                    "computes nothing else: extend it first."
                )


@dataclass(frozen=True, kw_only=True)
class Router(_Row):
    """How a family describes its mixture of experts; columns that name a field of config.json say "none" where it has none.

    Attributes:
        n_experts: field with the number of routed experts, as written; all spellings are read.
        dense_layers: field that says which layers keep a dense MLP: "first_k_dense_replace" (a number) or "mlp_only_layers"
            (a list, which must be the first ones); "none": no layer does.
        writes_layer_kinds: config.json also gives `mlp_layer_types`, which is read in every family.
        scoring: "sigmoid" or "softmax" over the router's logits.
        score_bias: a bias for the selection (`e_score_correction_bias`) is among the weights.
        group_score: what ranks a group of experts: "top2_sum" or "max" of its scores.
        topk_methods: values of `topk_method`, the first one for an absent field; "greedy" is without groups. Empty: the family
            has neither groups nor `scoring_func`.
        normalize: whether the chosen weights are normalised: "norm_topk_prob" (by that field), "always" or "never".
        shared_experts: field with the number of shared experts, "n_shared_experts" or "none".
        routed_scale: field with the factor on the routed output, "routed_scaling_factor" or "none".
    """

    n_experts: str
    dense_layers: str
    writes_layer_kinds: bool
    scoring: str
    score_bias: bool
    group_score: str
    topk_methods: tuple[str, ...]
    normalize: str
    shared_experts: str
    routed_scale: str


@dataclass(frozen=True, kw_only=True)
class FamilyIndexer(_Row):
    """The indexer that every checkpoint of a family has.

    Attributes:
        rope_layout: "half_split", or "interleaved": index channels are always stored so that neighbours rotate together.
        shares: layers may reuse the selection of an earlier one (`indexer_types`).
    """

    rope_layout: str
    shares: bool


@dataclass(frozen=True, kw_only=True)
class Family(_Row):
    """One `model_type`.

    Attributes:
        architecture: class name in `architectures`.
        attention: kind of attention, "gqa" or "mla".
        head_dim: the field `head_dim` is "stated" (size of a head, hidden_size over the heads where absent), "rotary" (must
            equal qk_rope_head_dim) or "unread".
        qk_norm: RMSNorm over each head of q and k.
        biases: of the projections: "none"; "qkv" always; "attention_bias": q, k, v and output where that field is true;
            "attention_bias_qkv": q, k and v where it is true.
        windows: what turns a sliding window on, which is refused in any layer: "none" (the family has none);
            "sliding_window" (a size in that field); "use_sliding_window" (that switch); "max_window_layers" (that switch, from
            this layer on); "layer_types" (an entry per layer).
        rope_layout: "half_split", "interleaved", or "rope_interleave" where that field says which.
        rotated: "all" channels of all layers are rotated, or a field says which and is refused unless it says all:
            "partial_rotary_factor", "no_rope_layers".
        extras: names of all else that the forward pass has and these columns cannot say (attention sinks, norms after a
            sublayer, norm weights of 1 + w, a scaled embedding, ...). The model computes none, so only () is accepted.
        router: of the layers with experts; None where there are none.
        indexer: of every checkpoint; None where only a retrofit has one.
        mtp_layers: multi-token-prediction layers may follow the last one, and are skipped.
        defaults: values of absent fields, as in the configuration classes of transformers 5.23. A field that is needed and
            has none here must be present.
    """

    architecture: str
    attention: str
    head_dim: str
    qk_norm: bool
    biases: str
    windows: str
    rope_layout: str
    rotated: str
    extras: tuple[str, ...]
    router: Router | None
    indexer: FamilyIndexer | None
    mtp_layers: bool
    defaults: Mapping[str, Any]


EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")
"""Spellings of the number of routed experts."""

_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "Family": {
        "attention": ("gqa", "mla"),
        "head_dim": ("stated", "rotary", "unread"),
        "biases": ("none", "qkv", "attention_bias", "attention_bias_qkv"),
        "windows": ("none", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        "rope_layout": ("half_split", "interleaved", "rope_interleave"),
        "rotated": ("all", "partial_rotary_factor", "no_rope_layers"),
        "extras": ((),),
    },
    "FamilyIndexer": {"rope_layout": ("half_split", "interleaved")},
    "Router": {
        "n_experts": EXPERT_COUNTS,
        "dense_layers": ("first_k_dense_replace", "mlp_only_layers", "none"),
        "scoring": ("sigmoid", "softmax"),
        "group_score": ("top2_sum", "max"),
        "topk_methods": ((), ("noaux_tc",), ("greedy", "group_limited_greedy")),
        "normalize": ("norm_topk_prob", "always", "never"),
        "shared_experts": ("n_shared_experts", "none"),
        "routed_scale": ("routed_scaling_factor", "none"),
    },
}

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
_DEEPSEEK = _COMMON | {"moe_layer_freq": 1, "rope_interleave": True}
_QWEN3 = _COMMON | {"sliding_window": 4096, "use_sliding_window": False}
_INDEX = {"index_head_dim": 128, "index_topk": 2048}

_V3_ROUTER = Router(
    n_experts="n_routed_experts",
    dense_layers="first_k_dense_replace",
    writes_layer_kinds=False,
    scoring="sigmoid",
    score_bias=True,
    group_score="top2_sum",
    topk_methods=("noaux_tc",),
    normalize="norm_topk_prob",
    shared_experts="n_shared_experts",
    routed_scale="routed_scaling_factor",
)
_V3_ROUTER_BY_LAYER = dataclasses.replace(_V3_ROUTER, writes_layer_kinds=True)
_LLAMA = Family(
    architecture="LlamaForCausalLM",
    attention="gqa",
    head_dim="stated",
    qk_norm=False,
    biases="attention_bias",
    windows="none",
    rope_layout="half_split",
    rotated="all",
    extras=(),
    router=None,
    indexer=None,
    mtp_layers=False,
    defaults=_COMMON,
)
_DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    attention="mla",
    head_dim="unread",
    qk_norm=False,
    biases="none",
    windows="none",
    rope_layout="rope_interleave",
    rotated="all",
    extras=(),
    router=_V3_ROUTER,
    indexer=None,
    mtp_layers=True,
    defaults=_DEEPSEEK
    | {
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
    },
)
_GLM = {**_DEEPSEEK_V3.defaults, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1}

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "qwen3": dataclasses.replace(
        _LLAMA,
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        windows="max_window_layers",
        defaults=_QWEN3 | {"head_dim": 128, "max_window_layers": 28},
    ),
    "qwen3_moe": dataclasses.replace(
        _LLAMA,
        architecture="Qwen3MoeForCausalLM",
        qk_norm=True,
        windows="use_sliding_window",
        router=Router(
            n_experts="num_experts",
            dense_layers="mlp_only_layers",
            writes_layer_kinds=False,
            scoring="softmax",
            score_bias=False,
            group_score="max",
            topk_methods=(),
            normalize="norm_topk_prob",
            shared_experts="none",
            routed_scale="none",
        ),
        defaults=_QWEN3 | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v2": dataclasses.replace(
        _DEEPSEEK_V3,
        architecture="DeepseekV2ForCausalLM",
        rope_layout="interleaved",
        router=Router(
            n_experts="n_routed_experts",
            dense_layers="first_k_dense_replace",
            writes_layer_kinds=False,
            scoring="softmax",
            score_bias=False,
            group_score="max",
            topk_methods=("greedy", "group_limited_greedy"),
            normalize="never",  # published code disagrees on what norm_topk_prob true means here
            shared_experts="n_shared_experts",
            routed_scale="routed_scaling_factor",
        ),
        defaults=_DEEPSEEK | {"first_k_dense_replace": 0, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
    ),
    "deepseek_v32": dataclasses.replace(
        _DEEPSEEK_V3,
        architecture="DeepseekV32ForCausalLM",
        rope_layout="interleaved",
        router=_V3_ROUTER_BY_LAYER,
        indexer=FamilyIndexer(rope_layout="half_split", shares=False),
        defaults={**_DEEPSEEK_V3.defaults, **_INDEX, "index_n_heads": 64},
    ),
    "glm_moe_dsa": dataclasses.replace(
        _DEEPSEEK_V3,
        architecture="GlmMoeDsaForCausalLM",
        rope_layout="interleaved",
        router=_V3_ROUTER_BY_LAYER,
        indexer=FamilyIndexer(rope_layout="interleaved", shares=True),
        defaults=_GLM | _INDEX | {"index_n_heads": 32, "index_topk_freq": 1, "index_skip_topk_offset": 2},
    ),
    "glm4_moe_lite": dataclasses.replace(
        _DEEPSEEK_V3,
        architecture="Glm4MoeLiteForCausalLM",
        head_dim="rotary",
        router=_V3_ROUTER_BY_LAYER,
        defaults=_GLM | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
    ),
}
"""The rows by model_type. Where several can express a model that came from none, an earlier one is written."""


def register_family(model_type: str, family: Family) -> None:
    """Add a row to the table: `load_pretrained` then reads checkpoints of that model_type and `save_pretrained` writes them.

    Raises:
        ValueError: for a model_type that has a row already, or that stands for models of no family.
    """
    if model_type in FAMILIES or model_type == FALLBACK_MODEL_TYPE:
        raise ValueError(f"model_type {model_type!r} is taken; expected one other than {', '.join(FAMILIES)}.")
    FAMILIES[model_type] = family


@contextlib.contextmanager
def registered_family(model_type: str, family: Family) -> Iterator[None]:
    """`register_family` for the length of a `with` block."""
    register_family(model_type, family)
    try:
        yield
    finally:
        del FAMILIES[model_type]


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
        "index_share_for_mtp_iteration", "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference",
        "label2id", "max_window_layers", "mlp_only_layers", "model_type", "moe_router_dtype", "name_or_path",
        "num_mtp_layers", "num_nextn_predict_layers", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "qk_head_dim",
        "quantization_config", "return_dict", "rope_parameters", "rope_scaling", "router_aux_loss_coef",
        "router_jitter_noise", "sep_token_id", "seq_aux", "sliding_window", "task_specific_params", "tokenizer_class",
        "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
        "use_sliding_window",
    }
)  # fmt: skip
"""Fields that do not change what is computed here, or that are read and checked by name elsewhere."""
