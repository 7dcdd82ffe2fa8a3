"""Choice of an op's implementation: one argument, one default rule, logged once and recorded."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

from pallas_kernels.common.checks import shown

IMPLEMENTATIONS = ("reference", "xla", "pallas", "triton", "mosaic")

# The one default rule: the first of these that an op has, on every device that is not listed by itself.
# On a GPU "pallas" runs when asked for by name; it becomes the default once it has been measured on one.
_DEFAULT_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("xla", "reference"), "gpu": ("xla", "reference")}

_chosen: dict[str, set[str]] = {}


def traced_platform() -> str:
    """Platform ("cpu", "gpu") that code is being traced for: of the surrounding mesh, else that of this process.

    They differ where a program is compiled for devices that are not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is None or mesh.abstract_device.platform is None:
        return jax.default_backend()
    return "gpu" if mesh.abstract_device.platform in ("cuda", "rocm") else mesh.abstract_device.platform


def traced_device_kind() -> str:
    """The kind of device ("NVIDIA H200", "cpu") that code is being traced for, as JAX names it; see `traced_platform`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is None:
        return jax.devices()[0].device_kind
    return mesh.abstract_device.device_kind


def resolve_implementation(op: str, implementation: str | None, available: Mapping[str, Any], *, platform: str) -> str:
    """Name of the implementation of `op` that runs on `platform` ("cpu", "gpu").

    Args:
        op: name of the op, for messages.
        implementation: a name out of `IMPLEMENTATIONS`, or None for the default of the platform.
        available: the implementations this op has, by name.
        platform: as `traced_platform()` calls it.

    Raises:
        ValueError: a name that is not an implementation's.
        NotImplementedError: an implementation that this op does not have.
    """
    if implementation is None:
        order = _DEFAULT_ORDER.get(platform, _DEFAULT_ORDER["cpu"])
        return next(name for name in order if name in available)
    if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: implementation is {shown(implementation)}; expected one of {', '.join(IMPLEMENTATIONS)}, "
            "or None for the default."
        )
    if implementation not in available:
        raise NotImplementedError(
            f"{op}: there is no implementation {implementation!r}; this op has {', '.join(sorted(available))}. "
            "Pass one of those, or implementation=None for the default."
        )
    return implementation


def choose_implementation(
    op: str, implementation: str | None, available: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The function that `resolve_implementation` names; logs and records the choice the first time it is made."""
    name = resolve_implementation(op, implementation, available, platform=traced_platform())
    names = _chosen.setdefault(op, set())
    if name not in names:
        names.add(name)
        logging.info("%s runs with implementation %s", op, name)
    return available[name]


def same_bits(op: str, run: Callable[..., Any], pallas: Callable[..., Any], deterministic: bool) -> dict[str, bool]:
    """Arguments that make `run` give the same bits every run if asked to; only "pallas" has, and needs, any.

    Raises:
        NotImplementedError: for another implementation on a GPU, where XLA adds up gradients in no fixed order.
    """
    if run is pallas:
        return {"deterministic": deterministic}
    if deterministic and traced_platform() == "gpu":
        raise NotImplementedError(
            f"{op}: deterministic=True on a GPU needs the ordered sums of implementation='pallas'; XLA adds up gradients in "
            "no fixed order there. Pass implementation='pallas', or deterministic=False."
        )
    return {}


def activation_option(
    op: str,
    activation: str,
    run: Callable[..., Any],
    portable: tuple[Callable[..., Any], ...],
    implementation: str | None,
) -> dict[str, str]:
    """Keyword argument that gives `run` the activation; none for the ReLU, which every implementation has.

    Raises:
        NotImplementedError: when `run` is not one of those in `portable` and the activation is another.
    """
    if activation == "relu":
        return {}
    if run not in portable:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} has activation 'relu' only; got activation={activation!r}. Pass "
            "implementation='xla' or 'reference' (model.attention.implementation in a config)."
        )
    return {"activation": activation}


def implementations_chosen() -> dict[str, str]:
    """Implementations that were asked for, or taken by default, in this process so far, by op; several joined by a comma."""
    return {op: ",".join(sorted(names)) for op, names in sorted(_chosen.items())}
