"""Configuration as nested dataclasses: one tree, every field overridable from the command line.

The dataclasses stay unfrozen because flag overrides are assigned after construction; call `Config.validate()` once they
have been. Lengths are in tokens, learning rates are absolute, fractions lie in [0, 1].
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the field, its value, what was expected and what to do."""


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
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def validate(self) -> None:
        _one_of("attention.rope.scaling", self.scaling, ("none", "yarn", "llama3"))
        _positive("attention.rope.theta", self.theta)
        _positive("attention.rope.factor", self.factor)


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
    layer_types: tuple[str, ...] = ()  # per layer "full" or "shared" (reuses the previous full layer); empty: all full

    def validate(self, n_layers: int) -> None:
        if not self.enabled:
            return
        for name in ("n_heads", "head_dim", "topk"):
            _positive(f"model.attention.indexer.{name}", getattr(self, name))
        _one_of("model.attention.indexer.rope_layout", self.rope_layout, ("half_split", "interleaved"))
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
                _one_of("model.attention.indexer.layer_types", kind, ("full", "shared"))
            if self.layer_types[0] != "full":
                raise ConfigError(
                    "model.attention.indexer.layer_types starts with 'shared'; the first layer has no earlier one."
                )


@dataclass
class AttentionConfig:
    """Multi-head latent attention (`mla`) or grouped-query attention (`gqa`), with an optional indexer."""

    kind: str = "gqa"  # mla | gqa
    mode: str = "dense"  # how the checkpoint was trained: dense | sparse
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
    latent_norm_eps: float = 1e-6  # mla: norms of the query and the key-value latent
    implementation: str = "auto"  # auto | reference | xla | pallas | triton | cute
    rope: RopeConfig = field(default_factory=RopeConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)

    def validate(self, n_layers: int) -> None:
        _one_of("model.attention.kind", self.kind, ("mla", "gqa"))
        _one_of("model.attention.mode", self.mode, ("dense", "sparse"))
        _one_of("model.attention.rope_layout", self.rope_layout, ("half_split", "interleaved"))
        _one_of("model.attention.implementation", self.implementation, ("auto", "reference", "xla", "pallas", "triton", "cute"))
        _positive("model.attention.n_heads", self.n_heads)
        if self.kind == "gqa":
            _positive("model.attention.n_kv_heads", self.n_kv_heads)
            _positive("model.attention.head_dim", self.head_dim)
            if self.n_heads % self.n_kv_heads:
                raise ConfigError(
                    f"model.attention.n_heads is {self.n_heads}; expected a multiple of n_kv_heads ({self.n_kv_heads})."
                )
            if self.head_dim % 2:
                raise ConfigError(f"model.attention.head_dim is {self.head_dim}; expected an even number for rotation.")
        else:
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                _positive(f"model.attention.{name}", getattr(self, name))
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
        if self.mode == "sparse" and not self.indexer.enabled:
            raise ConfigError("model.attention.mode is 'sparse' without an indexer. Set model.attention.indexer.enabled=True.")


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
        _positive("model.moe.n_routed_experts", self.n_routed_experts)
        _positive("model.moe.expert_dim", self.expert_dim)
        _one_of("model.moe.scoring", self.scoring, ("sigmoid", "softmax"))
        _one_of("model.moe.group_score", self.group_score, ("top2_sum", "max"))
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
    param_dtype: str = "float32"
    dtype: str = "float32"  # of activations and matrix products
    scan_layers: bool = True  # False unrolls the layers over the same parameters
    remat: str = "none"  # none | full | dots: what the backward pass recomputes; top-k indices never are
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def validate(self) -> None:
        for name in ("vocab_size", "hidden_dim", "n_layers", "mlp_dim", "max_positions"):
            _positive(f"model.{name}", getattr(self, name))
        _one_of("model.param_dtype", self.param_dtype, ("float32", "bfloat16"))
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("model.remat", self.remat, ("none", "full", "dots"))
        self.attention.validate(self.n_layers)
        self.moe.validate(self.n_layers)


@dataclass
class RecallConfig:
    """Record-token recall: the vocabulary of the task and how densely records are scattered."""

    n_keys: int = 32
    n_values: int = 8
    n_fillers: int = 64
    tokens_per_record: int = 16  # a sequence of length L holds L // tokens_per_record records


@dataclass
class TextConfig:
    """A text corpus. Documents go to the held-out split by a hash of their content."""

    path: str = ""  # .txt, .jsonl, .npy or a directory of them; empty: the Python standard library's own source
    tokenizer: str = "bytes"  # bytes | path of a tokenizer.json (extra `hf`)
    held_out_fraction: float = 0.1
    max_tokens: int = 0  # 0: no limit


