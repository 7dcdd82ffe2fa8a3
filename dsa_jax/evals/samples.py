"""Held-out text continued by the model, densely and sparsely: what a reader can judge without a number."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsa_jax.config import EvalConfig
from dsa_jax.data import EvalData
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.evals.generated import Continue
from dsa_jax.generation.text import TextStream

_NEW_TOKENS = 48
_SHOWN_TOKENS = 64  # of a prompt, its last ones


@dataclass(frozen=True)
class Sample:
    """A held-out text continued: the end of the prompt, what the text goes on with, and what is written instead, by row."""

    prompt: str
    text: str
    continuations: dict[str, str]


def wants_samples(data: EvalData, settings: EvalConfig) -> bool:
    """Whether held-out text is to be continued: `eval.samples` rows, where text is evaluated at all."""
    return bool(data.has_text and settings.text_sequences and settings.samples)


def sample_tokens(settings: EvalConfig) -> int:
    """Most new tokens of a sample."""
    return max(1, min(_NEW_TOKENS, settings.text_len // 2))


def make_samples(rows: Mapping[str, Continue], data: EvalData, settings: EvalConfig) -> list[Sample]:
    """`eval.samples` rows of the held-out text, each without its last tokens, continued greedily by each of `rows`.

    They are at even distances in the text. Of a row that holds several documents its longest piece counts.

    Raises:
        ValueError: where `wants_samples` says that there are none.
    """
    n_new = sample_tokens(settings)
    batch = next(data.text_batches(settings.samples, settings.text_len, settings.samples))
    pieces = [_longest_piece(*row) for row in zip(batch.input_ids, batch.segment_ids, strict=True)]
    parts = [(piece[: max(1, len(piece) - n_new)], piece[max(1, len(piece) - n_new) :]) for piece in pieces if len(piece) > 1]
    prompts = [prompt for prompt, _ in parts]
    written = {name: continued(prompts, n_new) for name, continued in rows.items()}
    return [
        Sample(
            prompt=data.tokenizer.decode(prompt[-_SHOWN_TOKENS:]),
            text=_text_after(data.tokenizer, prompt, text),
            continuations={name: _text_after(data.tokenizer, prompt, tokens[place]) for name, tokens in written.items()},
        )
        for place, (prompt, text) in enumerate(parts)
    ]


def _longest_piece(input_ids: np.ndarray, segment_ids: np.ndarray) -> list[int]:
    """The tokens of the document that has most of a row; empty for a padding row."""
    sizes = np.bincount(segment_ids)[1:]  # without padding, which is segment 0
    return input_ids[segment_ids == 1 + int(sizes.argmax())].tolist() if sizes.size else []


def _text_after(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    stream = TextStream(tokenizer, prompt[-_SHOWN_TOKENS:])
    return "".join([*map(stream.add, tokens), stream.finish()])
