"""config.json of a Hugging Face checkpoint as a `ModelConfig`.

Every field that changes the computation is honoured or refused. An absent field has the family's default in transformers,
except that there are then no tokens that begin or end a text, and as many key-value heads as heads. Where transformers ignores
a field that the weights were trained with (the indexer's rotary layout), the field wins. A head among the weights that is not
the embedding counts for more than `tie_word_embeddings`, as in transformers and vLLM.
"""

import contextlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.config_fields import MOST, Fields
from dsa_jax.checkpoints.hf.families import (
    EXPERT_COUNTS,
    EXTRA_FIELD,
    FALLBACK_MODEL_TYPE,
    FAMILIES,
    HARMLESS,
    ROPE_LAYOUT_SPELLINGS,
    UNSUPPORTED,
    Family,
    Router,
)
from dsa_jax.checkpoints.hf.fp8 import block_size
from dsa_jax.checkpoints.hf.names import EMBEDDING, HEAD
from dsa_jax.checkpoints.hf.rope_fields import read_rope
from dsa_jax.checkpoints.hf.sizes import MOST_LAYERS, check_numbers, check_sizes
from dsa_jax.checkpoints.hf.weights import Weights, has_weights, read_json
from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig, MoEConfig, RopeConfig
from dsa_jax.config.checks import ConfigError
from dsa_jax.config.fields import check_kinds, from_dict, set_field
from dsa_jax.foreign import printable, shown
from dsa_jax.model.rope import Rope, rotary_magnitude

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float32", "half": "float32"}
_OF_POSITIONS = re.compile(r"rope|rotary|alibi|position_embedding|(^|_)ntk(_|$)|use_nope|nope_layer")
_IS_ROTATED = re.compile(r"((use|apply|enable)_)?(rope|rotary|rotary_emb|rotary_(position_)?embeddings?)")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}


