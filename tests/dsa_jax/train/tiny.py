"""A model, data and recipe small enough to compile and train in seconds."""

from dsa_jax.config import Config, DataConfig, OptimizerConfig, RecallConfig, StageConfig
from dsa_jax.data import Batch, make_train_data


def tiny_config(kind: str = "gqa", *, moe: bool = False, steps: int = 6) -> Config:
    """Two layers, 32 wide, recall only: no corpus is read."""
    config = Config(name="tiny", seed=3)
    model = config.model
    model.vocab_size, model.hidden_dim, model.n_layers, model.mlp_dim = 320, 32, 2, 48
    attention = model.attention
    attention.kind, attention.n_heads, attention.n_kv_heads, attention.head_dim = kind, 4, 2, 8
    attention.q_lora_rank, attention.kv_lora_rank = 24, 16
    attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim = 8, 8, 8
    indexer = attention.indexer
    indexer.enabled, indexer.n_heads, indexer.head_dim, indexer.rope_dim, indexer.topk = True, 2, 8, 8, 4
    if moe:
        model.moe.n_routed_experts, model.moe.n_experts_per_token, model.moe.n_shared_experts = 4, 2, 1
        model.moe.expert_dim, model.moe.n_dense_layers, model.moe.balance_loss_weight = 16, 1, 0.01
    config.data = DataConfig(recall_fraction=1.0, recall=RecallConfig(n_keys=4, n_values=2, n_fillers=4, tokens_per_record=8))
    for name in ("pretrain", "warmup", "sparse"):
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
        setattr(
            config.train,
            name,
            StageConfig(steps=steps, batch_size=4, seq_len=16, log_every=1, checkpoint_every=4, optimizer=optimizer),
        )
    config.eval.recall_len, config.eval.recall_sequences, config.eval.batch_size, config.eval.text_sequences = 16, 6, 4, 0
    config.eval.rows = ("dense", "sparse", "untrained", "window", "oracle")
    return config


def padded_batch(config, n_rows=4):
    """Recall rows, one of them cut short by padding and one empty, so that micro-batches hold unequal counts."""
    batch = make_train_data(config.data, 0, config.model.vocab_size).batch(0, batch_size=n_rows, seq_len=16)
    segment_ids, mask = batch.segment_ids.copy(), batch.target_mask.copy()
    segment_ids[0, 14:], mask[0, 14:] = 0, False
    segment_ids[3], mask[3] = 0, False
    return Batch(batch.input_ids, batch.targets, mask, segment_ids)
