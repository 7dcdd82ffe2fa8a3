"""A dense model of 100M parameters learns code and recall at 8K on one GPU, and is retrofitted.

Command:   python -m experiments.retrofit --config=configs/h200_code_8k.py --workdir=runs/h200_code_8k
           (--config.data.text.path=DIR replaces the standard library's source: any directory of .txt or .jsonl; 60 MB are
           plenty.) Then configs/h200_code_32k.py goes on from it.
Hardware:  one H200, or two CPU cores with --config=configs/h200_code_8k.py:small, which is the same path at 1/16 of the width.
Time:      meant for parts of ten minutes: `timeout --signal=TERM 570` before the command, and the same command again until it
           ends. It has not run on a GPU yet, so neither time nor quality is known.

Latent attention of the shape that the GPU kernels are made for (latent 512 + rotary 64, 16 heads), 57e6 tokens dense, half
of them below 8K, then warm-up and sparse training with 512 of 8192 keys.
"""

from dsa_jax.config import Config, DataConfig, EvalConfig, OptimizerConfig, RecallConfig, StageConfig

LENGTH, SMALL = 8192, 64


def get_config(arg: str = "") -> Config:
    """`arg` "small" is the size for a CPU.

    Raises:
        ValueError: for another argument.
    """
    if arg not in ("", "small"):
        raise ValueError(f"the argument of this recipe is {arg!r}; expected none, or 'small'.")
    return _small() if arg else _full()


def _full() -> Config:
    config = Config(name="h200_code_8k")
    model = config.model
    model.vocab_size, model.hidden_dim, model.n_layers, model.mlp_dim = 640, 768, 12, 2048
    model.initializer_range, model.embedding_initializer_range, model.logits_scale = 768**-0.5, 1.0, 768**-0.5
    model.max_positions, model.dtype, model.remat = LENGTH, "bfloat16", "dots"
    attention = model.attention
    attention.kind, attention.n_heads, attention.kv_lora_rank = "mla", 16, 512
    attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim = 64, 64, 64
    attention.rope_layout, attention.rope.theta = "interleaved", 50000.0
    indexer = attention.indexer
    indexer.enabled, indexer.n_heads, indexer.head_dim, indexer.rope_dim, indexer.topk = True, 16, 64, 32, 512
    config.data = code_data(LENGTH)
    config.train.pretrain = StageConfig(
        steps=2000,
        batch_size=8,
        curriculum=((600, 1024), (1000, 2048), (1600, 4096)),
        seq_len=LENGTH,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=100, weight_decay=0.1),
        checkpoint_every=250,
    )
    config.train.warmup = StageConfig(
        steps=200,
        batch_size=8,
        seq_len=LENGTH,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        checkpoint_every=100,
    )
    config.train.sparse = StageConfig(
        steps=400,
        batch_size=8,
        seq_len=LENGTH,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine"),
        checkpoint_every=100,
    )
    config.eval = code_evaluation(LENGTH)
    return config


def code_data(length: int) -> DataConfig:
    """A quarter recall and needles, the rest code and text; 32 records in a row of `length`."""
    data = DataConfig(recall_fraction=0.125, tasks=(("multi_needle", 0.125),))
    data.recall = RecallConfig(tokens_per_record=length // 32)
    return data


def code_evaluation(length: int) -> EvalConfig:
    """Everything at `length`: recall, needles by depth, held-out loss by position."""
    return EvalConfig(
        recall_len=length,
        recall_sequences=32,
        text_len=length,
        text_sequences=32,
        tasks=("multi_needle", "passkey"),
        task_len=length,
        task_sequences=32,
        batch_size=4,
        rows=("dense", "sparse", "untrained", "sink_window", "oracle"),
        position_buckets=16,
    )


def _small() -> Config:
    config = shrink(_full(), LENGTH // SMALL)
    config.name = "h200_code_8k_small"
    return config


def shrink(config: Config, length: int) -> Config:
    """The recipe with a tiny model on rows of `length` tokens and a hundredth of the steps."""
    model = config.model
    model.hidden_dim, model.n_layers, model.mlp_dim, model.dtype = 48, 2, 96, "float32"
    attention = model.attention
    attention.n_heads, attention.kv_lora_rank = 2, 16
    attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim = 16, 8, 16
    indexer = attention.indexer
    indexer.n_heads, indexer.head_dim, indexer.rope_dim, indexer.topk = 2, 16, 8, length // 16
    config.data = code_data(length * 8)
    config.data.text.max_tokens = 200_000
    for stage in (config.train.pretrain, config.train.warmup, config.train.sparse):
        stage.curriculum, stage.seq_len, stage.batch_size = (), length, 8
        stage.steps = max(2, stage.steps // 100)
    rows = config.eval.rows
    config.eval = code_evaluation(length)
    config.eval.recall_sequences = config.eval.text_sequences = config.eval.task_sequences = 4
    config.eval.rows, config.eval.position_buckets = rows, 4
    return config