@dataclass
class DataConfig:
    """What a batch is made of: rows of the recall task and rows of packed text."""

    recall_fraction: float = 0.5  # share of the rows of a batch; the others are text
    recall: RecallConfig = field(default_factory=RecallConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def validate(self) -> None:
        _fraction("data.recall_fraction", self.recall_fraction)
        if not 0.0 < self.text.held_out_fraction < 1.0:
            raise ConfigError(
                f"data.text.held_out_fraction is {self.text.held_out_fraction}; expected between 0 and 1, exclusive."
            )
        for name in ("n_keys", "n_values", "n_fillers", "tokens_per_record"):
            _positive(f"data.recall.{name}", getattr(self.recall, name))


@dataclass
class OptimizerConfig:
    """One optimizer with its schedule."""

    name: str = "adamw"  # adamw | muon (matrices by Muon, the rest by AdamW)
    learning_rate: float = 3e-3
    schedule: str = "cosine"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 20
    final_fraction: float = 0.1  # of learning_rate, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping

    def validate(self, prefix: str) -> None:
        _one_of(f"{prefix}.name", self.name, ("adamw", "muon"))
        _one_of(f"{prefix}.schedule", self.schedule, ("constant", "linear", "cosine"))
        _positive(f"{prefix}.learning_rate", self.learning_rate)
        _not_negative(f"{prefix}.warmup_steps", self.warmup_steps)
        _not_negative(f"{prefix}.clip_norm", self.clip_norm)
        _not_negative(f"{prefix}.weight_decay", self.weight_decay)
        _fraction(f"{prefix}.final_fraction", self.final_fraction)


@dataclass
class StageConfig:
    """One training stage. `steps` 0 skips it."""

    steps: int = 0
    batch_size: int = 16  # sequences per update
    seq_len: int = 256
    curriculum: tuple[tuple[int, int], ...] = ()  # ((until_step, seq_len), ...) before seq_len applies
    accumulation: int = 1  # micro-batches per update
    indexer_loss_weight: float = 1.0  # multiplies the KL, summed over layers
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 10
    checkpoint_every: int = 500  # the last step of a stage is always saved

    def seq_len_at(self, step: int) -> int:
        """Sequence length of the 0-based `step`, in tokens."""
        for until, seq_len in self.curriculum:
            if step < until:
                return seq_len
        return self.seq_len

    def validate(self, prefix: str) -> None:
        _not_negative(f"{prefix}.steps", self.steps)
        for name in ("batch_size", "seq_len", "accumulation", "log_every", "checkpoint_every"):
            _positive(f"{prefix}.{name}", getattr(self, name))
        _not_negative(f"{prefix}.indexer_loss_weight", self.indexer_loss_weight)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"{prefix}.batch_size is {self.batch_size}; expected a multiple of accumulation ({self.accumulation})."
            )
        last = 0
        for phase in self.curriculum:
            if len(phase) != 2 or phase[0] <= last or phase[1] < 1:
                raise ConfigError(
                    f"{prefix}.curriculum is {self.curriculum}; expected ((until_step, seq_len), ...) with rising steps and "
                    "positive lengths."
                )
            last = phase[0]
        self.optimizer.validate(f"{prefix}.optimizer")


@dataclass
class TrainConfig:
    """The three stages of a retrofit and what they share."""

    pretrain: StageConfig = field(default_factory=StageConfig)
    warmup: StageConfig = field(default_factory=StageConfig)
    sparse: StageConfig = field(default_factory=StageConfig)
    nan_policy: str = "stop"  # stop | skip (leave parameters untouched and count)
    max_skipped_steps: int = 10  # with skip: consecutive steps before stopping after all
    keep_checkpoints: int = 2  # per stage

    def validate(self) -> None:
        for name in STAGES:
            getattr(self, name).validate(f"train.{name}")
        _one_of("train.nan_policy", self.nan_policy, ("stop", "skip"))
        _positive("train.max_skipped_steps", self.max_skipped_steps)
        _positive("train.keep_checkpoints", self.keep_checkpoints)


@dataclass
class EvalConfig:
    """The parity table."""

    recall_len: int = 256
    recall_sequences: int = 128
    text_len: int = 128
    text_sequences: int = 256
    batch_size: int = 16
    rows: tuple[str, ...] = ("dense", "sparse", "untrained", "window", "oracle")
    position_buckets: int = 8

    def validate(self) -> None:
        for name in ("recall_len", "text_len", "batch_size", "position_buckets"):
            _positive(f"eval.{name}", getattr(self, name))
        for name in ("recall_sequences", "text_sequences"):
            _not_negative(f"eval.{name}", getattr(self, name))
        for row in self.rows:
            _one_of("eval.rows", row, ("dense", "sparse", "untrained", "window", "oracle"))


@dataclass
class InitConfig:
    """Where the parameters come from; empty: random."""

    checkpoint: str = ""  # a run directory; its parameters are taken, an indexer it lacks is initialised


@dataclass
class Config:
    """Everything a run needs."""

    name: str = "unnamed"
    seed: int = 0
    seeds: tuple[int, ...] = ()  # run once per seed instead, and report mean and spread
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def validate(self) -> None:
        """Check every field against the others.

        Raises:
            ConfigError: naming the first field that cannot work.
        """
        self.model.validate()
        self.data.validate()
        self.train.validate()
        self.eval.validate()
        for seed in (self.seed, *self.seeds):
            _not_negative("seed", seed)
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds is {self.seeds}; expected distinct seeds.")
        if (self.train.warmup.steps or self.train.sparse.steps) and not self.model.attention.indexer.enabled:
            raise ConfigError(
                "train.warmup.steps or train.sparse.steps is positive, but the model has no indexer. "
                "Set model.attention.indexer.enabled=True."
            )
        longest = max(
            [getattr(self.train, name).seq_len_at(s) for name in STAGES for s in (0, 10**12) if getattr(self.train, name).steps]
            + [self.eval.recall_len, self.eval.text_len]
        )
        if longest > self.model.max_positions:
            raise ConfigError(
                f"model.max_positions is {self.model.max_positions}; expected at least the longest sequence used ({longest})."
            )


STAGES = ("pretrain", "warmup", "sparse")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Build the dataclass `cls` from nested dicts as `to_dict` writes them; missing fields keep their defaults.

    Raises:
        ConfigError: for a field that `cls` does not have, with the nearest name.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{cls.__name__} has no field {name!r}.{hint}")
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            arguments[name] = from_dict(kind, value)  # type: ignore[arg-type]
        else:
            arguments[name] = _tuples(value)
    return cls(**arguments)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")


def _positive(name: str, value: int | float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is {value}; expected a positive number.")


def _not_negative(name: str, value: int | float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name} is {value}; expected zero or more.")


def _fraction(name: str, value: int | float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} is {value}; expected a fraction from 0 to 1.")
