"""Attention as settings: rotary embedding, indexer, and the fields and checks of each attention kind. No JAX here."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsa_jax.config.checks import ConfigError, positive
from dsa_jax.config.fields import Settings
from dsa_jax.config.implementations import AUTO, PORTABLE, parse_implementations
from dsa_jax.config.limits import (
    AMOUNT,
    COUNT,
    EPSILON,
    FACTOR,
    HEADS,
    HEADS_IF_USED,
    TEXT,
    WEIGHT,
    WIDTH_IF_USED,
    Choices,
    Range,
    limited,
)
from dsa_jax.config.selections import DENSE, check_selection, selection, selections

ROPE_LAYOUT = Choices(("half_split", "interleaved"))
FULL, SHARED, WINDOW = "full", "shared", "window"
ROLES = (FULL, SHARED, DENSE, WINDOW)
"""Roles of a layer: follows `attention=` (with an indexer of its own where the model has indexers), reuses the selection of the
last full layer, always attends densely, or always attends to the last `window` keys."""


@dataclass(unsafe_hash=True)
class RopeConfig(Settings):
    """Rotary position embedding and its long-context scaling."""

    theta: float = limited(10000.0, Range(1e-6, 1e15))  # base of the rotary frequencies
    scaling: str = limited("none", Choices(("none", "yarn", "llama3")))  # none | yarn | llama3
    factor: float = limited(1.0, FACTOR)  # by which yarn and llama3 stretch positions
    original_max_positions: int = limited(4096, Range(0, 2**30))  # positions that the model had before it was stretched
    beta_fast: float = limited(32.0, FACTOR)  # yarn
    beta_slow: float = limited(1.0, FACTOR)  # yarn
    mscale: float = limited(1.0, Range(0, 1e3))  # yarn: numerator of the cos/sin magnitude
    mscale_all_dim: float = limited(0.0, Range(0, 1e3))  # yarn: denominator of it; squared into the softmax scale
    attention_factor: float = limited(
        0.0, Range(1e-3, 1e3, or_zero=True)
    )  # yarn: the cos/sin magnitude itself; 0: mscale over mscale_all_dim
    low_freq_factor: float = limited(1.0, FACTOR)  # llama3
    high_freq_factor: float = limited(4.0, FACTOR)  # llama3

    def validate(self) -> None:
        if self.scaling != "none":
            positive("model.attention.rope.original_max_positions", self.original_max_positions)
        if self.scaling == "yarn" and self.theta == 1.0:
            raise ConfigError(
                "model.attention.rope.theta is 1 with yarn, where every frequency is the same; expected more than 1."
            )
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"model.attention.rope.high_freq_factor is {self.high_freq_factor}; expected more than low_freq_factor "
                f"({self.low_freq_factor})."
            )


@dataclass(unsafe_hash=True)
class IndexerConfig(Settings):
    """The lightning indexer (DeepSeek-V3.2 report, section 1)."""

    enabled: bool = False  # the layers get an indexer
    n_heads: int = limited(
        64, HEADS_IF_USED
    )  # 0, with init.hf_dir: as many, up to 16, as leave sparse attention no dearer than dense at train.sparse.seq_len
    head_dim: int = limited(128, Range(0, 2**16))  # channels of each index head and of the index key
    rope_dim: int = limited(64, Range(0, 2**16))  # leading channels of each head that are rotated
    topk: int = limited(2048, COUNT)  # k in the paper
    rope_layout: str = limited("half_split", ROPE_LAYOUT)  # half_split (V3.2) | interleaved (GLM-5)
    norm_eps: float = limited(1e-6, EPSILON)  # LayerNorm of the index key
    hadamard: bool = False  # rotate q and k by the orthonormal Hadamard matrix
    fp8: bool = False  # simulate e4m3 with power-of-two scales on q and k
    activation: str = limited("relu", Choices(("relu", "none")))  # relu | none, before the heads are weighed
    head_weights: str = limited(
        "learned", Choices(("learned", "constant"))
    )  # learned | constant (every head counts the same; no projection)
    forced_sink: int = limited(0, AMOUNT)  # first visible keys that sparse and coarse_to_fine always select, within topk
    forced_local: int = limited(0, AMOUNT)  # last visible keys that they always select, within topk
    coarse_block_size: int = limited(128, AMOUNT)  # keys per block of the modes coarse_to_fine and blocks
    coarse_blocks: int = limited(
        64, AMOUNT
    )  # blocks that coarse_to_fine searches key by key, beside the first and the last visible one
    coarse_pooling: str = limited(
        "mean", Choices(("mean", "salient"))
    )  # mean | salient: how coarse_to_fine makes one key of a block
    coarse_loss_weight: float = limited(
        0.0, WEIGHT
    )  # of the KL that teaches pooled index keys to choose blocks, in the warm-up
    distill_shared: bool = False  # an indexer learns from all layers that its selection serves, not from its own alone

    def validate(self) -> None:
        if not self.enabled:
            if self.distill_shared or self.coarse_loss_weight:
                raise ConfigError(
                    "model.attention.indexer.distill_shared and coarse_loss_weight teach an indexer, and there is none. Set "
                    "model.attention.indexer.enabled=True."
                )
            return
        if not self.n_heads:
            raise ConfigError(
                "model.attention.indexer.n_heads is 0 without a checkpoint to size it by; expected a positive number. Set it, "
                "or give --config.init.hf_dir=DIR."
            )
        for name in ("head_dim", "coarse_block_size", "coarse_blocks"):
            positive(f"model.attention.indexer.{name}", getattr(self, name))
        if 0 < self.forced_sink + self.forced_local >= self.topk:
            raise ConfigError(
                f"model.attention.indexer.forced_sink is {self.forced_sink} and forced_local {self.forced_local}; expected "
                f"fewer than topk ({self.topk}) together, so that the indexer has a key to choose. Force fewer or raise topk."
            )
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise ConfigError(
                f"model.attention.indexer.rope_dim is {self.rope_dim}; expected an even number from 0 to head_dim "
                f"({self.head_dim})."
            )
        if self.hadamard and self.head_dim & (self.head_dim - 1):
            raise ConfigError(
                f"model.attention.indexer.head_dim is {self.head_dim} with hadamard=True; expected a power of two. "
                "Set model.attention.indexer.hadamard=False or change head_dim."
            )

    def unpublished(self) -> list[str]:
        """Fields, as `name='value'`, that make it compute something no published checkpoint format can state."""
        if not self.enabled:
            return []
        plain = IndexerConfig()
        return [f"{name}={getattr(self, name)!r}" for name in UNPUBLISHED if getattr(self, name) != getattr(plain, name)]


UNPUBLISHED = ("activation", "head_weights", "forced_sink", "forced_local")
"""Fields of `IndexerConfig` for ablations that DeepSeek and GLM checkpoints know only at their defaults."""


@dataclass(unsafe_hash=True)
class NSAConfig(Settings):
    """Native sparse attention (arXiv 2502.11089, section 4.1): compressed blocks, selected blocks and a window, gated."""

    compress_block: int = limited(32, AMOUNT)  # keys that become one compressed key (l in the paper)
    compress_stride: int = limited(16, AMOUNT)  # keys from one compressed key to the next (d)
    select_block: int = limited(64, AMOUNT)  # keys of a block that is read as a whole (l')
    n_select_blocks: int = limited(16, AMOUNT)  # blocks that a query reads (n), the forced ones among them
    n_initial_blocks: int = limited(1, AMOUNT)  # first blocks that every query reads
    n_local_blocks: int = limited(2, AMOUNT)  # blocks up to the query's own that it always reads
    window: int = limited(512, AMOUNT)  # last keys that the window branch reads

    def validate(self) -> None:
        for name in ("compress_block", "compress_stride", "select_block", "n_select_blocks", "window"):
            positive(f"model.attention.nsa.{name}", getattr(self, name))
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ConfigError(
                    f"model.attention.nsa.{name} is {getattr(self, name)}; expected a multiple of compress_stride "
                    f"({self.compress_stride})."
                )
        forced = self.n_initial_blocks + self.n_local_blocks
        if self.n_select_blocks < forced:
            raise ConfigError(
                f"model.attention.nsa.n_select_blocks is {self.n_select_blocks}; expected at least the {forced} blocks that "
                "n_initial_blocks and n_local_blocks force."
            )


class KindFields(NamedTuple):
    """The part of an attention kind that the config needs to know.

    Fields: `name`; `fields` of `AttentionConfig`, of those that not every kind reads, that this one does; `rotary_dim`: rotated
    channels of a head; `check` raises ConfigError for values that do not fit; `base`: the kind whose layers it extends by
    parameters of a mode of its own, empty where it extends none.
    """

    name: str
    fields: tuple[str, ...]
    rotary_dim: Callable[["AttentionConfig"], int]
    check: Callable[["AttentionConfig"], None]
    base: str = ""


@dataclass(unsafe_hash=True)
class AttentionConfig(Settings):
    """The attention of all layers: their kind, what each layer does, the indexer."""

    kind: str = limited(
        "gqa", Choices(lambda: kinds())
    )  # {kinds}: grouped-query, multi-head latent, or native sparse attention (grouped-query with branches)
    mode: str = limited(
        "dense", Choices(selections)
    )  # the attention that the checkpoint was trained under, one of {selections}
    layer_types: tuple[str, ...] = limited(
        (), Choices(lambda: (*ROLES, *kinds()))
    )  # per layer full | shared (reuses the last full one) | dense | window | a kind; empty: full
    window: int = limited(0, AMOUNT)  # keys that a layer of type window attends to
    n_heads: int = limited(4, HEADS)  # of queries
    n_kv_heads: int = limited(4, HEADS_IF_USED)  # gqa
    head_dim: int = limited(32, Range(0, 2**16))  # gqa
    q_lora_rank: int = limited(0, WIDTH_IF_USED)  # mla; 0: queries straight from the hidden state
    kv_lora_rank: int = limited(64, WIDTH_IF_USED)  # mla
    qk_nope_head_dim: int = limited(32, WIDTH_IF_USED)  # mla
    qk_rope_head_dim: int = limited(16, WIDTH_IF_USED)  # mla
    v_head_dim: int = limited(32, WIDTH_IF_USED)  # mla
    rope_layout: str = limited("half_split", ROPE_LAYOUT)  # half_split (Llama, Qwen) | interleaved (DeepSeek, GLM)
    qk_norm: bool = False  # gqa: RMSNorm on each head of q and k (Qwen3)
    use_bias: bool = False  # gqa: bias on q, k and v
    use_out_bias: bool = False  # gqa: bias on the output projection
    latent_norm_eps: float = limited(1e-6, EPSILON)  # mla: norms of the query and the key-value latent
    implementation: str = limited(
        AUTO, TEXT
    )  # auto | reference | xla | by op: sparse_attention=pallas,index_topk=triton,indexer_kl=pallas
    rope: RopeConfig = field(default_factory=RopeConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    nsa: NSAConfig = field(default_factory=NSAConfig)  # kind nsa

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a run or an export that an earlier version wrote, by their names of today."""
        named = copy.deepcopy(dict(values))
        nsa, indexer = named.get("nsa", {}), named.get("indexer", {})
        if isinstance(nsa, dict) and nsa.pop("enabled", False):
            named["kind"] = "nsa"
        if isinstance(indexer, dict):
            if types := indexer.pop("layer_types", ()):
                named.setdefault("layer_types", types)
            if not indexer.pop("detach_input", True):
                raise ConfigError(
                    "model.attention.indexer.detach_input is False, which is no setting any more; expected True. Revision "
                    "ed5c375 repeats such a run."
                )
        return named

    def layers(self, n_layers: int) -> tuple["AttentionLayer", ...]:
        """Kind and role of each layer. Without an indexer no layer shares: those count as full."""
        types = self.layer_types or (FULL,) * n_layers
        kinds = [self.kind if each in ROLES else each for each in types]
        roles = [each if each in ROLES and (each != SHARED or self.indexer.enabled) else FULL for each in types]
        return tuple(
            AttentionLayer(kind, role, self.indexer.enabled and role == FULL) for kind, role in zip(kinds, roles, strict=True)
        )

    def validate(self, n_layers: int) -> None:
        implementations = parse_implementations("model.attention.implementation", self.implementation)
        self._check_layer_types(n_layers)
        used = {layer.kind for layer in self.layers(n_layers)}
        for kind in sorted({self.kind, *used}):
            _KINDS[kind].check(self)
        self.rope.validate()
        self.indexer.validate()
        if self.indexer.enabled:
            available = min(_KINDS[kind].rotary_dim(self) for kind in used)
            if self.indexer.rope_dim > available and self.rope.scaling != "none":
                raise ConfigError(
                    f"model.attention.indexer.rope_dim is {self.indexer.rope_dim}; expected at most the {available} rotary "
                    "channels of the attention when rope scaling is on."
                )
            scoring = {implementations.index_topk, implementations.indexer_kl}
            if self.indexer.activation != "relu" and not scoring <= {None, *PORTABLE}:
                raise ConfigError(
                    f"model.attention.indexer.activation is {self.indexer.activation!r}, which the kernels of "
                    f"model.attention.implementation={self.implementation!r} do not have; expected 'relu'. Set the "
                    "implementation to auto, xla or reference."
                )
        self.check_can_run("model.attention.mode", self.mode)

    def _check_layer_types(self, n_layers: int) -> None:
        types, name = self.layer_types, "model.attention.layer_types"
        if types and len(types) != n_layers:
            raise ConfigError(f"{name} has {len(types)} entries; expected one per layer ({n_layers}).")
        if WINDOW in types:
            positive("model.attention.window", self.window)
        if self.indexer.enabled and types:
            roles = [layer.role for layer in self.layers(n_layers)]
            if FULL not in roles:
                raise ConfigError(f"{name} has no 'full' layer, so no layer has an indexer; expected one at least.")
            if SHARED in roles[: roles.index(FULL)]:
                raise ConfigError(f"{name} has a 'shared' layer before the first 'full' one, with no selection to reuse.")
        if self.indexer.distill_shared and SHARED not in types:
            raise ConfigError(
                "model.attention.indexer.distill_shared is True, but layer_types has no 'shared' layer to learn from. Name "
                "some, or set distill_shared=False."
            )

    def check_can_run(self, name: str, attention: str) -> None:
        """Make sure that the model has what `attention` needs; `name` is the field that asks for it.

        Raises:
            ConfigError: naming that field and the one to set.
        """
        check_selection(name, attention)
        row = selection(attention)
        if row.by_indexer and not self.indexer.enabled:
            raise ConfigError(f"{name} is {attention!r} without an indexer. Set model.attention.indexer.enabled=True.")
        if row.kind and self.following_kinds != {row.kind}:
            raise ConfigError(
                f"{name} is {attention!r}, whose weights the model lacks in some layers. Set model.attention.kind={row.kind!r} "
                "for all layers but dense ones and windows."
            )

    @property
    def following_kinds(self) -> set[str]:
        """Kinds of the layers that follow the mode."""
        types = self.layer_types or (FULL,)
        return {self.kind if each in ROLES else each for each in types if each not in (DENSE, WINDOW)}


