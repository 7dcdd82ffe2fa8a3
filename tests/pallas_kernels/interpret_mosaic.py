"""Runs the Mosaic kernel interpreted, in a process of its own: python interpret_mosaic.py FILE...

Each FILE is a .npz of the arguments of a call, arrays and options; its result is put beside it, as FILE.npy.
"""

import json
import os
import sys

# Read when jax starts: the interpreter takes a thread of XLA for every warpgroup, and waits forever for one that is not there.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import IndexHeads, Visible
from pallas_kernels.index_topk import mosaic_gpu
from pallas_kernels.tuning import WarpgroupTiles

# The interpreter asks for a device that it knows.
MESH = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda"))


def main(path):
    with np.load(path) as file:
        options = json.loads(str(file["options"]))
        arrays = {name: jnp.asarray(file[name]) for name in file.files if name != "options"}
    for name in ("q", "k"):
        arrays[name] = arrays[name].astype(options["dtype"])
    tiles = None if options["tiles"] is None else WarpgroupTiles(**options["tiles"])
    op, sizes = (mosaic_gpu.index_scores, {}) if options["topk"] is None else (mosaic_gpu.index_topk, {"topk": options["topk"]})
    index = IndexHeads(*(arrays.pop(name) for name in IndexHeads._fields))
    visible = Visible(*(arrays.pop(name) for name in Visible._fields))
    with use_abstract_mesh(MESH):
        run = lambda index, visible, arrays: op(index, visible, **arrays, **sizes, interpret=True, tiles=tiles)
        out = jax.jit(run)(index, visible, arrays)
    np.save(path + ".npy", np.asarray(out))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
