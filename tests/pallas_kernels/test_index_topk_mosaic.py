"""The Mosaic kernel of the index scores: interpreted against the float64 reference, hostile inputs, and what it refuses."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower_for_h200
from ops_helpers import assert_close, in_float64, normal, ranges
from shapes import IndexShape
from test_index_topk import inputs

import pallas_kernels as pk
from pallas_kernels import IndexHeads, Visible
from pallas_kernels.index_topk import mosaic_gpu, reference
from pallas_kernels.quantize import quantize_fp8
from pallas_kernels.tuning import WarpgroupTiles

HAS_MOSAIC = jax.__version_info__ >= mosaic_gpu.LEAST_JAX
needs_mosaic = pytest.mark.skipif(not HAS_MOSAIC, reason="Mosaic GPU of this jax is another")

ONE_QUERY = IndexShape(2, 1, 213, 16, 64, 9)
ODD = IndexShape(1, 62, 213, 8, 32, 17)
MANY_PARTS = IndexShape(2, 5, 700, 64, 128, 33)
SHAPES = {
    "one_key": (IndexShape(1, 1, 1, 8, 16, 1), "bfloat16", "causal", None),
    "one_query": (ONE_QUERY, "bfloat16", "random", None),
    "odd": (ODD, "bfloat16", "packed", WarpgroupTiles(16, 64, 1, 3)),
    "odd_one_stage": (ODD, "float16", "mostly_empty", WarpgroupTiles(4, 64, 2, 1)),
    "many_parts": (MANY_PARTS, "bfloat16", "causal", None),
    "fp8": (MANY_PARTS, "float8_e4m3fn", "random", WarpgroupTiles(4, 128, 2, 2)),
    "213_queries": (IndexShape(1, 213, 95, 24, 48, 8), "bfloat16", "causal", None),
}


def interpreted(directory, calls):
    """Results of calls {name: (arguments, dtype, tiles, topk)}, all in one other process."""
    root = Path(__file__).parents[2]
    for name, (arguments, dtype, tiles, topk) in calls.items():
        arrays = {key: np.asarray(x, np.float32 if key in ("q", "k") else None) for key, x in arguments.items()}
        options = {"dtype": dtype, "tiles": None if tiles is None else dataclasses.asdict(tiles), "topk": topk}
        np.savez(directory / f"{name}.npz", options=json.dumps(options), **arrays)
    paths = {name: str(directory / f"{name}.npz") for name in calls}
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tests/pallas_kernels/interpret_mosaic.py"), *paths.values()]
    subprocess.run(command, check=True, timeout=1500, env=environment, cwd=root)
    return {name: np.load(path + ".npy") for name, path in paths.items()}


def arguments_of(shape, kind, dtype, maker=normal):
    q, k, weights = inputs(shape, maker)
    q, k = (x.astype(dtype).astype(jnp.float32) for x in (q, k))
    visible = ranges(kind, shape.batch, shape.queries, shape.keys)
    return {"q": q, "k": k, "weights": weights, **visible._asdict()}


@pytest.mark.slow
@needs_mosaic
def test_scores_match_float64(tmp_path):
    given = {name: arguments_of(shape, kind, dtype) for name, (shape, dtype, kind, _) in SHAPES.items()}
    scores = interpreted(tmp_path, {name: (given[name], case[1], case[3], None) for name, case in SHAPES.items()})
    for name, arguments in given.items():
        index = IndexHeads(arguments["q"], arguments["k"], arguments["weights"])
        visible = Visible(arguments["start"], arguments["end"])
        assert scores[name].dtype == np.float32
        assert_close(scores[name], in_float64(reference.index_scores, index, visible), what=name)


@pytest.mark.slow
@needs_mosaic
def test_invisible_keys_never_matter_and_scales_multiply(tmp_path):
    shape, rng = ODD, np.random.default_rng(3)
    clean = arguments_of(shape, "random", "float32")
    clean |= {name: jnp.clip(clean[name], 70, 190) for name in ("start", "end")}
    k = clean["k"] * jnp.exp2(jnp.asarray(rng.integers(-6, 6, (1, shape.keys, 1)), jnp.float32))
    q8, k8 = quantize_fp8(clean["q"]), quantize_fp8(k)
    fp8 = clean | {"q": q8.values, "k": k8.values, "weights": clean["weights"] * q8.scales, "k_scale": k8.scales}
    calls, empty = {}, (clean["start"] == clean["end"])[..., None]
    for name, arguments, dtype in (("bf16", clean, "bfloat16"), ("fp8", fp8, "float8_e4m3fn")):
        calls[name] = (arguments, dtype, None, None)
        for poison in (np.nan, np.inf) if name == "bf16" else (np.nan,):
            changed = {key: x.astype(jnp.float32) for key, x in arguments.items() if key not in ("start", "end")}
            changed["q"] = jnp.where(empty[..., None], poison, changed["q"])
            for key in changed.keys() & {"k", "k_scale"}:
                changed[key] = changed[key].at[:, :70].set(poison).at[:, 190:].set(poison)
            calls[f"{name}, {poison}"] = (arguments | changed, dtype, None, None)
    scores = interpreted(tmp_path, calls)
    for name, actual in scores.items():
        np.testing.assert_array_equal(actual, scores[name.split(",")[0]], err_msg=name)
    visible = Visible(clean["start"], clean["end"])
    rounded = q8.values.astype(jnp.float32) * q8.scales[..., None], k8.values.astype(jnp.float32) * k8.scales[..., None]
    assert_close(scores["fp8"], in_float64(reference.index_scores, IndexHeads(*rounded, clean["weights"]), visible), what="fp8")


@pytest.mark.slow
@needs_mosaic
def test_selection_is_exact(tmp_path):
    shapes = {"odd": (ODD, "random", "bfloat16"), "parts": (MANY_PARTS, "causal", "float8_e4m3fn")}
    given = {name: inputs(shape) for name, (shape, _, _) in shapes.items()}
    visible = {name: ranges(kind, shape.batch, shape.queries, shape.keys) for name, (shape, kind, _) in shapes.items()}
    calls = {
        name: (given[name]._asdict() | visible[name]._asdict(), dtype, None, shape.topk)
        for name, (shape, _, dtype) in shapes.items()
    }
    for name, picked in interpreted(tmp_path, calls).items():
        topk = shapes[name][0].topk
        expected = pk.index_topk(given[name], visible[name], topk=topk, implementation="reference")
        np.testing.assert_array_equal(picked, expected, err_msg=name)


@needs_mosaic
@pytest.mark.parametrize("name", SHAPES)
def test_lowers_at_awkward_sizes(name):
    """The interpreter does not check what TMA and wgmma can do."""
    shape, dtype, _, tiles = SHAPES[name]
    rows = shape.batch, shape.queries
    low = [
        jax.ShapeDtypeStruct(size, dtype) for size in ((*rows, shape.heads, shape.dim), (shape.batch, shape.keys, shape.dim))
    ]
    visible = Visible(*[jax.ShapeDtypeStruct(rows, jnp.int32)] * 2)
    given = *low, jax.ShapeDtypeStruct((*rows, shape.heads), jnp.float32), visible

    def loss(weights, q, k, visible):
        return mosaic_gpu.index_scores(IndexHeads(q, k, weights), visible, interpret=False, tiles=tiles).sum()

    for function in (loss, jax.grad(loss)) if name == "fp8" else (loss,):
        text = lower_for_h200(lambda q, k, weights, visible, f=function: f(weights, q, k, visible), *given)
        assert ("mosaic_scores" in text) == (function is loss)


def call(dtype=jnp.bfloat16, heads=8, dim=32, **options):
    shape = IndexShape(1, 3, 5, heads, dim, 2)
    q, k, weights = inputs(shape)
    visible = ranges("causal", 1, 3, 5)
    return mosaic_gpu.index_scores(IndexHeads(q.astype(dtype), k.astype(dtype), weights), visible, **options)


@needs_mosaic
def test_what_is_not_covered_says_so():
    cases = {
        "runs on GPUs of the Hopper generation; this is 'cpu'": call,
        "got float32; it needs index.q and index.k of one dtype out of": functools.partial(call, jnp.float32, interpret=True),
        "a multiple of 8 heads and at most 256.*got 12": functools.partial(call, heads=12, interpret=True),
        "multiple of 32 bytes; got 24 of 2 bytes": functools.partial(call, dim=24, interpret=True),
    }
    for message, function in cases.items():
        with pytest.raises(NotImplementedError, match=f"index_scores: mosaic .*{message}"):
            function()


@pytest.mark.parametrize("op", ["index_scores", "index_topk"])
def test_it_is_never_the_default_and_does_not_run_here(op):
    q, k, weights = inputs(ODD)
    low = IndexHeads(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), weights)
    function = functools.partial(
        getattr(pk, op), low, ranges("causal", 1, 62, 213), **({} if op == "index_scores" else {"topk": 3})
    )
    message = "mosaic runs on GPUs of the Hopper" if HAS_MOSAIC else r"mosaic needs jax 0\.11\.2 or later"
    with pytest.raises(NotImplementedError, match=message):
        function(implementation="mosaic")
    assert function().shape[:2] == (1, 62)


def test_blocks_fit_in_shared_memory():
    for heads, dim, itemsize in ((64, 128, 2), (64, 128, 1), (256, 128, 1), (128, 128, 2), (256, 256, 2), (8, 32, 1)):
        tiles = mosaic_gpu.warpgroup_tiles(4096, heads, dim, itemsize)
        rows = tiles.block_q * heads + tiles.num_stages * tiles.block_k
        assert rows * dim * itemsize + 4 * tiles.block_q * heads < 232448
    assert mosaic_gpu.warpgroup_tiles(4096, 64, 128, 2) == WarpgroupTiles(8, 64, 2, 2)
    with pytest.raises(NotImplementedError, match="no room for 128 heads of 512 channels"):
        mosaic_gpu.warpgroup_tiles(4096, 128, 512, 2)
    assert mosaic_gpu.warpgroup_tiles(1, 64, 128, 2) == WarpgroupTiles(1, 64, 2, 4)
    assert mosaic_gpu.warpgroup_tiles(5, 64, 128, 1) == WarpgroupTiles(4, 64, 4, 4)
