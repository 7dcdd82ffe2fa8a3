"""Eight emulated devices as the layouts that are tested, and models whose heads, experts and widths split over all of them."""

import functools

import jax

from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig, MoEConfig, ParallelConfig, RopeConfig
from dsa_jax.parallel.mesh import make_mesh

PRESETS = (
    "fsdp8",
    "ep8",
    "tp8",
    "cp8",
    "ep4_tp2",
    "fsdp2_tp2_cp2",
    "ep2_tp2_cp2",
    "ep2_fsdp4",
    "tp2_cp4",
    "fsdp4_tp2",
)
VOCAB, N_LAYERS = 328, 3


@functools.cache
def mesh(preset):
    """The mesh of a preset over the eight devices."""
    assert jax.device_count() == 8
    return make_mesh(ParallelConfig(preset=preset))


def eight_way_config(kind, *, moe, **model_fields):
    """One stack of layers of `kind` gqa or mla. Not with fp8, whose rounding turns the last bit of a sum into a step.

    No two axes of what tests look for in programs are equally long.
    """
    indexer = IndexerConfig(enabled=True, n_heads=2, head_dim=16, rope_dim=8, topk=5)
    attention = AttentionConfig(kind=kind, n_heads=8, n_kv_heads=8, head_dim=8, implementation="xla", indexer=indexer)
    if kind == "mla":
        attention.q_lora_rank, attention.kv_lora_rank = 32, 16
        attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim = 8, 8, 8
        attention.rope = RopeConfig(scaling="yarn", factor=4.0, original_max_positions=64, mscale_all_dim=1.0)
        attention.rope_layout = "interleaved"
    fields = {"vocab_size": VOCAB, "hidden_dim": 32, "n_layers": N_LAYERS, "mlp_dim": 64, "attention": attention}
    if moe:
        fields["moe"] = MoEConfig(
            n_routed_experts=8, n_experts_per_token=2, n_shared_experts=1, expert_dim=16, n_dense_layers=0, n_groups=4,
            topk_groups=2, routed_scale=1.5,
        )  # fmt: skip
    return ModelConfig(**(fields | model_fields))
