"""A model with its weights and tokenizer."""

from typing import Any, NamedTuple

from dsa_jax.config import ModelConfig
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.model import Transformer


class Pretrained(NamedTuple):
    """A loaded checkpoint; `tokenizer` is None where it has none."""

    config: ModelConfig
    model: Transformer
    params: dict[str, Any]
    tokenizer: Tokenizer | None
