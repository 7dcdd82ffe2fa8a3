"""A model with its weights and tokenizer, wherever they came from."""

from typing import Any, NamedTuple

from dsa_jax.config import ModelConfig
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.model import Transformer


class Pretrained(NamedTuple):
    """What a checkpoint holds; `tokenizer` is None where it has none."""

    config: ModelConfig
    model: Transformer
    params: dict[str, Any]
    tokenizer: Tokenizer | None
