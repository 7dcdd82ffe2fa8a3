"""What sets the model families apart in a config.json: names, defaults of absent fields, fixed choices. Data only.

Defaults are those of the configuration classes of transformers 5.23; a field that has none here must be present.
"""

from typing import Any, NamedTuple

OWN_MODEL_TYPE = "dsa_jax"
"""model_type of a model that no family can express; its config.json holds the whole model config."""

OWN_FIELD = "dsa_jax"
"""Field of config.json with what only this project reads."""


class Family(NamedTuple):
    """One `model_type`.

    Fields: `kind` of attention; `experts`: layers after the dense ones have experts; `has_indexer`: every checkpoint of the
    family has one; `latent_rope`: rotary layout of MLA, "by field" where `rope_interleave` says; `index_rope`: that of the
    indexer; `scoring` and `group_score` of the router; `defaults` of absent fields.
    """

    architecture: str
    kind: str
    qk_norm: bool = False
    experts: bool = False
    has_indexer: bool = False
    latent_rope: str = "interleaved"
    index_rope: str = "half_split"
    scoring: str = "sigmoid"
    group_score: str = "top2_sum"
    defaults: dict[str, Any] = {}  # noqa: RUF012


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
}
_V3 = _COMMON | {
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_GLM = _V3 | {"rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "gqa", defaults=_COMMON),
    "qwen3": Family("Qwen3ForCausalLM", "gqa", qk_norm=True, defaults=_COMMON | {"head_dim": 128}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "gqa",
        qk_norm=True,
        experts=True,
        scoring="softmax",
        group_score="max",
        defaults=_COMMON | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "mla",
        experts=True,
        scoring="softmax",
        group_score="max",
        defaults=_COMMON
        | {
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
            "n_group": None,
            "topk_group": None,
            "rope_interleave": True,
            "scoring_func": "softmax",
            "topk_method": "greedy",
        },
    ),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "mla", experts=True, latent_rope="by field", defaults=_V3),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        "mla",
        experts=True,
        has_indexer=True,
        defaults=_V3 | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    ),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        "mla",
        experts=True,
        has_indexer=True,
        index_rope="interleaved",
        defaults=_GLM
        | {
            "index_n_heads": 32,
            "index_head_dim": 128,
            "index_topk": 2048,
            "index_topk_freq": 1,
            "index_skip_topk_offset": 2,
        },
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        "mla",
        experts=True,
        latent_rope="by field",
        defaults=_GLM | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
    ),
}

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "partial_rotary_factor": (1, 1.0),
    "hidden_act": ("silu", "swish"),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "no_rope_layers": (),
    "attention_chunk_size": (),
}
"""Fields that change the computation, with the values under which they do not; null always counts as absent."""

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
