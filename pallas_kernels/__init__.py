"""Array operations of DeepSeek Sparse Attention: scores, selection, sparse and dense attention, indexer loss.

Every op has one public function with an `implementation` argument; None takes the default rule of the device. The ops know
arrays only: no parameters, no model configuration.
"""

from pallas_kernels.block_topk.api import block_topk
from pallas_kernels.block_topk.geometry import BlockGeometry
from pallas_kernels.common.checks import checked
from pallas_kernels.common.dispatch import IMPLEMENTATIONS, implementations_chosen, resolve_implementation, traced_platform
from pallas_kernels.common.mesh import vary_alike
from pallas_kernels.dense_attention.api import DenseAttentionOutput, attention_topk, dense_attention
from pallas_kernels.index_topk.api import index_scores, index_topk
from pallas_kernels.index_topk.block_pooling import pool_blocks
from pallas_kernels.index_topk.coarse_to_fine import index_topk_coarse_to_fine
from pallas_kernels.indexer_loss.api import indexer_kl
from pallas_kernels.sparse_attention.api import SparseAttentionOutput, sparse_attention, sparse_attention_fp8
from pallas_kernels.types import ForcedKeys, IndexHeads, Visible

__all__ = [
    "IMPLEMENTATIONS",
    "BlockGeometry",
    "DenseAttentionOutput",
    "ForcedKeys",
    "IndexHeads",
    "SparseAttentionOutput",
    "Visible",
    "attention_topk",
    "block_topk",
    "checked",
    "dense_attention",
    "implementations_chosen",
    "index_scores",
    "index_topk",
    "index_topk_coarse_to_fine",
    "indexer_kl",
    "pool_blocks",
    "resolve_implementation",
    "sparse_attention",
    "sparse_attention_fp8",
    "traced_platform",
    "vary_alike",
]