def read_model_config(directory: str | Path) -> ModelConfig:
    """The model of a checkpoint directory, from its config.json and generation_config.json.

    The weights are looked at too, if there are any: sizes that they cannot have are refused before a model is built, and a
    stored head with other values than the embedding makes the model untied.

    Raises:
        CheckpointError: when the directory is missing, its model_type is not known, a field cannot be honoured, or does not fit
            the weights, or these cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory. Give the directory of a Hugging Face checkpoint.")
    file = directory / "config.json"
    content = read_json(file)
    config = parse_config(content, file)
    with Weights(directory) if has_weights(directory) else contextlib.nullcontext() as weights:
        if weights is not None and weights.tensors:
            check_sizes(config, weights, file)
        if stated_dtype(content) is None:
            config.param_dtype = config.dtype = _stored_dtype(weights, content)
        if weights is not None and config.tie_embeddings:
            config.tie_embeddings = not _has_head_of_its_own(weights)
    generation = directory / "generation_config.json"
    if generation.is_file():
        stop = _token_ids(Fields(generation, read_json(generation), {}))
        if beyond := [token for token in stop if not 0 <= token < config.vocab_size]:
            _LOG.warning("%s: eos_token_id %s is no token of the model, so nothing stops at it", generation, shown(beyond))
        config.eos_token_ids = tuple(dict.fromkeys((*config.eos_token_ids, *(each for each in stop if each not in beyond))))
    return config


def parse_config(content: dict[str, Any], file: Path) -> ModelConfig:
    """The model that the `content` of a config.json describes, validated; a dtype that it does not state is float32.

    Raises:
        CheckpointError: when its model_type is not known or a field cannot be honoured, naming field and value.
    """
    model_type = content.get("model_type")
    try:
        if model_type == FALLBACK_MODEL_TYPE:
            config = _whole_config(content, file)
        elif isinstance(model_type, str) and model_type in FAMILIES:
            config = _family_config(content, file)
        else:
            known = ", ".join(sorted(FAMILIES))
            hint = " It is a run's: experiments.convert --to_hf makes a checkpoint of it." if "train" in content else ""
            raise CheckpointError(f"{file}: model_type is {shown(model_type)}; expected one of {known}.{hint}")
        check_numbers(config, file)
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{file} describes a model that cannot be built: {printable(error, 1000)}") from error
    return config


def _whole_config(content: dict[str, Any], file: Path) -> ModelConfig:
    whole = content.get(EXTRA_FIELD)
    if not isinstance(whole, dict) or not isinstance(whole.get("model"), dict):
        raise CheckpointError(
            f"{file}: model_type is {FALLBACK_MODEL_TYPE!r}, but {EXTRA_FIELD}.model is missing. Export it again."
        )
    return from_dict(ModelConfig, whole["model"])


def _family_config(content: dict[str, Any], file: Path) -> ModelConfig:
    family = FAMILIES[content["model_type"]]
    fields = Fields(file, content, family.defaults)
    n_layers = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    _refuse_unsupported(fields, family)
    _refuse_windows(fields, family, n_layers)
    attention = _ATTENTION[family.attention](fields, family)
    attention.rope = read_rope(fields)
    attention.indexer = _indexer(fields, family, attention, n_layers)
    if attention.indexer.enabled:
        attention.layer_types = _indexer_types(fields, n_layers)
    attention.mode = "sparse" if attention.indexer.enabled else "dense"
    moe = MoEConfig() if family.router is None else _experts(fields, family.router, n_layers)
    spelled = "dtype" if content.get("dtype") else "torch_dtype"
    dtype = fields.text(spelled, "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        fields.fail(spelled, f"one of {', '.join(_DTYPES)}")
    block_size(content, file)
    config = ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_dim=fields.whole("hidden_size"),
        n_layers=n_layers,
        mlp_dim=fields.whole("intermediate_size"),
        norm_eps=fields.epsilon("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        initializer_range=fields.number("initializer_range", most=1e3),
        embedding_initializer_range=fields.number("initializer_range", most=1e3),
        max_positions=_positions(fields, attention.rope),
        family=content["model_type"],
        bos_token_id=fields.whole("bos_token_id", -1, least=-1),
        eos_token_ids=_token_ids(fields),
        param_dtype=_DTYPES[dtype],
        dtype=_DTYPES[dtype],
        attention=attention,
        moe=moe,
    )
    if fields.has(EXTRA_FIELD):
        _apply_extra_fields(config, fields)
    if unknown := sorted(content.keys() - fields.asked - HARMLESS - UNSUPPORTED.keys()):
        _refuse_rotation(fields, unknown)
        _LOG.warning("%s: ignoring fields that are not known: %s", file, ", ".join(map(printable, unknown)))
    return config


def _positions(fields: Fields, rope: RopeConfig) -> int:
    """The longest text: max_position_embeddings, or what YaRN makes of the original length where that is more.

    Model cards add the scaling and leave the length as it is.
    """
    stated = fields.whole("max_position_embeddings")
    return max(stated, int(rope.factor * rope.original_max_positions)) if rope.scaling == "yarn" else stated


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    required = {*family.defaults, family.rotated, "hidden_act"}
    for name, neutral in UNSUPPORTED.items():
        value = fields.stated(name) if name in required else fields.content.get(name)
        if value is not None and value not in neutral:
            allowed = " or ".join(str(each) for each in neutral)
            fields.fail(name, f"{allowed}: nothing else is computed" if neutral else "null: it is not computed")


def _refuse_windows(fields: Fields, family: Family, n_layers: int) -> None:
    """Refuse a sliding window in any layer; the family's row says what turns one on."""
    # The last one is what transformers first called the one before.
    computed = ("full_attention", "indexed_attention", "deepseek_sparse_attention")
    by_layer = family.windows == "layer_types"
    if fields.has("layer_types") or by_layer:
        kinds = fields.stated("layer_types")
        if not isinstance(kinds, list) or not all(kind in computed for kind in kinds):
            fields.fail("layer_types", f"a list of {', '.join(computed)}")
    if by_layer:
        return
    first = fields.whole("max_window_layers", least=0) if family.windows == "max_window_layers" else 0
    if family.windows == "none":
        size, is_on = fields.content.get("sliding_window"), fields.flag("use_sliding_window", True)
    else:
        size = fields.stated("sliding_window")
        is_on = family.windows == "sliding_window" or fields.flag("use_sliding_window")
    if size is not None and is_on and first < n_layers:
        fields.fail("sliding_window", "null, or use_sliding_window false: only full attention is computed")


