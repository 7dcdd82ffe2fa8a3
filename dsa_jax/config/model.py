"""The shape of a model as nested dataclasses: attention, indexer, experts, rotary embedding."""

from dataclasses import dataclass, field

from dsa_jax.config.checks import ConfigError, not_negative, one_of, positive
from dsa_jax.config.implementations import AUTO, PORTABLE, parse_implementations

BY_INDEXER = ("sparse", "coarse_to_fine", "blocks")
"""Attentions whose keys the indexer chooses, which its KL therefore trains."""
ATTENTIONS = ("dense", *BY_INDEXER, "window", "sink_window", "random", "oracle", "nsa")
"""What a model can be trained and run under; `model/selection.py` holds the rules, `model/nsa.py` the last one."""
PLAIN, FP8_BLOCKS = "plain", "fp8_blocks"
WEIGHT_FORMATS = (PLAIN, FP8_BLOCKS)
"""How the kernels of a model are kept: in `param_dtype`, or in e4m3 with a float32 scale per block of 128 x 128."""


@dataclass
class RopeConfig:
    """Rotary position embedding and its long-context scaling."""

    theta: float = 10000.0
    scaling: str = "none"  # none | yarn | llama3
    factor: float = 1.0
    original_max_positions: int = 4096
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 1.0  # yarn: numerator of the cos/sin magnitude
    mscale_all_dim: float = 0.0  # yarn: denominator of it; squared into the softmax scale
    attention_factor: float = 0.0  # yarn: the cos/sin magnitude itself; 0: mscale over mscale_all_dim
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def validate(self) -> None:
        one_of("attention.rope.scaling", self.scaling, ("none", "yarn", "llama3"))
        positive("attention.rope.theta", self.theta)
        positive("attention.rope.factor", self.factor)
        not_negative("attention.rope.attention_factor", self.attention_factor)
        if self.scaling != "none":
            positive("attention.rope.original_max_positions", self.original_max_positions)
        if self.scaling == "yarn" and self.theta == 1.0:
            raise ConfigError("attention.rope.theta is 1 with yarn, where every frequency is the same; expected more than 1.")
        if self.scaling == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"attention.rope.high_freq_factor is {self.high_freq_factor}; expected more than low_freq_factor "
                f"({self.low_freq_factor})."
            )


