"""The text tasks by name, after RULER (arXiv 2404.06654): needles, variables, words to count, and a question over the text."""

import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dsa_jax.config import TEXT_TASKS as TASK_NAMES
from dsa_jax.config import ConfigError
from dsa_jax.config.checks import one_of
from dsa_jax.data.text_tasks.rows import (
    N_DEPTHS,
    Haystack,
    Hidden,
    Question,
    TextDraw,
    TextRows,
    depth_group,
    make_rows,
    quoting_rows,
)
from dsa_jax.data.text_tasks.vocabulary import WORDS
from dsa_jax.data.tokenizer import Tokenizer

N_ASKED = 4
"""Numbers that multivalue and multiquery ask for, variables of a chain, words that a counting task asks for."""
_TOKENS_PER_DISTRACTOR = 128
_MOST_DISTRACTORS = 64
_ZIPF_EXPONENT = 2.0
_QUOTED, _ANSWERED = 12, 8  # tokens of a line that a quote gives, and asks for

_Row = tuple[list[Hidden], list[Question]]


class TextTask(NamedTuple):
    """One text task.

    Attributes:
        name: as in `eval.text_tasks`.
        make: draws rows; ConfigError where a row of that length has no room.
        grouping: what the groups of its answers are: depth, hops or rank.
        n_groups: how many there are.
        summary: what the accuracy is a share of, for readers of a table.
    """

    name: str
    make: Callable[[TextDraw], TextRows]
    grouping: str
    n_groups: int
    summary: str

    def rows(
        self, tokenizer: Tokenizer, haystack: Haystack, rng: np.random.Generator, *, n_rows: int, seq_len: int
    ) -> TextRows:
        """`n_rows` rows of `seq_len` tokens; the state of `rng` decides every bit of them."""
        return self.make(TextDraw(self.name, tokenizer, haystack, rng, n_rows, seq_len))


def _number(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(string.digits[1:]), 1)) + "".join(rng.choice(list(string.digits), 6))


def _needle(word: str, number: str) -> str:
    return f"The secret number of the {word} is {number}.\n"


def _asked(word: str, number: str, depth: float) -> Question:
    return Question(f"\nThe secret number of the {word} is", [f" {number}"], [depth_group(depth)])


def _words(draw: TextDraw, n: int) -> list[str]:
    return [str(word) for word in draw.rng.choice(WORDS, n, replace=False)]


def _needles(draw: TextDraw, n_asked: int, n_distractors: int) -> _Row:
    """Needles with a word each, of which the first `n_asked` are asked for."""
    words = _words(draw, n_asked + n_distractors)
    numbers, depths = [_number(draw.rng) for _ in words], draw.rng.random(len(words))
    needles = list(zip(words, numbers, depths, strict=True))
    hidden = [Hidden(_needle(word, number), depth) for word, number, depth in needles]
    return hidden, [_asked(*needle) for needle in needles[:n_asked]]


def _single(draw: TextDraw) -> _Row:
    return _needles(draw, 1, 0)


