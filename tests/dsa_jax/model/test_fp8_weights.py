"""Weights in fp8 blocks compute what the numbers they stand for compute, and only a part of them is wide at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import AttentionConfig, Config, ConfigError, ModelConfig, MoEConfig
from dsa_jax.dryrun import summarize
from dsa_jax.generation import generate
from dsa_jax.model import abstract_params, build_model
from dsa_jax.model.linear import Linear
from dsa_jax.model.moe.grouped_matmul import grouped_matmul
from dsa_jax.params import count_parameters, parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.train.stages import STAGES
from dsa_jax.train.step import make_train_step
from pallas_kernels.quantize import QuantizedBlocks, dequantize_part
from tests.dsa_jax.model.in_blocks import in_fp8, meaning, random_blocks, widened_params
from tests.dsa_jax.model.small import forward, random_ids, small_config

FP8 = jnp.float8_e4m3fn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(200, 576), (1, 130), (128, 256)], ids=str)
def test_a_linear_layer_with_partial_blocks(shape, dtype):
    kernel, bias = random_blocks(*shape), jnp.asarray(np.random.default_rng(2).standard_normal(shape[1]), jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, shape[0])), dtype)
    fields = {"init_std": 0.02, "dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype("bfloat16"), "use_bias": True}
    params = {"kernel": kernel.values, "block_scales": kernel.scales, "bias": bias}
    out = Linear(*shape, weight_format="fp8_blocks", **fields).apply({"params": params}, x)
    # The kernel is rounded to the dtype of the product once, as it would be at loading: the very same product follows.
    plain = Linear(*shape, **fields).apply({"params": {"kernel": jnp.asarray(meaning(kernel), dtype), "bias": bias}}, x)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out), np.asarray(plain))


def test_parts_that_cut_blocks():
    whole = random_blocks(3, 300, 270)
    for first, size in (((0, 0), (300, 270)), ((100, 128), (50, 142)), ((255, 7), (45, 1)), ((130, 0), (1, 270))):
        place = tuple(slice(start, start + length) for start, length in zip(first, size, strict=True))
        part = QuantizedBlocks(whole.values[:, *place], whole.scales)
        found = dequantize_part(part, (jnp.int32(first[0]), jnp.int32(first[1])))
        np.testing.assert_array_equal(found, meaning(whole)[:, *place])
    assert np.isnan(dequantize_part(whole, (jnp.int32(200), jnp.int32(0)))[:, 184:]).all()  # rows from 384 on have no scale


@pytest.mark.parametrize("first", [None, (0, 65)], ids=["whole", "part"])
@pytest.mark.parametrize("implementation", ["reference", None])
def test_grouped_products_with_kernels_in_fp8(implementation, first):
    kernels, sizes = random_blocks(4, 130, 210), jnp.array([3, 0, 9, 2], jnp.int32)
    place = None if first is None else (jnp.int32(first[0]), jnp.int32(first[1]))
    part = slice(None) if first is None else slice(65, 205)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((14, 130)), jnp.float32)
    share = QuantizedBlocks(kernels.values[..., part], kernels.scales)
    out = grouped_matmul(x, share, sizes, first=place, implementation=implementation)
    groups = np.repeat(np.arange(4), sizes)
    expected = np.einsum("mi,mio->mo", np.asarray(x, np.float64), meaning(kernels)[groups][..., part])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_ragged_dot_takes_no_fp8():
    with pytest.raises(NotImplementedError, match="ragged_dot takes no kernels in fp8"):
        grouped_matmul(jnp.ones((2, 4)), random_blocks(1, 4, 4), jnp.array([2], jnp.int32), implementation="ragged_dot")


@pytest.mark.parametrize(
    ("kind", "attention", "fields"),
    [("gqa_qwen", "dense", {"scan_layers": False}), ("mla_float", "sparse", {"moe": True})],
    ids=["gqa unrolled", "mla with experts"],
)
def test_a_model_computes_what_its_widened_weights_do(kind, attention, fields):
    fields = {"hidden_dim": 160, **fields}  # of more than one block
    model, params = in_fp8(kind, **fields)
    plain = build_model(small_config(kind, **fields))
    dtypes = {leaf.dtype.name for path, leaf in parameter_paths(params).items() if path.endswith("kernel")}
    assert dtypes == {"float8_e4m3fn", "float32"}  # the router's and the indexer's head weights
    assert count_parameters(params) == count_parameters(widened_params(params))
    found = forward(model, params, random_ids(), attention=attention).logits
    expected = forward(plain, widened_params(params), random_ids(), attention=attention).logits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_generated_text_is_that_of_the_widened_weights():
    fields = {"kind": "mla_float", "n_layers": 1, "tie_embeddings": False}
    model, params = in_fp8(**fields)
    plain = build_model(small_config(**fields))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [8, 9]]
    text = lambda model, params: (
        generate(
            Pretrained(small_config(**fields), model, params, None),
            prompts,
            max_new_tokens=6,
            attention="sparse",
            prefill_chunk=8,
        ).token_ids
    )
    found = text(model, params)
    assert found == text(plain, widened_params(params))
    assert len({token for row in found for token in row}) > 4  # a text that says something


def test_fresh_parameters_are_as_wide_as_plain_ones():
    for std in (0.02, 0.5, 0.0):
        layer = Linear(200, 100, std, jnp.dtype("float32"), jnp.dtype("float32"), weight_format="fp8_blocks")
        drawn = layer.init(jax.random.key(0), jnp.ones((1, 200)))["params"]
        assert np.std(meaning(QuantizedBlocks(drawn["kernel"], drawn["block_scales"]))) == pytest.approx(std, rel=0.02)


def test_training_refuses(tmp_path):
    config = Config(name="fp8", model=small_config("mla", weight_format="fp8_blocks"))
    config.eval.text_len = config.eval.recall_len = 16
    config.validate()
    config.train.pretrain.steps = 1
    for command in (summarize, lambda config: retrofit(config, tmp_path)):
        with pytest.raises(ConfigError, match=r"set model\.weight_format=plain"):
            command(config)
    with pytest.raises(ConfigError, match=r"Weights in fp8 are for serving: set model\.weight_format=plain"):
        make_train_step(build_model(config.model), STAGES["pretrain"], config)
    config.model.weight_format = "fp8"
    with pytest.raises(ConfigError, match=r"model\.weight_format is 'fp8'; expected"):
        config.validate()


@pytest.fixture
def compile_fully():
    """As a user would."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("compile_fully")
def test_a_decode_step_holds_one_layer_and_widens_less():
    """Compiled only: far less than a bfloat16 copy of the weights, less than one of a single layer."""
    n_layers, n_experts = 16, 16
    attention = AttentionConfig(
        kind="mla", n_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    )
    moe = MoEConfig(n_routed_experts=n_experts, n_experts_per_token=2, expert_dim=256)
    sizes = {"vocab_size": 64, "hidden_dim": 512, "n_layers": n_layers, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    model = build_model(ModelConfig(**sizes, weight_format="fp8_blocks", attention=attention, moe=moe))

    def extend(params, input_ids, n_new, cache):
        result = model.apply({"params": params}, input_ids, n_new, cache, method="extend")
        return result.logits, result.cache

    params = abstract_params(model)
    cache = jax.eval_shape(lambda: model.init_cache(1, 64))
    ids, n_new = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = jax.jit(extend, donate_argnums=3).lower(params, ids, n_new, cache).compile().memory_analysis()
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.dtype == FP8)
    layer = weights // n_layers
    expert_and_matrices = 2 * 4 * 512 * (256 + 512)
    assert memory.argument_size_in_bytes < 1.1 * weights
    assert memory.temp_size_in_bytes < layer + expert_and_matrices < 2 * weights / 16
