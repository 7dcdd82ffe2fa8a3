"""Small models of every kind, and a forward pass that compiles once per kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig, MoEConfig, RopeConfig
from dsa_jax.model import abstract_params, build_model
from dsa_jax.model.rope import Rope
from dsa_jax.params import nested_parameters, parameter_paths

VOCAB = 64
LENGTH = 24


def small_config(kind="gqa", *, moe=False, topk=5, layer_types=(), implementation="reference", variant=(), **model_fields):
    """Two layers (three with sharing); `kind` gqa, gqa_qwen, mla, mla_float (no fp8, no Hadamard), mla_plain or none.

    The ops run as their references, which compile fastest; the ops' own tests hold the others to them. `variant`: pairs of
    further indexer fields and values.
    """
    indexer = IndexerConfig(enabled=kind != "none", n_heads=2, head_dim=16, rope_dim=8, topk=topk)
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, implementation=implementation, indexer=indexer)
    attention.layer_types, attention.window = layer_types, 6 if "window" in layer_types else 0
    if kind == "gqa_qwen":
        attention.qk_norm, attention.use_bias, attention.use_out_bias = True, True, True
        attention.rope = RopeConfig(scaling="llama3", factor=8.0, original_max_positions=16)
        indexer.rope_layout, indexer.hadamard, indexer.rope_dim = "interleaved", True, 0
    if kind.startswith("mla"):
        attention.kind, attention.rope_layout = "mla", "interleaved"
        attention.kv_lora_rank, attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim = 24, 12, 8, 10
    if kind in ("mla", "mla_float"):
        attention.q_lora_rank = 20
        attention.rope = RopeConfig(scaling="yarn", factor=4.0, original_max_positions=8, mscale_all_dim=1.0)
        indexer.fp8 = indexer.hadamard = kind == "mla"
    for name, value in variant:
        setattr(indexer, name, value)
    fields = {"vocab_size": VOCAB, "hidden_dim": 32, "n_layers": len(layer_types) or 2, "mlp_dim": 48, "attention": attention}
    if moe:
        fields["moe"] = MoEConfig(
            n_routed_experts=6, n_experts_per_token=2, n_shared_experts=1, expert_dim=24, n_dense_layers=1, n_groups=3,
            topk_groups=2, routed_scale=1.5,
        )  # fmt: skip
    return ModelConfig(**(fields | model_fields))


def small_rope(dim, layout="half_split", **fields):
    """The rotary embedding over `dim` channels; `fields` are those of `RopeConfig`."""
    return Rope(dim, layout, RopeConfig(**fields))


@functools.cache
def built(kind="gqa", **fields):
    """The model of `small_config` with the parameters of `drawn`."""
    model = build_model(small_config(kind, **fields))
    return model, drawn(model)


def drawn(model):
    """Parameters drawn with numpy, which compiles nothing; no scale or bias is trivial."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        spread = np.asarray({"kernel": 0.15, "embedding": 1.0}.get(path.split("/")[-1], 0.05), leaf.dtype)
        first = np.asarray(1 if path.endswith("scale") else 0, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape).astype(leaf.dtype) * spread + first)

    shapes = parameter_paths(abstract_params(model))
    return nested_parameters({path: draw(path, leaf) for path, leaf in shapes.items()})


@functools.partial(jax.jit, static_argnums=0, static_argnames=("attention", "indexer_loss", "everything"))
def forward(model, params, input_ids, segment_ids=None, *, attention=None, indexer_loss=None, everything=False):
    """A jitted forward pass; `everything` also returns hidden state, coverage and, where there is one, the selection."""
    return model.apply(
        {"params": params},
        input_ids,
        segment_ids=segment_ids,
        attention=attention,
        indexer_loss=indexer_loss,
        return_hidden=everything,
        return_coverage=everything,
        return_topk_indices=everything and attention != "dense",
    )


def random_ids(rows=2, length=LENGTH):
    """Rows of random tokens."""
    return jax.random.randint(jax.random.key(2), (rows, length), 0, VOCAB, dtype=jnp.int32)