@dataclass
class IndexerConfig:
    """The lightning indexer (DeepSeek-V3.2 report, section 1)."""

    enabled: bool = False
    n_heads: int = 64
    head_dim: int = 128
    rope_dim: int = 64  # leading channels of each head that are rotated
    topk: int = 2048  # k in the paper
    rope_layout: str = "half_split"  # half_split (V3.2) | interleaved (GLM-5)
    norm_eps: float = 1e-6  # LayerNorm of the index key
    hadamard: bool = False  # rotate q and k by the orthonormal Hadamard matrix
    fp8: bool = False  # simulate e4m3 with power-of-two scales on q and k
    activation: str = "relu"  # relu | none, before the heads are weighed
    head_weights: str = "learned"  # learned | constant (every head counts the same; no projection)
    detach_input: bool = True  # False: the KL's gradient goes on into the hidden state
    forced_sink: int = 0  # first visible keys that sparse and coarse_to_fine always select, within topk
    forced_local: int = 0  # last visible keys that they always select, within topk
    coarse_block_size: int = 128  # keys per block of the modes coarse_to_fine and blocks
    coarse_blocks: int = 64  # blocks that coarse_to_fine searches key by key, beside the first and the last visible one
    coarse_pooling: str = "mean"  # mean | salient: how coarse_to_fine makes one key of a block
    coarse_loss_weight: float = 0.0  # of the KL that teaches pooled index keys to choose blocks, in the warm-up
    layer_types: tuple[str, ...] = ()  # per layer "full" or "shared" (reuses the previous full layer); empty: all full
    distill_shared: bool = False  # an indexer learns from all layers that its selection serves, not from its own alone

    def validate(self, n_layers: int) -> None:
        positive("model.attention.indexer.topk", self.topk)  # the budget of the baselines, too
        if not self.enabled:
            if self.distill_shared or self.coarse_loss_weight:
                raise ConfigError(
                    "model.attention.indexer.distill_shared and coarse_loss_weight teach an indexer, and there is none. Set "
                    "model.attention.indexer.enabled=True."
                )
            return
        for name in ("n_heads", "head_dim", "coarse_block_size", "coarse_blocks"):
            positive(f"model.attention.indexer.{name}", getattr(self, name))
        for name in ("forced_sink", "forced_local", "coarse_loss_weight"):
            not_negative(f"model.attention.indexer.{name}", getattr(self, name))
        if 0 < self.forced_sink + self.forced_local >= self.topk:
            raise ConfigError(
                f"model.attention.indexer.forced_sink is {self.forced_sink} and forced_local {self.forced_local}; expected "
                f"fewer than topk ({self.topk}) together, so that the indexer has a key to choose. Force fewer or raise topk."
            )
        one_of("model.attention.indexer.rope_layout", self.rope_layout, ("half_split", "interleaved"))
        one_of("model.attention.indexer.activation", self.activation, ("relu", "none"))
        one_of("model.attention.indexer.coarse_pooling", self.coarse_pooling, ("mean", "salient"))
        one_of("model.attention.indexer.head_weights", self.head_weights, ("learned", "constant"))
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
        if self.layer_types:
            if len(self.layer_types) != n_layers:
                raise ConfigError(
                    f"model.attention.indexer.layer_types has {len(self.layer_types)} entries; expected one per layer "
                    f"({n_layers})."
                )
            for kind in self.layer_types:
                one_of("model.attention.indexer.layer_types", kind, ("full", "shared"))
            if self.layer_types[0] != "full":
                raise ConfigError(
                    "model.attention.indexer.layer_types starts with 'shared'; the first layer has no earlier one."
                )
        if self.distill_shared and "shared" not in self.layer_types:
            raise ConfigError(
                "model.attention.indexer.distill_shared is True, but layer_types has no 'shared' layer to learn from. Name "
                "some, or set distill_shared=False."
            )

    def unpublished(self) -> list[str]:
        """Fields, as `name='value'`, that make it compute something no published checkpoint format can state."""
        if not self.enabled:
            return []
        plain = IndexerConfig()
        return [f"{name}={getattr(self, name)!r}" for name in UNPUBLISHED if getattr(self, name) != getattr(plain, name)]


UNPUBLISHED = ("activation", "head_weights", "forced_sink", "forced_local")
"""Fields of `IndexerConfig` for ablations that DeepSeek and GLM checkpoints know only at their defaults."""


@dataclass
class NSAConfig:
    """Native sparse attention (arXiv 2502.11089, section 4.1): compressed blocks, selected blocks and a window, gated."""

    enabled: bool = False
    compress_block: int = 32  # keys that become one compressed key (l in the paper)
    compress_stride: int = 16  # keys from one compressed key to the next (d)
    select_block: int = 64  # keys of a block that is read as a whole (l')
    n_select_blocks: int = 16  # blocks that a query reads (n), the forced ones among them
    n_initial_blocks: int = 1  # first blocks that every query reads
    n_local_blocks: int = 2  # blocks up to the query's own that it always reads
    window: int = 512  # last keys that the window branch reads

    def validate(self) -> None:
        if not self.enabled:
            return
        for name in ("compress_block", "compress_stride", "select_block", "n_select_blocks", "window"):
            positive(f"model.attention.nsa.{name}", getattr(self, name))
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ConfigError(
                    f"model.attention.nsa.{name} is {getattr(self, name)}; expected a multiple of compress_stride "
                    f"({self.compress_stride})."
                )
        for name in ("n_initial_blocks", "n_local_blocks"):
            not_negative(f"model.attention.nsa.{name}", getattr(self, name))
        forced = self.n_initial_blocks + self.n_local_blocks
        if self.n_select_blocks < forced:
            raise ConfigError(
                f"model.attention.nsa.n_select_blocks is {self.n_select_blocks}; expected at least the {forced} blocks that "
                "n_initial_blocks and n_local_blocks force."
            )


