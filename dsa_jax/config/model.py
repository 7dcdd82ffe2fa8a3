"""The shape of a model as nested dataclasses: layers, widths, experts, dtypes; its attention is in `attention.py`."""

from dataclasses import dataclass, field
from typing import NamedTuple

from dsa_jax.config.attention import AttentionConfig
from dsa_jax.config.checks import ConfigError, positive, shown
from dsa_jax.config.families import families
from dsa_jax.config.fields import Settings, check_kinds
from dsa_jax.config.limits import (
    DEVIATION,
    EPSILON,
    FACTOR,
    FRACTION,
    LENGTH,
    WEIGHT,
    WIDTH,
    WIDTH_IF_USED,
    Choices,
    Range,
    limited,
)

PLAIN, FP8_BLOCKS = "plain", "fp8_blocks"
WEIGHT_FORMATS = (PLAIN, FP8_BLOCKS)
"""Storage of a model's kernels: in `param_dtype`, or in e4m3 with a float32 scale per block of 128 x 128."""
DTYPE = Choices(("float32", "bfloat16"))
OF_CHECKPOINT = "checkpoint"
DENSE_MLP, MOE = "dense", "moe"


class LayerSpec(NamedTuple):
    """One layer: attention kind and role (see `dsa_jax.config.attention.ROLES`), own indexer or not, MLP "dense" or "moe"."""

    kind: str
    role: str
    has_indexer: bool
    mlp: str


@dataclass(unsafe_hash=True)
class MoEConfig(Settings):
    """DeepSeek mixture of experts; `n_routed_experts` 0 means every MLP is dense."""

    n_routed_experts: int = limited(0, Range(0, 2**16))  # 0: every MLP is dense
    n_experts_per_token: int = limited(2, Range(0, 2**16))  # routed experts that a token visits
    n_shared_experts: int = limited(0, Range(0, 2**12))  # experts that every token visits
    expert_dim: int = limited(64, WIDTH_IF_USED)  # hidden width of an expert
    n_dense_layers: int = limited(0, Range(0, 10_000))  # first_k_dense_replace: leading layers that keep a dense MLP
    scoring: str = limited("sigmoid", Choices(("sigmoid", "softmax")))  # sigmoid (V3) | softmax (V2, Qwen3)
    n_groups: int = limited(1, Range(0, 2**16))  # groups of experts that the router chooses among first
    topk_groups: int = limited(1, Range(0, 2**16))  # groups that a token may choose experts from
    group_score: str = limited("top2_sum", Choices(("top2_sum", "max")))  # top2_sum (V3) | max (V2)
    normalize_weights: bool = True  # a token's chosen weights sum to one
    routed_scale: float = limited(1.0, FACTOR)  # multiplies the weights of routed experts
    use_score_bias: bool = True  # e_score_correction_bias, moved by load and not by gradient
    bias_update_rate: float = limited(0.001, FRACTION)  # step of the score bias towards equal load
    balance_loss_weight: float = limited(0.0, WEIGHT)  # sequence-wise

    def validate(self, n_layers: int) -> None:
        if self.n_routed_experts == 0:
            return
        positive("model.moe.expert_dim", self.expert_dim)
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


@dataclass(unsafe_hash=True)
class ModelConfig(Settings):
    """A decoder-only transformer."""

    vocab_size: int = limited(640, WIDTH)  # tokens of the embedding, padding included
    hidden_dim: int = limited(64, WIDTH)  # channels of the residual stream
    n_layers: int = limited(2, Range(1, 10_000))  # transformer blocks
    mlp_dim: int = limited(128, WIDTH)  # hidden channels of a dense MLP
    norm_eps: float = limited(1e-6, EPSILON)  # of RMSNorm
    tie_embeddings: bool = True  # the output head is the embedding, transposed
    initializer_range: float = limited(0.02, DEVIATION)  # standard deviation of kernels; the embedding has its own
    embedding_initializer_range: float = limited(1.0, DEVIATION)  # standard deviation of new embeddings
    logits_scale: float = limited(
        1.0, Range(1e-9, 1e9)
    )  # multiplies the logits; hidden_dim ** -0.5 for a tied embedding of unit variance
    max_positions: int = limited(4096, LENGTH)  # longest sequence
    family: str = limited(
        "", Choices(families, or_empty=True)
    )  # Hugging Face model_type that the weights came from; empty: trained here
    bos_token_id: int = limited(-1, Range(-1, 2**24))  # -1: none
    eos_token_ids: tuple[int, ...] = limited((), Range(0, 2**24))  # tokens that end a generated text
    param_dtype: str = limited("float32", DTYPE)  # of the parameters, and of what is exported
    dtype: str = limited(
        "float32", Choices((*DTYPE.known, OF_CHECKPOINT))
    )  # of activations and matmuls; float32 is never rounded to tf32; checkpoint: that of init.hf_dir, on a CPU float32
    weight_format: str = limited(
        PLAIN, Choices(WEIGHT_FORMATS)
    )  # plain | fp8_blocks (e4m3 kernels with block scales, but for head and router; for serving)
    scan_layers: bool = True  # False unrolls the layers over the same parameters
    remat: str = limited(
        "none", Choices(("none", "full", "dots"))
    )  # none | full | dots: what the backward pass recomputes; top-k indices never are
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer, in order."""
        n_dense = self.moe.n_dense_layers if self.moe.n_routed_experts else self.n_layers
        return tuple(
            LayerSpec(*attention, DENSE_MLP if i < n_dense else MOE)
            for i, attention in enumerate(self.attention.layers(self.n_layers))
        )

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
        check_kinds(self, "model.")
        if self.dtype == OF_CHECKPOINT:
            raise ConfigError(
                f"model.dtype is {OF_CHECKPOINT!r} without a checkpoint; expected {' or '.join(DTYPE.known)}. Set it, or give "
                "--config.init.hf_dir=DIR."
            )
        for name, tokens in (("bos_token_id", (self.bos_token_id,)), ("eos_token_ids", self.eos_token_ids)):
            if max(tokens, default=-1) >= self.vocab_size:
                raise ConfigError(
                    f"model.{name} is {shown(getattr(self, name))}; expected token ids below model.vocab_size "
                    f"({self.vocab_size})."
                )
        self.attention.validate(self.n_layers)
        self.moe.validate(self.n_layers)