def _multikey(draw: TextDraw) -> _Row:
    return _needles(draw, 1, min(max(3, draw.seq_len // _TOKENS_PER_DISTRACTOR), _MOST_DISTRACTORS))


def _multiquery(draw: TextDraw) -> _Row:
    return _needles(draw, N_ASKED, 0)


def _multivalue(draw: TextDraw) -> _Row:
    """One word with several numbers, listed in the order of the text."""
    (word,) = _words(draw, 1)
    depths = np.sort(draw.rng.random(N_ASKED))
    numbers = [_number(draw.rng) for _ in depths]
    hidden = [Hidden(_needle(word, number), depth) for number, depth in zip(numbers, depths, strict=True)]
    prompt = f"\nThe secret numbers of the {word}, in order, are"
    return hidden, [Question(prompt, [f" {number}" for number in numbers], [depth_group(depth) for depth in depths])]


def _variables(draw: TextDraw) -> _Row:
    """A chain of assignments and one that distracts; asked for are the variables that hold the first value, by hops."""
    names = _words(draw, 2 * N_ASKED)
    hidden: list[Hidden] = []
    questions: list[Question] = []
    for chain in (names[:N_ASKED], names[N_ASKED:]):
        value, depths = _number(draw.rng), np.sort(draw.rng.random(N_ASKED))
        sources = [value, *chain[:-1]]
        hidden += [
            Hidden(f"Let {name} be equal to {source}.\n", depth)
            for name, source, depth in zip(chain, sources, depths, strict=True)
        ]
        if not questions:
            prompt = f"\nThe names that are equal to {value}, in order, are"
            questions = [Question(prompt, [f" {name}" for name in chain], range(N_ASKED))]
    return hidden, questions


def _counted(draw: TextDraw, shares: np.ndarray, what: str) -> _Row:
    """A list of words in random order with counts in proportion to `shares`, in lines all over the text.

    The list takes half of the row.

    Raises:
        ConfigError: where it is too short for the counts of the words asked for to differ.
    """
    words = _words(draw, shares.size)
    per_word = max(draw.encode(f" {word},").size for word in words)
    counts = np.floor(draw.seq_len / 2 / per_word * shares / shares.sum()).astype(np.int64)
    if np.any(np.diff(counts[: N_ASKED + 1]) >= 0):
        raise ConfigError(
            f"{draw.task}: a row of {draw.seq_len} tokens has counts {counts[: N_ASKED + 1].tolist()} for its first words; "
            "expected each below the one before. Use longer rows: raise eval.text_task_lens."
        )
    listed = draw.rng.permuted(np.repeat(words, counts))
    lines = np.array_split(listed, min(N_DEPTHS, listed.size))
    hidden = [Hidden(f"Words: {', '.join(line)}.\n", (i + 0.5) / len(lines)) for i, line in enumerate(lines)]
    prompt = f"\nThe {what} words in the lists above, most frequent first, are"
    return hidden, [Question(prompt, [f" {word}" for word in words[:N_ASKED]], range(N_ASKED))]


def _common(draw: TextDraw) -> _Row:
    shares = np.ones(4 * N_ASKED)
    shares[:N_ASKED] = np.arange(N_ASKED + 1, 1, -1)
    return _counted(draw, shares, f"{N_ASKED} most common")


def _frequent(draw: TextDraw) -> _Row:
    return _counted(draw, np.arange(1.0, 2 * N_ASKED + 1) ** -_ZIPF_EXPONENT, f"{N_ASKED} most frequent")


def _by_depth(name: str, row_of: Callable[[TextDraw], _Row], summary: str) -> TextTask:
    return TextTask(name, lambda draw: make_rows(draw, row_of), "depth", N_DEPTHS, summary)


def _by_rank(name: str, row_of: Callable[[TextDraw], _Row], summary: str) -> TextTask:
    return TextTask(name, lambda draw: make_rows(draw, row_of), "rank", N_ASKED, summary)


_TASKS = (
    _by_depth("needle", _single, "numbers found, the only one hidden in the text"),
    _by_depth("needle_multikey", _multikey, "numbers found among others of the same form, one in 128 tokens"),
    _by_depth("needle_multivalue", _multivalue, "numbers found of several that belong to one word"),
    _by_depth("needle_multiquery", _multiquery, "numbers found of several that are asked for one after the other"),
    TextTask(
        "text_variables",
        lambda draw: make_rows(draw, _variables),
        "hops",
        N_ASKED,
        "names found that are equal to a number through a chain of others",
    ),
    _by_rank("text_common_words", _common, "most common words listed right, from counts close together"),
    _by_rank("text_frequent_words", _frequent, "most frequent words listed right, from counts that fall steeply"),
    TextTask(
        "text_quote",
        lambda draw: quoting_rows(draw, _QUOTED, _ANSWERED),
        "depth",
        N_DEPTHS,
        f"lines of the text continued for {_ANSWERED} tokens after their first {_QUOTED} were quoted",
    ),
)
TEXT_TASKS = {task.name: task for task in _TASKS}
"""By name, in the order of `dsa_jax.config.TEXT_TASKS`."""
assert tuple(TEXT_TASKS) == TASK_NAMES


def generated(name: str) -> str:
    """The column of a text task that is scored by generation."""
    return f"{name}, generated"


def get_text_task(name: str) -> TextTask:
    """The task of that name.

    Raises:
        ConfigError: for an unknown one, with the nearest name.
    """
    one_of("the text task", name, TASK_NAMES)
    return TEXT_TASKS[name]
