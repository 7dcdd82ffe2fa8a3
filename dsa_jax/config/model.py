"""The shape of a model as nested dataclasses: layers, widths, experts, dtypes; its attention is in `attention.py`."""

from dataclasses import dataclass, field
from typing import NamedTuple

from dsa_jax.config.attention import AttentionConfig
from dsa_jax.config.checks import ConfigError, not_negative, one_of, positive
from dsa_jax.config.fields import Settings

PLAIN, FP8_BLOCKS = "plain", "fp8_blocks"
WEIGHT_FORMATS = (PLAIN, FP8_BLOCKS)
"""Storage of a model's kernels: in `param_dtype`, or in e4m3 with a float32 scale per block of 128 x 128."""
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


@dataclass(unsafe_hash=True)
class ModelConfig(Settings):
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
    dtype: str = "float32"  # of activations and matmuls; float32 is never rounded to tf32
    weight_format: str = PLAIN  # plain | fp8_blocks (e4m3 kernels with block scales, but for head and router; for serving)
    scan_layers: bool = True  # False unrolls the layers over the same parameters
    remat: str = "none"  # none | full | dots: what the backward pass recomputes; top-k indices never are
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
        for name in ("vocab_size", "hidden_dim", "n_layers", "mlp_dim", "max_positions"):
            positive(f"model.{name}", getattr(self, name))
        not_negative("model.norm_eps", self.norm_eps)
        one_of("model.param_dtype", self.param_dtype, ("float32", "bfloat16"))
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.weight_format", self.weight_format, WEIGHT_FORMATS)
        one_of("model.remat", self.remat, ("none", "full", "dots"))
        self.attention.validate(self.n_layers)
        self.moe.validate(self.n_layers)
