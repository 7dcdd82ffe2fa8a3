"""A step writes to its cache in place and holds nothing of size T x S: compiled only, nothing runs."""

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig
from dsa_jax.model import abstract_params, build_model

ROWS, CAPACITY, LAYERS = 2, 16384, 8


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """Compile as a user would: without optimisation everything is copied."""


def step(kind, dtype, attention, length):
    """(cache bytes, memory analysis) of the compiled step that appends `length` tokens."""
    attention_config = AttentionConfig(
        kind=kind, n_heads=4, n_kv_heads=2, head_dim=32, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, indexer=IndexerConfig(enabled=True, n_heads=2, head_dim=32, rope_dim=8, topk=64),
    )  # fmt: skip
    model = build_model(ModelConfig(vocab_size=64, hidden_dim=32, n_layers=LAYERS, mlp_dim=48, attention=attention_config))

    def extend(params, input_ids, n_new, cache):
        result = model.apply({"params": params}, input_ids, n_new, cache, attention=attention, method="extend")
        return result.logits, result.cache

    params = abstract_params(model)
    cache = jax.eval_shape(lambda: model.init_cache(ROWS, CAPACITY, dtype=dtype, page_size=64))
    ids, n_new = jax.ShapeDtypeStruct((ROWS, length), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    program = jax.jit(extend, donate_argnums=3).lower(params, ids, n_new, cache).compile()
    return cache.n_bytes, program.memory_analysis()


@pytest.mark.parametrize(
    ("kind", "dtype", "attention"),
    [("mla", "fp8", "sparse"), ("gqa", "bfloat16", "sparse"), ("mla", "float32", "dense")],
    ids=lambda name: name,
)
def test_a_decode_step_updates_its_cache_in_place(kind, dtype, attention):
    cache_bytes, memory = step(kind, dtype, attention, 1)
    assert memory.alias_size_in_bytes >= cache_bytes
    # One layer is read, widened to float32; a copy of the cache would take all of it.
    assert memory.temp_size_in_bytes < cache_bytes / 4, (memory.temp_size_in_bytes, cache_bytes)


def test_a_chunk_holds_nothing_of_its_length_times_the_capacity():
    length = 2048
    _, memory = step("mla", "bfloat16", "sparse", length)
    matrix = ROWS * length * CAPACITY * 4
    assert memory.temp_size_in_bytes < matrix / 4, (memory.temp_size_in_bytes, matrix)
