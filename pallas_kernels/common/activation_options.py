"""What the ops of the indexer hand to an implementation so that it computes another activation than the ReLU."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.dense_attention.api import dense_attention


def activation_options(
    op: str,
    activation: str,
    run: Callable[..., Any],
    portable: tuple[Callable[..., Any], ...],
    q_index: Float[Array, "B T Hi Di"],
    k_index: Float[Array, "B S Di"],
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    implementation: str | None,
) -> dict[str, Any]:
    """The arguments `activation` and `head_lse` of an implementation; none for the ReLU, which all of them know.

    Raises:
        NotImplementedError: when `run` is not one of those in `portable` and the activation is another.
    """
    if activation == "relu":
        return {}
    if run not in portable:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} has activation 'relu' only; got activation={activation!r}. Pass "
            "implementation='xla' or 'reference' (attention.implementation in a config)."
        )
    if activation == "none":
        return {"activation": activation}
    attended = dense_attention(
        q_index,
        k_index[:, :, None],
        None,
        softmax_scale=1.0,
        d_v=1,
        visible_start=visible_start,
        visible_end=visible_end,
        implementation=implementation,
    )
    return {"activation": activation, "head_lse": attended.lse}
