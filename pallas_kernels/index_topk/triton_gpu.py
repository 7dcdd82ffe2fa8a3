"""Selection by radix in Triton (through jax-triton), over scores that the Pallas kernel computes for a chunk of queries."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.common.dispatch import traced_platform
from pallas_kernels.common.mesh import vary_over, varying_axes
from pallas_kernels.index_topk import pallas_gpu
from pallas_kernels.tuning.tiles import ScanTiles
from pallas_kernels.types import IndexHeads, Visible


def index_topk(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    compute_capability: int | None = None,
    **options: Any,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection in five reads of the scores; the kernel itself is tested under Triton's interpreter.

    Args:
        compute_capability: 90 compiles for Hopper without a GPU; None asks the device.
        options: as `pallas_gpu.index_topk` takes them.

    Raises:
        NotImplementedError: without jax-triton or an NVIDIA GPU, and where the Pallas kernel does not cover the call.
    """
    if importlib.util.find_spec("jax_triton") is None:
        raise NotImplementedError(
            "index_topk: triton needs jax-triton, which is not installed. Run pip install 'dsa-jax[triton]', or pass "
            "implementation='pallas' or 'xla'."
        )
    if compute_capability is None and traced_platform() != "gpu":
        raise NotImplementedError(
            f"index_topk: triton runs on NVIDIA GPUs; this is {traced_platform()!r}. Pass implementation='xla'."
        )
    largest = functools.partial(_largest_by_radix, compute_capability=compute_capability)
    return pallas_gpu.index_topk(index, visible, topk=topk, largest=largest, **options)


def _largest_by_radix(
    ranked: Float[Array, "B C W"], topk: int, *, compute_capability: int | None
) -> Int32[Array, "B C {topk}"]:
    """Positions of the largest entries above -inf, ascending, W where there are fewer."""
    import jax_triton

    from pallas_kernels.index_topk.triton_kernels import radix_select

    batch, length, width = ranked.shape
    sizes = {"queries": batch * length, "keys": width, "topk": topk}
    tiles = tuning.choose_tiles("radix_select", sizes, ScanTiles())
    capability = {} if compute_capability is None else {"compute_capability": compute_capability}
    positions = jax_triton.triton_call(
        ranked.reshape(batch * length, width),
        kernel=radix_select,
        out_shape=jax.ShapeDtypeStruct((batch * length, topk), jnp.int32),
        grid=(batch * length,),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        WIDTH=width,
        TOPK=topk,
        BLOCK=tiles.block,
        **capability,
    )
    return vary_over(varying_axes(ranked), positions.reshape(batch, length, topk))