class AttentionLayer(NamedTuple):
    """Attention of one layer: its kind, its role (one of `ROLES`), and whether it has an indexer of its own."""

    kind: str
    role: str
    has_indexer: bool


def _check_gqa(attention: AttentionConfig) -> None:
    positive("model.attention.n_kv_heads", attention.n_kv_heads)
    positive("model.attention.head_dim", attention.head_dim)
    if attention.n_heads % attention.n_kv_heads:
        raise ConfigError(
            f"model.attention.n_heads is {attention.n_heads}; expected a multiple of n_kv_heads ({attention.n_kv_heads})."
        )
    if attention.head_dim % 2:
        raise ConfigError(f"model.attention.head_dim is {attention.head_dim}; expected an even number for rotation.")


def _check_mla(attention: AttentionConfig) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        positive(f"model.attention.{name}", getattr(attention, name))
    if attention.qk_rope_head_dim % 2:
        raise ConfigError(
            f"model.attention.qk_rope_head_dim is {attention.qk_rope_head_dim}; expected an even number for rotation."
        )


def _check_nsa(attention: AttentionConfig) -> None:
    _check_gqa(attention)
    attention.nsa.validate()


_GQA_FIELDS = ("n_kv_heads", "head_dim", "qk_norm", "use_bias", "use_out_bias")
_MLA_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "latent_norm_eps")
GQA = KindFields("gqa", _GQA_FIELDS, lambda attention: attention.head_dim, _check_gqa)
MLA = KindFields("mla", _MLA_FIELDS, lambda attention: attention.qk_rope_head_dim, _check_mla)
NSA = KindFields("nsa", (*_GQA_FIELDS, "nsa"), lambda attention: attention.head_dim, _check_nsa, base=GQA.name)
_KINDS: dict[str, KindFields] = {kind.name: kind for kind in (GQA, MLA, NSA)}


