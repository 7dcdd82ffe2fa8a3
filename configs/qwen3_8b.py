"""Qwen3-8B: 8,190,735,360 parameters, trained dense; a target for a retrofit.

The family of configs/qwen3_0_6b.py, wider and deeper, with a head of its own. The indexer has 16 heads of 64, all channels
rotated, as the public conversion of Qwen3-4B chose for the selection of tokens (aarti-cerebras/verl,
docs/qwen3_4b_dsa/plan_v2.md).

Sources: huggingface.co/Qwen/Qwen3-8B `config.json`; arXiv 2505.09388.
Command: `python -m experiments.dry_run --config=configs/qwen3_8b.py`; configs/retrofit_qwen3_8b.py makes it sparse.
"""

from configs import qwen3_0_6b
from dsa_jax.config import Config


def get_config() -> Config:
    config = qwen3_0_6b.get_config()
    model, attention = config.model, config.model.attention
    config.name = "qwen3_8b"
    model.hidden_dim, model.n_layers, model.mlp_dim, model.tie_embeddings = 4096, 36, 12288, False
    attention.n_heads, attention.indexer.head_dim = 32, 64
    return config
