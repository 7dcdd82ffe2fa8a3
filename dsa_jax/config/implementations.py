"""Which implementation of each op of attention a model runs, written as one setting."""

from typing import NamedTuple

from dsa_jax.config.checks import ConfigError, did_you_mean

AUTO = "auto"


class Implementations(NamedTuple):
    """A name for each op of `pallas_kernels`, fields called as the ops are; None is the default of the device."""

    dense_attention: str | None = None
    attention_topk: str | None = None
    sparse_attention: str | None = None
    index_topk: str | None = None
    indexer_kl: str | None = None
    block_topk: str | None = None

    @classmethod
    def every(cls, name: str | None) -> "Implementations":
        """The same one for every op."""
        return cls(*[name] * len(cls._fields))


PORTABLE = ("reference", "xla")
AVAILABLE: dict[str, tuple[str, ...]] = {
    "dense_attention": PORTABLE,
    "attention_topk": PORTABLE,
    "sparse_attention": (*PORTABLE, "pallas"),
    "index_topk": (*PORTABLE, "pallas", "triton", "mosaic"),
    "indexer_kl": (*PORTABLE, "pallas"),
    "block_topk": PORTABLE,
}
"""The implementations of each op, repeated here so that a setting can be checked before JAX is imported."""


def parse_implementations(field: str, text: str) -> Implementations:
    """The implementation of each op by a setting: "auto", one name for all, or "sparse_attention=pallas,index_topk=triton".

    Ops that a list does not name run the default of the device.

    Raises:
        ConfigError: for an op or an implementation that does not exist, or one that an op lacks.
    """
    if text == AUTO:
        return Implementations()
    if "=" not in text:
        chosen = Implementations.every(text)._asdict()
    else:
        chosen = {}
        for part in text.split(","):
            op, _, name = (x.strip() for x in part.partition("="))
            if op not in Implementations._fields:
                hint = did_you_mean(op, Implementations._fields)
                raise ConfigError(f"{field} names the op {op!r}; expected one of {', '.join(Implementations._fields)}.{hint}")
            if op in chosen:
                raise ConfigError(f"{field} names {op} twice; expected each op once.")
            chosen[op] = name
    for op, name in chosen.items():
        if name not in AVAILABLE[op]:
            raise ConfigError(_lacking(field, text, op, name))
    return Implementations(**chosen)


def _lacking(field: str, text: str, op: str, name: str) -> str:
    having = [other for other, names in AVAILABLE.items() if name in names]
    if not having:
        known = dict.fromkeys(name for names in AVAILABLE.values() for name in names)
        return f"{field} is {text!r}; expected {AUTO}, one of {', '.join(known)}, or a list such as sparse_attention=pallas."
    advice = ",".join(f"{other}={name}" for other in having)
    return (
        f"{field} is {text!r}, but {op} has no implementation {name!r}; it has {', '.join(AVAILABLE[op])}. Name the ops that "
        f"have it, as in {advice}; the others run their default."
    )
