"""Wrong arguments raise one clear line; the choice of an implementation is explicit and recorded."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import ForcedKeys, IndexHeads, Visible
from pallas_kernels.common.checks import check_scale
from pallas_kernels.common.dispatch import resolve_implementation

B, T, S = 1, 3, 4
VISIBLE = Visible(jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.int32))
INDEX = IndexHeads(q=jnp.ones((B, T, 2, 4)), k=jnp.ones((B, S, 4)), weights=jnp.ones((B, T, 2)))
INDEXER = {"index": INDEX, "visible": VISIBLE}
ATTENTION = {"q": jnp.ones((B, T, 4, 6)), "k": jnp.ones((B, S, 2, 6))}
LSE = jnp.zeros((B, T, 4))
PICKED = jnp.zeros((B, T, 2), jnp.int32)

CALLS = {
    "index_scores": (pk.index_scores, INDEXER),
    "index_topk": (pk.index_topk, {**INDEXER, "topk": 2}),
    "sparse_attention": (pk.sparse_attention, {**ATTENTION, "v": None, "topk_indices": PICKED, "softmax_scale": 1.0}),
    "dense_attention": (pk.dense_attention, {**ATTENTION, "v": None, "visible": VISIBLE, "softmax_scale": 1.0}),
    "attention_topk": (pk.attention_topk, {**ATTENTION, "lse": LSE, "visible": VISIBLE, "topk": 2, "softmax_scale": 1.0}),
    "indexer_kl": (pk.indexer_kl, {**INDEXER, **ATTENTION, "lse": LSE, "softmax_scale": 1.0}),
}

WRONG = {
    "topk of 0": ("index_topk", {"topk": 0}, "topk is 0; expected a positive integer"),
    "negative topk": ("attention_topk", {"topk": -3}, "topk is -3"),
    "weights of other heads": (
        "index_topk",
        {"index": INDEX._replace(weights=jnp.ones((B, T, 3)))},
        r"index.weights has shape \[1, 3, 3\]; expected \[1, 3, 2\]",
    ),
    "half weights": (
        "indexer_kl",
        {"index": INDEX._replace(weights=jnp.ones((B, T, 2), jnp.bfloat16))},
        "index.weights has dtype bfloat16; expected float32",
    ),
    "integer queries": ("index_scores", {"index": INDEX._replace(q=jnp.ones((B, T, 2, 4), int))}, "index.q has dtype int32"),
    "index dims": ("index_scores", {"index": INDEX._replace(k=jnp.ones((B, S, 5)))}, r"index.k has shape \[1, 4, 5\]"),
    "ranges of other queries": (
        "index_topk",
        {"visible": VISIBLE._replace(end=jnp.ones((B, 9), jnp.int32))},
        r"visible.end has shape \[1, 9\]",
    ),
    "float ranges": (
        "dense_attention",
        {"visible": VISIBLE._replace(start=jnp.zeros((B, T)))},
        "visible.start has dtype float32; expected int32",
    ),
    "start after end": (
        "dense_attention",
        {"visible": VISIBLE._replace(start=jnp.asarray([[0, 2, 0]]))},
        "visible.start is 2 and visible.end is 1 at row 0, query 1; expected start <= end",
    ),
    "heads not divisible": ("dense_attention", {"k": jnp.ones((B, S, 3, 6))}, "q has 4 heads and k has 3; expected a multiple"),
    "head dims": ("sparse_attention", {"k": jnp.ones((B, S, 2, 7))}, r"k has shape \[1, 4, 2, 7\]"),
    "values of other keys": ("sparse_attention", {"v": jnp.ones((B, 5, 2, 6))}, r"v has shape \[1, 5, 2, 6\]"),
    "d_v too wide": ("sparse_attention", {"d_v": 7}, "d_v is 7; expected 1 to 6"),
    "d_v against v": ("dense_attention", {"v": jnp.ones((B, S, 2, 6)), "d_v": 5}, "d_v is 5 and v has 6 channels"),
    "selection of other queries": ("sparse_attention", {"topk_indices": PICKED[:, :2]}, r"topk_indices has shape \[1, 2, 2\]"),
    "float selection": (
        "sparse_attention",
        {"topk_indices": jnp.zeros((B, T, 2))},
        "topk_indices has dtype float32; expected int32",
    ),
    "lse of other heads": ("indexer_kl", {"lse": jnp.zeros((B, T, 2))}, r"lse has shape \[1, 3, 2\]; expected \[1, 3, 4\]"),
    "keys of another length": ("indexer_kl", {"k": jnp.ones((B, 5, 2, 6))}, r"k has shape \[1, 5, 2, 6\]"),
    "a number for a range": (
        "index_topk",
        {"visible": VISIBLE._replace(start=0)},
        "visible.start is a int; expected an array. Convert it with",
    ),
    "a list for a selection": ("sparse_attention", {"topk_indices": [[[0]]]}, "topk_indices is a list; expected an array"),
    "nothing for weights": (
        "index_scores",
        {"index": INDEX._replace(weights=None)},
        "index.weights is a NoneType; expected an array",
    ),
    "d_v that is no whole number": ("sparse_attention", {"d_v": 2.0}, "d_v is 2.0; expected 1 to 6"),
    "no scale": ("sparse_attention", {"softmax_scale": None}, "softmax_scale is None; expected a finite number"),
    "an array for a scale": ("indexer_kl", {"softmax_scale": jnp.ones(3)}, "softmax_scale is .*; expected a finite number"),
    "huge scale": ("sparse_attention", {"softmax_scale": 10**400}, "softmax_scale is 1000.*; expected a finite number"),
    "scale beyond float32": ("sparse_attention", {"softmax_scale": 1e300}, "softmax_scale is 1e.300; expected a finite number"),
    "truth for a scale": ("sparse_attention", {"softmax_scale": np.True_}, "softmax_scale is .*; expected a finite number"),
    "no channels": (
        "dense_attention",
        {"q": jnp.ones((B, T, 4, 0)), "k": jnp.ones((B, S, 2, 0))},
        r"q has shape \[1, 3, 4, 0\]; expected at least one channel",
    ),
    "no channels in values": (
        "sparse_attention",
        {"v": jnp.ones((B, S, 2, 0))},
        r"v has shape \[1, 4, 2, 0\]; expected at least one channel",
    ),
    "forced keys that are no count": (
        "index_topk",
        {"forced": ForcedKeys(1.0)},
        "forced.first is 1.0 and forced.last 0 with topk 2",
    ),
    "three ranges": (
        "dense_attention",
        {"visible": (0, 1, 2)},
        r"visible is a tuple of 3; expected a Visible or a tuple of 2. Pass",
    ),
    "an array for ranges": (
        "index_topk",
        {"visible": PICKED},
        r"visible is a .*; expected a Visible or .*Visible\(start, end\)",
    ),
    "no index heads": (
        "indexer_kl",
        {"index": None},
        r"index is a NoneType; .*Pass pallas_kernels.IndexHeads\(q, k, weights\)",
    ),
    "a number of forced keys": (
        "index_topk",
        {"forced": 1},
        r"forced is a int; .*Pass pallas_kernels.ForcedKeys\(first, last\)",
    ),
    "sinks of other heads": ("sparse_attention", {"sink": jnp.zeros(2)}, r"sink has shape \[2\]; expected \[4\]"),
    "half sinks": ("dense_attention", {"sink": jnp.zeros(4, jnp.bfloat16)}, "sink has dtype bfloat16; expected float32"),
    "infinite scale": ("dense_attention", {"softmax_scale": float("inf")}, "softmax_scale is inf; expected a finite number"),
    "topk beyond int32": ("index_topk", {"topk": 2**31}, r"topk is 2147483648; expected a positive integer below 2\*\*31"),
    "topk of thousands of digits": ("attention_topk", {"topk": 10**5000}, "topk is a number of thousands of digits; expected"),
    "truth for topk": ("index_topk", {"topk": True}, "topk is True; expected a positive integer"),
    "big-endian queries": (
        "sparse_attention",
        {"q": np.ones((B, T, 4, 6), ">f4")},
        r"q has dtype >f4, in another byte order than this machine's; expected <f4. Convert it with q.astype",
    ),
    "big-endian selection": ("indexer_kl", {"topk_indices": np.zeros((B, T, 2), ">i4")}, "topk_indices has dtype >i4"),
    "big-endian ranges": (
        "dense_attention",
        {"visible": VISIBLE._replace(end=np.ones((B, T), ">i4"))},
        "visible.end has dtype",
    ),
    "big-endian sinks": ("dense_attention", {"sink": np.zeros(4, ">f4")}, "sink has dtype >f4"),
    "big-endian index keys": ("index_scores", {"index": INDEX._replace(k=np.ones((B, S, 4), ">f8"))}, "index.k has dtype >f8"),
    "a number for an axis": ("indexer_kl", {"head_axis": 3}, "head_axis is 3; expected None, or inside shard_map the name"),
    "several axes": ("indexer_kl", {"head_axis": ("tensor",)}, r"head_axis is \('tensor',\); expected None"),
    "an axis that is nowhere": ("indexer_kl", {"head_axis": "tensor"}, "head_axis is 'tensor'; expected None"),
    "a long implementation": ("sparse_attention", {"implementation": "x" * 5000}, "implementation is 'x+...; expected one of"),
    "no such implementation": (
        "index_topk",
        {"implementation": "cuda"},
        "implementation is 'cuda'; expected one of reference, xla",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    op, change, message = WRONG[name]
    function, arguments = CALLS[op]
    with pytest.raises(ValueError, match=message) as caught:
        function(**{**arguments, **change})
    assert str(caught.value).startswith(f"{op}: ") and "\n" not in str(caught.value)


COARSE = {**INDEXER, "topk": 2, "block_size": 2, "n_blocks": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "implementation is 'cuda'; expected one of"),
        ({"implementation": "pallas", "activation": "none"}, "implementation 'pallas' has activation 'relu' only"),
        ({"topk": 2**31}, "topk is 2147483648"),
        ({"n_blocks": 2**63}, "n_blocks 9223372036854775808; expected positive whole numbers below"),
    ],
)
def test_a_coarse_selection_speaks_of_itself(change, message):
    with pytest.raises((ValueError, NotImplementedError), match=f"^index_topk_coarse_to_fine: .*{message}"):
        pk.index_topk_coarse_to_fine(**{**COARSE, **change})


def test_a_kernel_names_the_op_that_runs_it():
    for op, more in (("index_topk", {"topk": 2}), ("index_scores", {})):
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match=f"^{op}: "):
            double = INDEX._replace(q=jnp.ones((B, T, 2, 4), jnp.float64), k=jnp.ones((B, S, 4), jnp.float64))
            getattr(pk, op)(double, VISIBLE, implementation="pallas", **more)


def test_settings_have_their_full_name():
    messages = []
    for op, change in (("index_topk", {"topk": 0}), ("index_topk", {"forced": ForcedKeys(9)})):
        function, arguments = CALLS[op]
        with pytest.raises(ValueError) as caught:
            function(**{**arguments, **change})
        messages.append(str(caught.value))
    assert all("Check model.attention.indexer." in message for message in messages)


def test_a_scale_is_any_number_that_is_known():
    for scale in (2, 0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        check_scale("op", scale)
    with pytest.raises(ValueError, match=r"softmax_scale is .*; expected a finite number, known before tracing"):
        jax.jit(lambda scale: check_scale("op", scale))(0.5)


def quantization(function, *arguments):
    return lambda: getattr(pk.quantize, function)(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (quantization("hadamard_transform", jnp.float32(1)), r"x has shape \[\]; expected \[..., channels\], at least one"),
        (quantization("hadamard_transform", jnp.ones((2, 4), int)), "x has dtype int32; expected one of float16"),
        (quantization("quantize_fp8", jnp.ones((2, 0))), r"x has shape \[2, 0\]; expected"),
        (quantization("unpack_vector_fp8", jnp.zeros((2, 12))), r"rows has dtype float32 and shape \[2, 12\]; expected uint8"),
        (
            quantization("unpack_latent_fp8", jnp.zeros((2, 12), jnp.uint8), 0),
            "latent_dim is 0; expected a positive",
        ),
        (lambda: pk.pool_blocks([1.0], 2), "k is a list; expected an array"),
        (lambda: pk.pool_blocks(jnp.ones((2, 3)), 2), r"k has shape \[2, 3\]; expected \[any, any, any\]"),
        (lambda: pk.pool_blocks(jnp.ones((1, 2, 3)), 2.0), "block_size is 2.0; expected a positive number of keys"),
        (quantization("quantize_fp8", [1.0]), "x is a list; expected an array"),
        (quantization("simulate_fp8", jnp.ones(3, int)), "^simulate_fp8: x has dtype int32"),
        (quantization("quantize_fp8", np.ones((2, 4), ">f4")), "x has dtype >f4, in another byte order"),
        (quantization("quantize_blocks", jnp.ones((2, 2)), (0, 1)), r"^quantize_blocks: block is \(0, 1\); expected rows"),
        (
            lambda: pk.quantize.dequantize_blocks(pk.quantize.quantize_blocks(jnp.ones((2, 2))), (2, 0)),
            r"^dequantize_blocks: block is \(2, 0\)",
        ),
        (quantization("quantize_blocks", jnp.ones(3)), r"x has shape \[3\]; expected \[..., rows, columns\]"),
        (quantization("unpack_vector_fp8", jnp.ones((2, 3), jnp.uint8)), "rows have 3 bytes; expected more than the 4"),
        (
            quantization("pack_latent_fp8", jnp.ones((2, 4)), jnp.ones((3, 2))),
            r"k_rope has shape \[3, 2\]; expected \[2, any\]",
        ),
    ],
)
def test_wrong_arguments_of_quantization(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("op", CALLS)
def test_no_gpu_may_round_float32_to_multiply_it(op, implementation):
    function, arguments = CALLS[op]
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array | tuple)}
    rest = {name: x for name, x in arguments.items() if name not in arrays}

    def run(arrays):
        result = function(**arrays, **rest, implementation=implementation)
        return sum(x.sum() for x in jax.tree.leaves(result)).astype(jnp.float32)

    is_learned = {name: jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating) for name, x in arrays.items()}
    floats = {name: x for name, x in arrays.items() if is_learned[name]}
    others = {name: x for name, x in arrays.items() if not is_learned[name]}
    text = jax.jit(jax.grad(lambda floats: run(floats | others))).lower(floats).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert all("HIGHEST" in line and "DEFAULT" not in line for line in products)
    text = jax.jit(run).lower(arrays).as_text()
    products += [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line and "DEFAULT" not in line for line in products)


HAS_TRITON, HAS_MOSAIC, WITHOUT_PALLAS = ("index_topk",), ("index_scores", "index_topk"), ("dense_attention",)


@pytest.mark.parametrize("op", CALLS)
def test_missing_implementations_raise_and_the_choice_is_recorded(op):
    function, arguments = CALLS[op]
    absent = [
        ("triton", op not in HAS_TRITON),
        ("mosaic", op not in HAS_MOSAIC),
        ("pallas", op in WITHOUT_PALLAS),
    ]
    for missing in (name for name, is_absent in absent if is_absent):
        with pytest.raises(NotImplementedError, match=re.escape(f"{op}: there is no implementation '{missing}'")):
            function(**arguments, implementation=missing)
    function(**arguments)
    assert "xla" in pk.implementations_chosen()[op].split(",")


def test_default_rule():
    assert resolve_implementation("op", None, {"reference": 1, "xla": 2}, platform="cpu") == "xla"
    assert resolve_implementation("op", None, {"reference": 1, "xla": 2}, platform="gpu") == "xla"
    assert resolve_implementation("op", None, {"reference": 1}, platform="cpu") == "reference"
    assert resolve_implementation("op", "reference", {"reference": 1, "xla": 2}, platform="cpu") == "reference"


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_platform_of_a_mesh_that_is_not_here(platform):
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("data",), abstract_device=device)):
        assert pk.traced_platform() == "gpu"
    assert pk.traced_platform() == "cpu"


def test_plain_tuples_will_do():
    for op in ("index_topk", "indexer_kl"):
        function, arguments = CALLS[op]
        plain = arguments | {"index": tuple(INDEX), "visible": tuple(VISIBLE)}
        np.testing.assert_array_equal(function(**plain), function(**arguments))


def test_unknown_range_values_are_not_checked_under_jit():
    function, arguments = CALLS["dense_attention"]
    start = jnp.asarray([[0, 2, 0]])
    out, lse = jax.jit(lambda start: function(**{**arguments, "visible": VISIBLE._replace(start=start)}))(start)
    assert bool((out[0, 1] == 0).all()) and bool((lse[0, 1] == -jnp.inf).all())  # start > end sees nothing


@pytest.mark.parametrize("op", ["sparse_attention", "indexer_kl"])
def test_same_bits_on_a_gpu_are_the_business_of_pallas(op):
    function, arguments = CALLS[op]
    function(**arguments, deterministic=True, implementation="pallas")
    function(**arguments, deterministic=True)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = jax.sharding.AbstractMesh((8,), ("data",), abstract_device=device)
    message = f"{op}: deterministic=True on a GPU needs the ordered sums"
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match=message):
        function(**arguments, deterministic=True)