def _refuse_rotation(fields: Fields, unknown: list[str]) -> None:
    """Refuse a field that by its name changes how positions enter; programs that know it would compute another model."""
    for name in filter(_OF_POSITIONS.search, unknown):
        value = fields.content[name]
        if _IS_ROTATED.fullmatch(name):
            if value not in (None, True):
                fields.fail(name, "true: queries and keys are rotated in every layer")
        elif not _changes_no_rotation(name, value):
            fields.fail(name, "null or false: it changes the rotary embedding, and is not computed")


def _changes_no_rotation(name: str, value: Any) -> bool:
    """Whether a value is off or, of a factor or a share, 1; a share of 0 rotates nothing, an interval of 0 is none.

    Of another family's "absolute" embeddings there would be weights, which are refused.
    """
    if type(value) in (int, float):
        return value == (0 if name.endswith("interval") else 1)
    return not value or value in ("default", "rope", "rotary", "absolute")


def _flag(fields: Fields, name: str, always: bool | None) -> bool:
    """A flag by its field, or, where all checkpoints of the family have it `always` true or false, that, and nothing else."""
    if always is None:
        return fields.flag(name)
    if fields.flag(name, always) != always:
        fields.fail(name, f"{str(always).lower()}, which this family always is")
    return always


def _rope_layout(fields: Fields, family: Family) -> str:
    always = {"interleaved": True, "half_split": False}.get(family.rope_layout)
    interleaved = _flag(fields, "rope_interleave", always)
    for name, meaning in ROPE_LAYOUT_SPELLINGS.items():
        if fields.has(name) and (fields.flag(name) == meaning) != interleaved:
            fields.fail(name, f"{str(interleaved == meaning).lower()}: the rotation of this model is the other one")
    return "interleaved" if interleaved else "half_split"


def _biases(fields: Fields, family: Family) -> tuple[bool, bool]:
    """Whether q, k and v have a bias, and whether the output projection has."""
    if family.biases == "qkv":
        return True, False
    stated = _flag(fields, "attention_bias", False if family.biases == "none" else None)
    return stated, stated and family.biases == "attention_bias"


def _gqa(fields: Fields, family: Family) -> AttentionConfig:
    n_heads = fields.whole("num_attention_heads")
    head_dim = (hidden_dim := fields.whole("hidden_size")) // n_heads
    if not head_dim and not fields.has("head_dim"):
        fields.fail("num_attention_heads", f"at most hidden_size ({hidden_dim}), since head_dim is not stated")
    use_bias, use_out_bias = _biases(fields, family)
    return AttentionConfig(
        kind="gqa",
        n_heads=n_heads,
        n_kv_heads=fields.whole("num_key_value_heads", n_heads),
        head_dim=fields.whole("head_dim", head_dim) if family.head_dim == "stated" else head_dim,
        rope_layout=_rope_layout(fields, family),
        qk_norm=family.qk_norm,
        use_bias=use_bias,
        use_out_bias=use_out_bias,
    )


