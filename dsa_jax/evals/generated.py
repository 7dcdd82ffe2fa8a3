"""Greedy generation in an evaluation: the answers of text tasks, found in generated text."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ModelConfig
from dsa_jax.data.text_tasks import TextRows
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.evals.task import Params
from dsa_jax.generation import generate
from dsa_jax.model import Transformer
from dsa_jax.model.attention.check import check_request
from dsa_jax.model.outputs import AttentionRequest

SLACK = 8
"""Tokens that a model may write beyond those of the answers, such as words before them."""

Continue = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""(prompts, most new tokens of each) -> their continuations."""


class _Question(NamedTuple):
    """A question to generate answers to: the tokens before them, how many to write, and (number, tokens) of each answer."""

    prompt: list[int]
    n_new: int
    expected: list[tuple[int, list[int]]]


def why_not_generated(config: ModelConfig, attention: str) -> str:
    """The reason why nothing can be generated under this attention; empty where it can."""
    try:
        check_request(config, AttentionRequest(attention), cached=True)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def continuing(model: Transformer, params: Params, tokenizer: Tokenizer, attention: str, n_rows: int) -> Continue:
    """Greedy generation under `attention`, up to a token that ends a text, `n_rows` prompts at a time.

    The last prompts are joined by others up to `n_rows`, so that one pair of compiled programs serves all.
    """
    loaded = Pretrained(model.config, model, params, tokenizer)

    def continued(prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
        written: list[list[int]] = []
        for first in range(0, len(prompts), n_rows):
            chosen = prompts[first : first + n_rows]
            room = model.config.max_positions - max(map(len, chosen))
            filled = [*chosen, *[chosen[-1]] * (n_rows - len(chosen))]
            output = generate(loaded, filled, max_new_tokens=min(n_new, room), attention=attention)
            written += output.token_ids[: len(chosen)]
        return written

    return continued


def answers_found(continued: Continue, tokenizer: Tokenizer, batches: Iterable[TextRows]) -> np.ndarray:
    """Whether the text generated after each question contains each of its answers [A], in the order of their numbers.

    A question is generated once, after the right answers to those before it in its row; of a list, every answer counts by
    itself, in whatever order. Letter case and space around an answer do not count. At most the tokens of a question's answers
    and `SLACK` are read.

    Source: the string match of RULER (arXiv 2404.06654).
    """
    questions: list[_Question] = []
    n_answers = 0
    for rows in batches:
        questions += _questions(rows, n_answers)
        n_answers += rows.answers.groups.size
    found = np.ones(n_answers, bool)  # of an answer without a token, as argmax has it
    written = continued([each.prompt for each in questions], max((each.n_new for each in questions), default=0))
    for question, tokens in zip(questions, written, strict=True):
        for number, expected in question.expected:
            found[number] = contains(tokenizer, tokens[: question.n_new], expected)
    return found


def contains(tokenizer: Tokenizer, written: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether `written` begins with the tokens `expected` or spells their text anywhere."""
    text = tokenizer.decode(expected).strip().lower()
    is_same = list(written[: len(expected)]) == list(expected)
    return is_same or (bool(text) and text in tokenizer.decode(written).lower())


def _questions(rows: TextRows, first_number: int) -> list[_Question]:
    """The questions of a batch, whose answers are numbered from `first_number` on."""
    batch, answers = rows
    questions = []
    for start, stop in itertools.pairwise([*np.nonzero(answers.opens)[0], answers.groups.size]):
        row, places = np.nonzero((answers.of_target >= start) & (answers.of_target < stop))
        if places.size:
            b, begin, end = row[0], places[0], places[-1] + 1
            numbers = answers.of_target[b, begin:end]
            expected = [
                (first_number + int(number), batch.targets[b, begin:end][numbers == number].tolist())
                for number in np.unique(numbers[numbers >= 0])
            ]
            questions.append(_Question(batch.input_ids[b, : begin + 1].tolist(), int(end - begin) + SLACK, expected))
    return questions