def kinds() -> tuple[str, ...]:
    """Every value of `model.attention.kind`."""
    return tuple(_KINDS)


def base_kind(kind: str) -> str:
    """The kind whose layers `kind` extends; `kind` itself where it extends none."""
    return _KINDS[kind].base or kind


def extended(attention: AttentionConfig, by: AttentionConfig) -> AttentionConfig:
    """`attention`, as the kind of `by` and with the fields that only it reads where that kind extends it; else unchanged."""
    if _KINDS[by.kind].base != attention.kind:
        return attention
    own = {name: getattr(by, name) for name in _KINDS[by.kind].fields if name not in _KINDS[attention.kind].fields}
    return copy.deepcopy(dataclasses.replace(attention, kind=by.kind, **own))


def kind_fields(name: str) -> KindFields:
    """The row of an attention kind."""
    return _KINDS[name]


def add_kind_fields(kind: KindFields) -> None:
    """Make a kind known to configs; `register_kind` of `dsa_jax.model.attention.kinds` calls it.

    Raises:
        ConfigError: where the name is taken, also by a role of a layer.
    """
    if kind.name in (*_KINDS, *ROLES):
        raise ConfigError(f"the attention kind {kind.name!r} exists; expected a name of its own.")
    _KINDS[kind.name] = kind


def remove_kind_fields(name: str) -> None:
    """Forget a kind that `add_kind_fields` made known."""
    del _KINDS[name]


def unused_fields(kind: str) -> tuple[str, ...]:
    """Fields of `AttentionConfig` that only other kinds read."""
    return tuple(dict.fromkeys(field for row in _KINDS.values() for field in row.fields if field not in _KINDS[kind].fields))
