"""One stage of training: its length, batches and optimizer."""

from dataclasses import dataclass, field

from dsa_jax.config.checks import ConfigError, shown
from dsa_jax.config.limits import (
    AMOUNT,
    COUNT,
    FRACTION,
    INT32,
    LENGTH,
    ROWS,
    ROWS_IF_SET,
    WEIGHT,
    Choices,
    Range,
    limited,
)


@dataclass
class OptimizerConfig:
    """One optimizer with its schedule."""

    name: str = limited("adamw", Choices(("adamw", "muon")))  # adamw | muon (matrices by Muon, the rest by AdamW)
    learning_rate: float = limited(3e-3, Range(1e-15, 1e3))  # peak, after the warm-up
    schedule: str = limited(
        "cosine", Choices(("constant", "linear", "cosine"))
    )  # constant | linear | cosine, after the warm-up
    warmup_steps: int = limited(20, AMOUNT)  # over which the learning rate rises linearly
    final_fraction: float = limited(0.1, FRACTION)  # of learning_rate, where the schedule ends, one step after the last
    b1: float = limited(0.9, FRACTION)  # decay of the mean of gradients
    b2: float = limited(0.95, FRACTION)  # decay of the mean of squared gradients
    eps: float = limited(1e-8, Range(1e-30, 1e3))  # added to the root of the mean of squared gradients
    weight_decay: float = limited(0.0, Range(0, 1e3))  # on matrices only
    clip_norm: float = limited(1.0, Range(1e-9, 1e9, or_zero=True))  # global gradient norm; 0: no clipping
    indexer_learning_rate: float = limited(
        0.0, Range(1e-15, 1e3, or_zero=True)
    )  # of indexers, which then are clipped and decayed apart; 0: as all other parameters
    indexer_weight_decay: float = limited(0.0, Range(0, 1e3))  # with indexer_learning_rate: on the matrices of indexers

    def validate(self, prefix: str) -> None:
        if self.indexer_weight_decay and not self.indexer_learning_rate:
            raise ConfigError(
                f"{prefix}.indexer_weight_decay is {self.indexer_weight_decay} without {prefix}.indexer_learning_rate; "
                "expected both or neither."
            )
        for name in ("b1", "b2"):
            if getattr(self, name) == 1.0:
                raise ConfigError(f"{prefix}.{name} is 1; expected less, since a mean that decays by 1 never moves.")


@dataclass
class StageConfig:
    """One training stage, as long as `steps` or `tokens` says; with both 0 it is skipped."""

    steps: int = limited(0, AMOUNT)  # updates; 0: by tokens
    tokens: int = limited(
        0, Range(0, 2**60)
    )  # instead of steps: that many tokens, padding included, in whole steps, rounded up; 0: by steps
    batch_size: int = limited(16, ROWS)  # sequences per update
    seq_len: int = limited(256, LENGTH)  # tokens of each row
    curriculum: tuple[tuple[int, int], ...] = limited((), COUNT)  # ((until_step, seq_len), ...) before seq_len applies
    accumulation: int = limited(
        1, ROWS_IF_SET
    )  # micro-batches per update; 0: as many as leave each device one row, whatever the layout
    indexer_loss_weight: float = limited(1.0, WEIGHT)  # multiplies the KL, summed over layers
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = limited(10, COUNT)  # steps between lines of metrics.jsonl
    evaluate_every: int = limited(0, AMOUNT)  # steps between looks at held-out rows, dense and sparse; 0: none
    checkpoint_every: int = limited(500, COUNT)  # the last step of a stage is always saved

    @property
    def n_steps(self) -> int:
        """Steps of the stage: `steps`, or the fewest that see `tokens`."""
        if not self.tokens:
            return self.steps
        first, left = 0, -(-self.tokens // self.batch_size)
        for until, seq_len in self.curriculum:
            if left <= (until - first) * seq_len:
                return first - (-left // seq_len)
            first, left = until, left - (until - first) * seq_len
        return first - (-left // self.seq_len)

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` steps, padding included."""
        first = per_row = 0
        for until, seq_len in (*self.curriculum, (step, self.seq_len)):
            last = max(first, min(until, step))
            first, per_row = last, per_row + (last - first) * seq_len
        return self.batch_size * per_row

    def seq_len_at(self, step: int) -> int:
        """Sequence length of the 0-based `step`, in tokens."""
        for until, seq_len in self.curriculum:
            if step < until:
                return seq_len
        return self.seq_len

    @property
    def lengths(self) -> set[int]:
        """The sequence lengths that steps may have, in tokens."""
        return {self.seq_len, *(length for _, length in self.curriculum)}

    @property
    def longest(self) -> int:
        """The longest sequence of any step, in tokens."""
        return max(self.lengths)

    def validate(self, prefix: str) -> None:
        if self.accumulation and self.batch_size % self.accumulation:
            raise ConfigError(
                f"{prefix}.batch_size is {self.batch_size}; expected a multiple of accumulation ({self.accumulation})."
            )
        last = 0
        for phase in self.curriculum:
            if len(phase) != 2 or phase[0] <= last:
                raise ConfigError(
                    f"{prefix}.curriculum is {shown(self.curriculum)}; expected ((until_step, seq_len), ...) with "
                    "rising steps and positive lengths."
                )
            last = phase[0]
        if self.steps and self.tokens:
            raise ConfigError(
                f"{prefix}.steps is {self.steps} and {prefix}.tokens is {self.tokens}; expected one of them. Drop one: "
                f"{prefix}.steps=0 trains by tokens, {prefix}.tokens=0 by steps."
            )
        if self.n_steps > INT32:
            raise ConfigError(
                f"{prefix}.tokens is {self.tokens}, which takes {self.n_steps} steps; expected at most {INT32}. Lower it, or "
                f"raise {prefix}.batch_size or {prefix}.seq_len."
            )
        self.optimizer.validate(f"{prefix}.optimizer")
