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

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a generated text: the model's `eos_token_ids` and the end-of-text that closes documents."""
        ours = () if self.tokenizer is None else (self.tokenizer.end_of_text_id,)
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *ours)))
