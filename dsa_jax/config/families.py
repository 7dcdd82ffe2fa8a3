"""Names of the Hugging Face families that a model may come from; their rows are in `dsa_jax/checkpoints/hf/families.py`."""

_FAMILIES = [
    "llama",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "glm4_moe_lite",
]


def families() -> tuple[str, ...]:
    """Every value of `model.family` but the empty one."""
    return tuple(_FAMILIES)


def add_family(name: str) -> None:
    """Make a name known to configs; `register_family` calls it."""
    _FAMILIES.append(name)


def remove_family(name: str) -> None:
    """Forget a name that `add_family` made known."""
    _FAMILIES.remove(name)
