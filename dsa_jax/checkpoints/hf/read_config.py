"""config.json of a Hugging Face checkpoint as a `ModelConfig`.

Every field that changes what is computed is honoured or refused. Where a field is absent the family's default in transformers
holds, but for the tokens that begin and end a text, of which there are none then, and the number of key heads, which is that
of all heads. Where transformers ignores a field that the weights were trained with (the indexer's rotary layout), the field
wins.
"""

import logging
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.config_fields import Fields
from dsa_jax.checkpoints.hf.families import FAMILIES, HARMLESS, OWN_FIELD, OWN_MODEL_TYPE, UNSUPPORTED, Family
from dsa_jax.checkpoints.hf.fp8 import block_size
from dsa_jax.checkpoints.hf.names import EMBEDDING
from dsa_jax.checkpoints.hf.rope_fields import read_rope
from dsa_jax.checkpoints.hf.weights import Weights, read_json
from dsa_jax.config.checks import ConfigError
from dsa_jax.config.fields import from_dict, to_dict
from dsa_jax.config.model import AttentionConfig, IndexerConfig, ModelConfig, MoEConfig
from dsa_jax.model.rope import rope_from_config, rotary_magnitude

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float32", "half": "float32"}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}


def read_model_config(directory: str | Path) -> ModelConfig:
    """The model of a checkpoint directory, from its config.json and generation_config.json.

    Raises:
        CheckpointError: when the directory is missing, its model_type is not known, or a field cannot be honoured.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory. Give the directory of a Hugging Face checkpoint.")
    file = directory / "config.json"
    content = read_json(file)
    config = parse_config(content, file)
    if stated_dtype(content) is None:
        config.param_dtype = config.dtype = _stored_dtype(directory, content)
    generation = directory / "generation_config.json"
    if generation.is_file() and (stop := _token_ids(Fields(generation, read_json(generation), {}))):
        config.eos_token_ids = stop
    return config


def parse_config(content: dict[str, Any], file: Path) -> ModelConfig:
    """The model that the `content` of a config.json describes, validated; a dtype that it does not state is float32.

    Raises:
        CheckpointError: when its model_type is not known or a field cannot be honoured, naming field and value.
    """
    model_type = content.get("model_type")
    try:
        if model_type == OWN_MODEL_TYPE:
            config = _own_config(content, file)
        elif model_type in FAMILIES:
            config = _family_config(content, file)
        else:
            known = ", ".join(sorted(FAMILIES))
            hint = " It is a run's: experiments.convert --to_hf makes a checkpoint of it." if "train" in content else ""
            raise CheckpointError(f"{file}: model_type is {model_type!r}; expected one of {known}.{hint}")
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{file} describes a model that cannot be built: {error}") from error
    return config


def _own_config(content: dict[str, Any], file: Path) -> ModelConfig:
    own = content.get(OWN_FIELD)
    if not isinstance(own, dict) or not isinstance(own.get("model"), dict):
        raise CheckpointError(f"{file}: model_type is {OWN_MODEL_TYPE!r}, but {OWN_FIELD}.model is missing. Export it again.")
    return from_dict(ModelConfig, own["model"])


def _family_config(content: dict[str, Any], file: Path) -> ModelConfig:
    family = FAMILIES[content["model_type"]]
    fields = Fields(file, content, family.defaults)
    _refuse_unsupported(fields)
    n_layers = fields.whole("num_hidden_layers")
    attention = _gqa(fields, family) if family.kind == "gqa" else _mla(fields, family)
    attention.rope = read_rope(fields)
    attention.indexer = _indexer(fields, family, attention, n_layers)
    attention.mode = "sparse" if attention.indexer.enabled else "dense"
    moe = _experts(fields, family, n_layers) if family.experts else MoEConfig()
    dtype = stated_dtype(content)
    if dtype is not None and dtype not in _DTYPES:
        fields.fail("dtype" if content.get("dtype") else "torch_dtype", f"one of {', '.join(_DTYPES)}")
    block_size(content, file)
    config = ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_dim=fields.whole("hidden_size"),
        n_layers=n_layers,
        mlp_dim=fields.whole("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        initializer_range=fields.number("initializer_range"),
        embedding_initializer_range=fields.number("initializer_range"),
        max_positions=fields.whole("max_position_embeddings"),
        family=content["model_type"],
        bos_token_id=fields.whole("bos_token_id", -1),
        eos_token_ids=_token_ids(fields),
        param_dtype=_DTYPES[dtype or "float32"],
        dtype=_DTYPES[dtype or "float32"],
        attention=attention,
        moe=moe,
    )
    if fields.has(OWN_FIELD):
        config = _with_own_fields(config, fields)
    if unknown := sorted(content.keys() - fields.asked - HARMLESS - UNSUPPORTED.keys()):
        _LOG.warning("%s: ignoring fields that are not known: %s", file, ", ".join(unknown))
    return config


def _refuse_unsupported(fields: Fields) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = fields.content.get(name)
        if value is not None and value not in neutral:
            allowed = " or ".join(str(each) for each in neutral)
            fields.fail(name, f"{allowed}: nothing else is computed" if neutral else "null: it is not computed")
    kind = fields.content["model_type"]
    window = fields.content.get("sliding_window", 4096 if kind.startswith("qwen3") else None)
    if window is not None and fields.content.get("use_sliding_window", kind == "llama"):
        first = fields.whole("max_window_layers", 28) if kind == "qwen3" else 0
        if first < fields.whole("num_hidden_layers"):
            fields.fail("sliding_window", "null, or use_sliding_window false: only full attention is computed")
    layer_types = fields.content.get("layer_types")
    fields.asked.add("layer_types")
    # The last one is what transformers first called the one before.
    computed = ("full_attention", "indexed_attention", "deepseek_sparse_attention")
    if layer_types is not None and not (isinstance(layer_types, list) and all(kind in computed for kind in layer_types)):
        fields.fail("layer_types", f"a list of {', '.join(computed)}")


def _gqa(fields: Fields, family: Family) -> AttentionConfig:
    n_heads = fields.whole("num_attention_heads")
    bias = fields.flag("attention_bias")
    default_dim = family.defaults.get("head_dim") or fields.whole("hidden_size") // n_heads
    return AttentionConfig(
        kind="gqa",
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", n_heads),
        head_dim=fields.whole("head_dim", default_dim),
        rope_layout="half_split",
        qk_norm=family.qk_norm,
        use_bias=bias,
        use_out_bias=bias,
    )


def _mla(fields: Fields, family: Family) -> AttentionConfig:
    n_heads = fields.whole("num_attention_heads")
    if fields.whole("num_key_value_heads", n_heads) != n_heads:
        fields.fail("num_key_value_heads", f"num_attention_heads ({n_heads}), since the latent expands to every head")
    if fields.flag("attention_bias"):
        fields.fail("attention_bias", "false in a model with latent attention")
    interleaved = fields.flag("rope_interleave", True)
    if not interleaved and family.latent_rope != "by field":
        fields.fail("rope_interleave", "true, which this family always is")
    if fields.content.get("q_lora_rank", 0) is None:
        fields.asked.add("q_lora_rank")
        q_lora_rank = 0
    else:
        q_lora_rank = fields.whole("q_lora_rank")
    rope_dim = fields.whole("qk_rope_head_dim")
    if fields.content["model_type"] == "glm4_moe_lite" and fields.whole("head_dim", rope_dim) != rope_dim:
        fields.fail("head_dim", f"qk_rope_head_dim ({rope_dim})")
    return AttentionConfig(
        kind="mla",
        n_heads=n_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=fields.whole("kv_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.whole("v_head_dim"),
        rope_layout="interleaved" if interleaved else "half_split",
        # Not rms_norm_eps: transformers builds the two latent norms with their default.
        latent_norm_eps=fields.number("latent_norm_eps", 1e-6),
    )


def _indexer(fields: Fields, family: Family, attention: AttentionConfig, n_layers: int) -> IndexerConfig:
    if not family.has_indexer and not fields.has("index_topk"):
        return IndexerConfig()
    if family.has_indexer and rotary_magnitude(rope_from_config(attention.rope, dim=2, layout="half_split")) != 1.0:
        raise CheckpointError(
            f"{fields.file}: the rotary scaling has a magnitude other than 1, by attention_factor or by mscale over "
            "mscale_all_dim, and readers disagree on whether it enters the indexer; expected mscale equal to mscale_all_dim."
        )
    if family.has_indexer and not attention.q_lora_rank:
        fields.fail("q_lora_rank", "a positive rank: the indexer reads the query latent")
    rope_dim = attention.qk_rope_head_dim if family.kind == "mla" else attention.head_dim
    interleaved = fields.flag("indexer_rope_interleave", family.index_rope == "interleaved")
    return IndexerConfig(
        enabled=True,
        n_heads=fields.whole("index_n_heads"),
        head_dim=fields.whole("index_head_dim"),
        rope_dim=fields.whole("index_rope_dim", rope_dim),
        topk=fields.whole("index_topk"),
        rope_layout="interleaved" if interleaved else "half_split",
        norm_eps=fields.number("index_norm_eps", 1e-6),
        layer_types=_indexer_types(fields, n_layers),
    )


def _indexer_types(fields: Fields, n_layers: int) -> tuple[str, ...]:
    """Which layers have an indexer of their own; empty when all have."""
    fields.asked |= {"index_topk_freq", "index_skip_topk_offset"}
    if fields.has("indexer_types"):
        kinds = fields.content["indexer_types"]
        if not isinstance(kinds, list) or len(kinds) < n_layers or set(kinds) - {"full", "shared"}:
            fields.fail("indexer_types", f"'full' or 'shared' for each of the {n_layers} layers")
    elif fields.has("index_topk_pattern"):
        pattern = fields.content["index_topk_pattern"]
        kinds = [{"F": "full", "S": "shared"}.get(each, each) for each in pattern]
        if len(kinds) < n_layers or set(kinds) - {"full", "shared"}:
            fields.fail("index_topk_pattern", f"F or S for each of the {n_layers} layers")
    else:
        every = max(fields.whole("index_topk_freq", 1), 1)
        offset = fields.whole("index_skip_topk_offset", 2)
        kinds = ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(n_layers)]
    kinds = kinds[:n_layers]
    return () if set(kinds) == {"full"} else tuple(kinds)


def _experts(fields: Fields, family: Family, n_layers: int) -> MoEConfig:
    n_dense = _n_dense_layers(fields, n_layers)
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    counts = {name: fields.whole(name) for name in names if fields.has(name)}
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"{fields.file}: {counts} disagree; expected one number of experts.")
    n_experts = next(iter(counts.values()), 0)
    shared_and_scale: dict[str, Any] = {}
    if family.kind == "mla":
        shared = 0 if fields.content.get("n_shared_experts", 0) is None else fields.whole("n_shared_experts")
        shared_and_scale = {"n_shared_experts": shared, "routed_scale": fields.number("routed_scaling_factor")}
        if fields.text("scoring_func") != family.scoring:
            fields.fail("scoring_func", f"{family.scoring!r}, which this family always uses")
    normalize = fields.flag("norm_topk_prob")
    groups = _groups(fields, family)
    if n_dense == n_layers:
        fields.asked |= {"num_experts_per_tok", "moe_intermediate_size"}
        return MoEConfig()
    if n_experts == 0:
        fields.fail(names[0] if family.kind == "mla" else "num_experts", "a positive number of experts")
    if fields.content["model_type"] == "deepseek_v2" and normalize:
        fields.fail("norm_topk_prob", "false: published code disagrees on what true means in this family")
    return MoEConfig(
        n_routed_experts=n_experts,
        n_experts_per_token=fields.whole("num_experts_per_tok"),
        expert_dim=fields.whole("moe_intermediate_size"),
        n_dense_layers=n_dense,
        scoring=family.scoring,
        group_score=family.group_score,
        normalize_weights=normalize,
        use_score_bias=family.scoring == "sigmoid",
        **groups,
        **shared_and_scale,
    )


def _n_dense_layers(fields: Fields, n_layers: int) -> int:
    """Leading layers with a dense MLP; all others must have experts."""
    if fields.has("mlp_layer_types"):
        kinds = list(fields.content["mlp_layer_types"])[:n_layers]
        n_dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        if len(kinds) < n_layers or set(kinds[n_dense:]) - {"sparse"}:
            fields.fail("mlp_layer_types", f"'dense' for the first layers, then 'sparse', {n_layers} in all")
        fields.asked.add("first_k_dense_replace")
        return n_dense
    if fields.content["model_type"] == "qwen3_moe":
        dense = sorted(fields.content.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            fields.fail("mlp_only_layers", "the first layers, if any")
        return min(len(dense), n_layers)
    return min(fields.whole("first_k_dense_replace"), n_layers)


def _groups(fields: Fields, family: Family) -> dict[str, int]:
    if family.kind == "gqa":
        return {}
    method = fields.text("topk_method")
    n_groups, topk_groups = (
        fields.whole("n_group", family.defaults["n_group"] or 1),
        fields.whole("topk_group", family.defaults["topk_group"] or 1),
    )
    if family.scoring == "sigmoid":
        if method != "noaux_tc":
            fields.fail("topk_method", "'noaux_tc', which this family always uses")
    elif method == "greedy":
        n_groups = topk_groups = 1
    elif method != "group_limited_greedy":
        fields.fail("topk_method", "'greedy' or 'group_limited_greedy'")
    return {"n_groups": n_groups, "topk_groups": topk_groups}


def _with_own_fields(config: ModelConfig, fields: Fields) -> ModelConfig:
    """Apply what only this project writes: values by their dotted name in `ModelConfig`."""
    own = fields.content[OWN_FIELD]
    if not isinstance(own, dict):
        fields.fail(OWN_FIELD, "an object of fields by dotted name")
    values = to_dict(config)
    for name, value in own.items():
        *folders, last = name.split(".")
        place: Any = values
        for folder in folders:
            place = place.get(folder) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise CheckpointError(f"{fields.file}: {OWN_FIELD}.{name} is no field of a model config.")
        place[last] = value
    return from_dict(ModelConfig, values)


def _token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        fields.fail("eos_token_id", "a token id or a list of them")
    return tuple(ids)


def stated_dtype(content: dict[str, Any]) -> str | None:
    """The type of the weights by config.json, in its newer or older spelling; the newer one counts, as in transformers."""
    value = content.get("dtype") or content.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _stored_dtype(directory: Path, content: dict[str, Any]) -> str:
    """The type of the parameters where config.json does not state it: that of the embedding, which is never quantised."""
    if content.get("quantization_config"):
        return "bfloat16"
    with Weights(directory) as weights:
        info = weights.tensors.get(EMBEDDING)
    return _STORED.get(info.dtype, "float32") if info else "float32"
