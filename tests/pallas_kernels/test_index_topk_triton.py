"""The Triton selection under Triton's interpreter: exact, ties to the lower position; skipped where it cannot run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import IndexHeads, Visible
from pallas_kernels.index_topk import reference

MISSING = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]

# In a process of its own: Triton reads the variable when it is imported, once.
PROGRAM = """
import sys
import numpy as np
import torch
from pallas_kernels.index_topk.triton_kernels import radix_select

rows, topk, block = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
positions = torch.full((len(rows), topk), -7, dtype=torch.int32)
width = rows.shape[1]
radix_select[(len(rows),)](torch.from_numpy(rows), positions, WIDTH=width, TOPK=topk, BLOCK=block)
np.save(sys.argv[1], positions.numpy())
"""


def interpreted(rows, topk, block, directory):
    path = directory / "rows.npy"
    np.save(path, rows)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(path), str(topk), str(block)]
    root = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=root, env=environment, timeout=1500)
    return np.load(path)


def rows_of(width):
    """Random rows, rows that a threshold cannot part, and rows with too few visible entries."""
    rng = np.random.default_rng(width)
    lowest = np.finfo(np.float32).min
    few = np.full(width, -np.inf)
    few[rng.permutation(width)[:3]] = (1.0, lowest, 2.0)
    plateau = np.where(rng.random(width) < 0.1, rng.standard_normal(width), 0.0)
    close = np.float32(1.0) + rng.integers(0, 3, width) * np.float32(2.0**-23)  # one coarse bin, parted by the last bits
    kinds = (
        rng.standard_normal(width),
        np.zeros(width),
        plateau,
        -np.abs(plateau) - 1,
        close,
        few,
        np.full(width, -np.inf),
        np.where(rng.random(width) < 0.5, lowest, -np.inf),
        rng.choice([np.inf, 3e38, 1e-30, 0.0, lowest], width),
    )
    return np.stack(kinds).astype(np.float32) + np.float32(0)  # turns -0.0 into 0.0


@pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: nothing to interpret Triton kernels with")
@pytest.mark.parametrize(("width", "topk", "block"), [(62, 1, 16), (213, 100, 64), (1000, 999, 256)])
def test_radix_select_is_exact(width, topk, block, tmp_path):
    rows = rows_of(width)
    expected = np.asarray(reference.canonical_topk(jnp.asarray(rows)[None], jnp.asarray(rows > -np.inf)[None], topk))[0]
    actual = interpreted(rows, topk, block, tmp_path)
    np.testing.assert_array_equal(np.where(actual == width, -1, actual), expected)


def test_without_a_gpu_or_jax_triton_it_says_so():
    index = IndexHeads(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 2, 4)), jnp.ones((1, 1, 1)))
    visible = Visible(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    with pytest.raises(NotImplementedError, match=r"index_topk: triton (needs jax-triton|runs on NVIDIA GPUs)"):
        pk.index_topk(index, visible, topk=1, implementation="triton")