def _mla(fields: Fields, family: Family) -> AttentionConfig:
    n_heads = fields.whole("num_attention_heads")
    if fields.whole("num_key_value_heads", n_heads) != n_heads:
        fields.fail("num_key_value_heads", f"num_attention_heads ({n_heads}), since the latent expands to every head")
    if any(_biases(fields, family)):
        fields.fail("attention_bias", "false in a model with latent attention")
    rope_dim = fields.whole("qk_rope_head_dim")
    if family.head_dim == "rotary" and fields.whole("head_dim", rope_dim) != rope_dim:
        fields.fail("head_dim", f"qk_rope_head_dim ({rope_dim})")
    return AttentionConfig(
        kind="mla",
        n_heads=n_heads,
        q_lora_rank=fields.whole("q_lora_rank", null=0, least=0),
        kv_lora_rank=fields.whole("kv_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=fields.whole("v_head_dim"),
        rope_layout=_rope_layout(fields, family),
        # Not rms_norm_eps: transformers builds the two latent norms with their default.
        latent_norm_eps=fields.epsilon("latent_norm_eps", 1e-6),
    )


_ATTENTION: dict[str, Callable[[Fields, Family], AttentionConfig]] = {"gqa": _gqa, "mla": _mla}


def _indexer(fields: Fields, family: Family, attention: AttentionConfig, n_layers: int) -> IndexerConfig:
    if family.indexer is None and not fields.has("index_topk"):
        return IndexerConfig()
    if family.indexer and rotary_magnitude(Rope(2, "half_split", attention.rope)) != 1.0:
        raise CheckpointError(
            f"{fields.file}: the rotary scaling has a magnitude other than 1, by attention_factor or by mscale over "
            "mscale_all_dim, and readers disagree on whether it enters the indexer; expected mscale equal to mscale_all_dim."
        )
    if family.indexer and not attention.q_lora_rank:
        fields.fail("q_lora_rank", "a positive rank: the indexer reads the query latent")
    rope_dim = attention.qk_rope_head_dim if attention.kind == "mla" else attention.head_dim
    usual = "half_split" if family.indexer is None else family.indexer.rope_layout
    interleaved = fields.flag("indexer_rope_interleave", usual == "interleaved")
    return IndexerConfig(
        enabled=True,
        n_heads=fields.whole("index_n_heads"),
        head_dim=fields.whole("index_head_dim"),
        rope_dim=fields.whole("index_rope_dim", rope_dim, least=0),
        topk=fields.whole("index_topk"),
        rope_layout="interleaved" if interleaved else "half_split",
        norm_eps=fields.epsilon("index_norm_eps", 1e-6),
    )


def _indexer_types(fields: Fields, n_layers: int) -> tuple[str, ...]:
    """Kind of each layer: "full" has an indexer of its own, "shared" reuses a selection; empty when all are full."""
    fields.asked |= {"index_topk_freq", "index_skip_topk_offset"}
    name = next((name for name in ("indexer_types", "index_topk_pattern") if fields.has(name)), None)
    if name is not None:
        stated = fields.content[name]
        letters = list(stated) if isinstance(stated, str) else fields.names(name)
        kinds = [{"F": "full", "S": "shared"}.get(each, each) for each in letters]
        if len(kinds) < n_layers or set(kinds) - {"full", "shared"}:
            fields.fail(name, f"'full' or 'shared' (F or S) for each of the {n_layers} layers")
    else:
        every = max(fields.whole("index_topk_freq", 1, least=-MOST), 1)
        offset = fields.whole("index_skip_topk_offset", 2, least=-MOST)
        kinds = ["full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(n_layers)]
    kinds = kinds[:n_layers]
    return () if set(kinds) == {"full"} else tuple(kinds)


def _experts(fields: Fields, router: Router, n_layers: int) -> MoEConfig:
    n_dense = _n_dense_layers(fields, router, n_layers)
    counts = {name: fields.whole(name, least=0) for name in EXPERT_COUNTS if fields.has(name)}
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"{fields.file}: {counts} disagree; expected one number of experts.")
    n_experts = next(iter(counts.values()), 0)
    shared = 0 if router.shared_experts == "none" else fields.whole(router.shared_experts, null=0, least=0)
    scale = 1.0 if router.routed_scale == "none" else fields.number(router.routed_scale, least=1e-6, most=1e6)
    if fields.text("scoring_func", router.scoring) != router.scoring:
        fields.fail("scoring_func", f"{router.scoring!r}, which this family always uses")
    normalize = _flag(fields, "norm_topk_prob", {"always": True, "never": False}.get(router.normalize))
    groups = _groups(fields, router)
    if n_dense == n_layers:
        fields.asked |= {"num_experts_per_tok", "moe_intermediate_size"}
        return MoEConfig()
    if n_experts == 0:
        fields.fail(router.n_experts, "a positive number of experts")
    return MoEConfig(
        n_routed_experts=n_experts,
        n_experts_per_token=fields.whole("num_experts_per_tok"),
        n_shared_experts=shared,
        expert_dim=fields.whole("moe_intermediate_size"),
        n_dense_layers=n_dense,
        scoring=router.scoring,
        group_score=router.group_score,
        normalize_weights=normalize,
        routed_scale=scale,
        use_score_bias=router.score_bias,
        **groups,
    )


def _n_dense_layers(fields: Fields, router: Router, n_layers: int) -> int:
    """Leading layers with a dense MLP; all others must have experts."""
    if fields.has("mlp_layer_types"):
        kinds = fields.names("mlp_layer_types")[:n_layers]
        n_dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        if len(kinds) < n_layers or set(kinds[n_dense:]) - {"sparse"}:
            fields.fail("mlp_layer_types", f"'dense' for the first layers, then 'sparse', {n_layers} in all")
        fields.asked.add(router.dense_layers)
        return n_dense
    if router.dense_layers == "none":
        return 0
    if router.dense_layers == "first_k_dense_replace":
        return min(fields.whole(router.dense_layers, least=0), n_layers)
    dense = fields.stated(router.dense_layers) or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense) or sorted(dense) != list(range(len(dense))):
        fields.fail(router.dense_layers, "the first layers, if any")
    return min(len(dense), n_layers)