@dataclass
class AttentionConfig:
    """Multi-head latent attention (`mla`) or grouped-query attention (`gqa`), with an optional indexer."""

    kind: str = "gqa"  # mla | gqa
    mode: str = "dense"  # how the checkpoint was trained: one of ATTENTIONS
    n_heads: int = 4
    n_kv_heads: int = 4  # gqa
    head_dim: int = 32  # gqa
    q_lora_rank: int = 0  # mla; 0: queries straight from the hidden state
    kv_lora_rank: int = 64  # mla
    qk_nope_head_dim: int = 32  # mla
    qk_rope_head_dim: int = 16  # mla
    v_head_dim: int = 32  # mla
    rope_layout: str = "half_split"  # half_split (Llama, Qwen) | interleaved (DeepSeek, GLM)
    qk_norm: bool = False  # gqa: RMSNorm on each head of q and k (Qwen3)
    use_bias: bool = False  # gqa: bias on q, k and v
    use_out_bias: bool = False  # gqa: bias on the output projection
    latent_norm_eps: float = 1e-6  # mla: norms of the query and the key-value latent
    implementation: str = AUTO  # auto | reference | xla | by op: sparse_attention=pallas,index_topk=triton,indexer_kl=pallas
    rope: RopeConfig = field(default_factory=RopeConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    nsa: NSAConfig = field(default_factory=NSAConfig)  # gqa

    def validate(self, n_layers: int) -> None:
        one_of("model.attention.kind", self.kind, ("mla", "gqa"))
        one_of("model.attention.rope_layout", self.rope_layout, ("half_split", "interleaved"))
        implementations = parse_implementations("model.attention.implementation", self.implementation)
        positive("model.attention.n_heads", self.n_heads)
        if self.kind == "gqa":
            positive("model.attention.n_kv_heads", self.n_kv_heads)
            positive("model.attention.head_dim", self.head_dim)
            if self.n_heads % self.n_kv_heads:
                raise ConfigError(
                    f"model.attention.n_heads is {self.n_heads}; expected a multiple of n_kv_heads ({self.n_kv_heads})."
                )
            if self.head_dim % 2:
                raise ConfigError(f"model.attention.head_dim is {self.head_dim}; expected an even number for rotation.")
        else:
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                positive(f"model.attention.{name}", getattr(self, name))
            not_negative("model.attention.q_lora_rank", self.q_lora_rank)
            if self.qk_rope_head_dim % 2:
                raise ConfigError(
                    f"model.attention.qk_rope_head_dim is {self.qk_rope_head_dim}; expected an even number for rotation."
                )
        self.rope.validate()
        self.indexer.validate(n_layers)
        if self.indexer.enabled:
            available = self.qk_rope_head_dim if self.kind == "mla" else self.head_dim
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
        self.nsa.validate()
        if self.nsa.enabled and self.kind != "gqa":
            raise ConfigError(
                f"model.attention.nsa.enabled is True with model.attention.kind {self.kind!r}; native sparse attention selects "
                "by key-value group, which latent attention does not have. Use kind 'gqa', or the indexer."
            )
        self.check_can_run("model.attention.mode", self.mode)

    def check_can_run(self, name: str, attention: str) -> None:
        """Make sure that the model has what `attention` needs; `name` is the field that asks for it.

        Raises:
            ConfigError: naming that field and the one to set.
        """
        one_of(name, attention, ATTENTIONS)
        if attention in BY_INDEXER and not self.indexer.enabled:
            raise ConfigError(f"{name} is {attention!r} without an indexer. Set model.attention.indexer.enabled=True.")
        if attention == "nsa" and not self.nsa.enabled:
            raise ConfigError(f"{name} is 'nsa', whose weights the model lacks. Set model.attention.nsa.enabled=True.")


@dataclass
class MoEConfig:
    """DeepSeek mixture of experts; `n_routed_experts` 0 means every MLP is dense."""

    n_routed_experts: int = 0
    n_experts_per_token: int = 2
    n_shared_experts: int = 0
    expert_dim: int = 64
    n_dense_layers: int = 0  # first_k_dense_replace: leading layers that keep a dense MLP
    scoring: str = "sigmoid"  # sigmoid (V3) | softmax (V2, Qwen3)
    n_groups: int = 1
    topk_groups: int = 1
    group_score: str = "top2_sum"  # top2_sum (V3) | max (V2)
    normalize_weights: bool = True
    routed_scale: float = 1.0
    use_score_bias: bool = True  # e_score_correction_bias, moved by load and not by gradient
    bias_update_rate: float = 0.001
    balance_loss_weight: float = 0.0  # sequence-wise

    def validate(self, n_layers: int) -> None:
        if self.n_routed_experts == 0:
            return
        positive("model.moe.n_routed_experts", self.n_routed_experts)
        positive("model.moe.expert_dim", self.expert_dim)
        not_negative("model.moe.n_shared_experts", self.n_shared_experts)
        one_of("model.moe.scoring", self.scoring, ("sigmoid", "softmax"))
        one_of("model.moe.group_score", self.group_score, ("top2_sum", "max"))
        if not 1 <= self.n_experts_per_token <= self.n_routed_experts:
            raise ConfigError(
                f"model.moe.n_experts_per_token is {self.n_experts_per_token}; expected 1 to n_routed_experts "
                f"({self.n_routed_experts})."
            )
        if self.n_groups < 1 or self.n_routed_experts % self.n_groups:
            raise ConfigError(
                f"model.moe.n_routed_experts is {self.n_routed_experts}; expected a multiple of n_groups ({self.n_groups})."
            )
        if not 1 <= self.topk_groups <= self.n_groups:
            raise ConfigError(f"model.moe.topk_groups is {self.topk_groups}; expected 1 to n_groups ({self.n_groups}).")
        if self.topk_groups * (self.n_routed_experts // self.n_groups) < self.n_experts_per_token:
            raise ConfigError(
                f"model.moe.topk_groups is {self.topk_groups}: the kept groups hold fewer experts than n_experts_per_token "
                f"({self.n_experts_per_token}). Keep more groups."
            )
        if not 0 <= self.n_dense_layers <= n_layers:
            raise ConfigError(f"model.moe.n_dense_layers is {self.n_dense_layers}; expected 0 to n_layers ({n_layers}).")


@dataclass
class ModelConfig:
    """A decoder-only transformer."""

    vocab_size: int = 640
    hidden_dim: int = 64
    n_layers: int = 2
    mlp_dim: int = 128
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    initializer_range: float = 0.02  # standard deviation of kernels; the embedding has its own
    embedding_initializer_range: float = 1.0
    logits_scale: float = 1.0  # multiplies the logits; hidden_dim ** -0.5 for a tied embedding of unit variance
    max_positions: int = 4096
    family: str = ""  # Hugging Face model_type that the weights came from; empty: trained here
    bos_token_id: int = -1  # -1: none
    eos_token_ids: tuple[int, ...] = ()  # tokens that end a generated text
    param_dtype: str = "float32"
    dtype: str = "float32"  # of activations and matrix products; float32 is never rounded to tf32
    weight_format: str = PLAIN  # plain | fp8_blocks (e4m3 kernels with block scales, but for head and router; for serving)
    scan_layers: bool = True  # False unrolls the layers over the same parameters
    remat: str = "none"  # none | full | dots: what the backward pass recomputes; top-k indices never are
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def check_trainable(self) -> None:
        """Refuse to train weights in fp8, whose steps are far larger than an update.

        Raises:
            ConfigError: for a weight_format other than plain.
        """
        if self.weight_format != PLAIN:
            raise ConfigError(
                f"model.weight_format is {self.weight_format!r}; expected {PLAIN!r} for training. Weights in fp8 are for "
                f"serving: set model.weight_format={PLAIN}."
            )

    def validate(self) -> None:
        for name in ("vocab_size", "hidden_dim", "n_layers", "mlp_dim", "max_positions"):
            positive(f"model.{name}", getattr(self, name))
        not_negative("model.norm_eps", self.norm_eps)
        one_of("model.param_dtype", self.param_dtype, ("float32", "bfloat16"))
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.weight_format", self.weight_format, WEIGHT_FORMATS)
        one_of("model.remat", self.remat, ("none", "full", "dots"))
        self.attention.validate(self.n_layers)
        self.moe.validate(self.n_layers)
