"""`RopeConfig` from and to config.json, in both spellings: hub style and transformers 5."""

from typing import Any

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.config_fields import Fields
from dsa_jax.config import RopeConfig
from dsa_jax.foreign import shown
from dsa_jax.model.rope import yarn_mscale

_TYPES = {"default": "none", "yarn": "yarn", "llama3": "llama3"}
_FACTOR = {"least": 1e-3, "most": 1e6}
_READ = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor", "low_freq_factor",
        "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
        "rope_type", "truncate", "type",
    }
)  # fmt: skip


def read_rope(fields: Fields) -> RopeConfig:
    """The rotary embedding, from `rope_theta`, `rope_scaling` and `rope_parameters`, which may all be there if they agree.

    Raises:
        CheckpointError: for a scaling, or a field of it, that the model does not compute, and for fields that disagree.
    """
    rope = _together(fields)
    values = rope.content
    for name in sorted(values.keys() - _READ):
        rope.fail(name, f"only {', '.join(sorted(_READ))}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _TYPES:
        rope.fail("rope_type" if "rope_type" in values else "type", f"one of {', '.join(_TYPES)}")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        rope.fail("partial_rotary_factor", "1.0: every channel is rotated")
    if values.get("truncate") not in (None, True):
        rope.fail("truncate", "true")
    theta = (rope if rope.has("rope_theta") else fields).number("rope_theta", least=1.0, most=1e15)
    config = RopeConfig(theta=theta, scaling=_TYPES[kind])
    if config.scaling == "none":
        return config
    positions = fields.whole("max_position_embeddings")
    # Beside the scaling it counts for more than inside, as in transformers 5.
    name = "original_max_position_embeddings"
    config.original_max_positions = (fields if fields.has(name) else rope).whole(name, positions)
    if config.scaling == "llama3":
        if rope.number("mscale_all_dim", 0.0):
            rope.fail("mscale_all_dim", "none of it where rope_type is llama3")
        config.factor = rope.number("factor", **_FACTOR)
        config.low_freq_factor = rope.number("low_freq_factor", **_FACTOR)
        config.high_freq_factor = rope.number("high_freq_factor", **_FACTOR)
        return config
    config.factor = rope.number("factor", positions / config.original_max_positions, **_FACTOR)
    config.beta_fast = rope.number("beta_fast", 32.0) or 32.0
    config.beta_slow = rope.number("beta_slow", 1.0) or 1.0
    config.attention_factor = rope.number("attention_factor", 0.0)
    mscale = rope.number("mscale", 0.0)
    config.mscale_all_dim = rope.number("mscale_all_dim", 0.0)
    if mscale and config.mscale_all_dim:
        config.mscale = mscale
    elif config.mscale_all_dim and not config.attention_factor:
        # The magnitude then ignores mscale_all_dim, which still enters the softmax scale.
        config.attention_factor = yarn_mscale(config.factor, 1.0)
    return config


def _together(fields: Fields) -> Fields:
    """The fields of `rope_scaling` and `rope_parameters` as one object.

    A "default" of one spelling says nothing against a scaling in the other: model cards have one add it so.
    """
    there = {name: fields.content[name] for name in ("rope_parameters", "rope_scaling") if fields.content.get(name)}
    for name, values in there.items():
        if not isinstance(values, dict):
            fields.fail(name, "an object with rope_type")
    found: dict[str, tuple[str, str, Any]] = {}  # where, name and value of each setting
    if fields.has("rope_theta"):
        found["rope_theta"] = "", "rope_theta", fields.content["rope_theta"]
    for spelled, values in there.items():
        for name, value in values.items():
            setting = "rope_type" if name == "type" else name
            where, other, before = found.get(setting, (spelled, name, value))
            says_nothing = [each == "default" and setting == "rope_type" and where != spelled for each in (before, value)]
            if value is None or says_nothing[1]:
                continue
            # NaN, which differs from itself, is refused later as what it is.
            if value is not before and value != before and not says_nothing[0]:
                raise CheckpointError(
                    f"{fields.file}: {where}{'.' if where else ''}{other} is {shown(before)}, but {spelled}.{name} is "
                    f"{shown(value)}; expected one value. Keep the one that the weights were trained with."
                )
            found[setting] = spelled, name, value
    content = {name: value for where, name, value in found.values() if where}
    return Fields(fields.file, content, {}, prefix=f"{' or '.join(reversed(there))}.")


def write_rope(config: RopeConfig) -> dict[str, Any]:
    """Both spellings at once: `rope_theta` with `rope_scaling`, and `rope_parameters`."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.scaling != "none":
        scaling = {
            "rope_type": config.scaling,
            "factor": config.factor,
            "original_max_position_embeddings": config.original_max_positions,
        }
    if config.scaling == "llama3":
        scaling |= {"low_freq_factor": config.low_freq_factor, "high_freq_factor": config.high_freq_factor}
    elif config.scaling == "yarn":
        scaling |= {"beta_fast": config.beta_fast, "beta_slow": config.beta_slow}
        if config.mscale_all_dim:
            scaling |= {"mscale": config.mscale, "mscale_all_dim": config.mscale_all_dim}
        if config.attention_factor:
            scaling["attention_factor"] = config.attention_factor
        elif not config.mscale_all_dim and config.mscale != 1.0:
            # Without mscale_all_dim other readers ignore mscale.
            scaling["attention_factor"] = yarn_mscale(config.factor, config.mscale)
    return {
        "rope_theta": config.theta,
        "rope_scaling": None if config.scaling == "none" else {"type": config.scaling, **scaling},
        "rope_parameters": {"rope_theta": config.theta, **scaling},
    }