def _groups(fields: Fields, router: Router) -> dict[str, int]:
    """Settings of `MoEConfig` for experts in groups."""
    if not router.topk_methods:
        return {}
    method = fields.text("topk_method", router.topk_methods[0])
    if method not in router.topk_methods:
        fields.fail("topk_method", f"{' or '.join(map(repr, router.topk_methods))}, as this family always uses")
    n_groups, topk_groups = fields.whole("n_group", 1), fields.whole("topk_group", 1)
    return {} if method == "greedy" else {"n_groups": n_groups, "topk_groups": topk_groups}


def _apply_extra_fields(config: ModelConfig, fields: Fields) -> None:
    """Apply the settings that only this project writes: values by their dotted name in `ModelConfig`."""
    extra = fields.content[EXTRA_FIELD]
    if not isinstance(extra, dict):
        fields.fail(EXTRA_FIELD, "an object of fields by dotted name")
    for name, value in extra.items():
        set_field(config, name, tuple(value) if isinstance(value, list) else value)
    check_kinds(config, f"{EXTRA_FIELD}.")


def _token_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and -MOST <= token <= MOST for token in ids):
        fields.fail("eos_token_id", "a token id or a list of them")
    return tuple(ids)


def stated_dtype(content: dict[str, Any]) -> str | None:
    """The type of the weights by config.json, in its newer or older spelling; the newer one counts, as in transformers."""
    value = content.get("dtype") or content.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else None


def _stored_dtype(weights: Weights | None, content: dict[str, Any]) -> str:
    """The type of the parameters where config.json does not state it: that of the embedding, which is never quantised."""
    if content.get("quantization_config"):
        return "bfloat16"
    info = weights.tensors.get(EMBEDDING) if weights else None
    return _STORED.get(info.dtype, "float32") if info else "float32"


def _has_head_of_its_own(weights: Weights) -> bool:
    """Whether the weights hold a head with other values than the embedding, which is logged."""
    found = weights.tensors
    if EMBEDDING not in found or HEAD not in found or 0 in found[HEAD].shape or not weights.differ(HEAD, EMBEDDING):
        return False
    _LOG.warning(
        "%s: config.json ties the head to %s, but %s holds other values: the stored head is used and the model is untied",
        weights.directory, EMBEDDING, HEAD,
    )  # fmt: skip
    return True
