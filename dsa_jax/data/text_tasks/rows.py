"""Rows of text with sentences hidden in it, questions at their end and the tokens that answer them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch, pad_to, stack_rows
from dsa_jax.data.packing import TokenStream
from dsa_jax.data.tokenizer import Tokenizer

N_DEPTHS = 4
"""Number of equal stretches of the text, by which results are grouped."""
_LEAST_TEXT = 16  # tokens of the haystack that a row must have room for

Tokens = Int[np.ndarray, " _"]


class Haystack(NamedTuple):
    """Token ids of a text, and the places right behind a line end, ascending; sentences are hidden at these."""

    tokens: Tokens
    line_ends: Tokens

    def stretch(self, rng: np.random.Generator, n_tokens: int) -> "Haystack":
        """`n_tokens` of the text from a random line on, from its start again where it is shorter."""
        start = int(rng.choice(self.line_ends)) if self.line_ends.size else 0
        taken = np.arange(start, start + n_tokens) % self.tokens.size
        ends = np.nonzero(np.isin(taken, self.line_ends - 1))[0] + 1
        return Haystack(self.tokens[taken], ends[ends < n_tokens])


class Hidden(NamedTuple):
    """A sentence to hide, and where: its depth is a share of the text, 0 to 1."""

    text: str
    depth: float


class Question(NamedTuple):
    """A question at the end of a row: the text up to its answers, the answers, listed with commas, and the group of each."""

    prompt: str
    answers: Sequence[str]
    groups: Sequence[int]


class Answers(NamedTuple):
    """The answers of a batch.

    Fields: `of_target` the number of the answer that each target belongs to, -1 elsewhere; `groups` the group of each answer;
    `opens` whether it is the first one of a question, whose list those after it continue.
    """

    of_target: Int[np.ndarray, "B T"]
    groups: Int[np.ndarray, " A"]
    opens: Bool[np.ndarray, " A"]


class TextRows(NamedTuple):
    """A batch whose targets are the tokens of the answers, and which answer each belongs to."""

    batch: Batch
    answers: Answers


class TextDraw(NamedTuple):
    """A request for `n_rows` rows of `seq_len` tokens of a task, drawn from `rng`; all that makes a row."""

    task: str
    tokenizer: Tokenizer
    haystack: Haystack
    rng: np.random.Generator
    n_rows: int
    seq_len: int

    def encode(self, text: str) -> Tokens:
        """Token ids of a piece of a row."""
        return self.tokenizer.encode(text)

    def room(self, *used: Tokens) -> int:
        """Tokens of the haystack in a row that also holds the pieces `used` and the tokenizer's prefix.

        Raises:
            ConfigError: where that is hardly any.
        """
        left = self.seq_len + 1 - self.prefix.size - sum(piece.size for piece in used)
        if left < _LEAST_TEXT:
            raise ConfigError(
                f"{self.task}: a row of {self.seq_len} tokens leaves {max(left, 0)} for the text around what it hides; "
                f"expected at least {_LEAST_TEXT}. Use longer rows: raise eval.text_task_lens."
            )
        return left

    @property
    def prefix(self) -> Tokens:
        """The tokens before every prompt, such as a begin-of-text token."""
        whole, text = self.tokenizer.encode_prompt("a"), self.encode("a")
        return whole[: whole.size - text.size]


def make_haystack(stream: TokenStream, tokenizer: Tokenizer) -> Haystack:
    """The documents of `stream` one after the other, without the tokens that close them."""
    tokens = np.asarray(stream.tokens, np.int32)
    tokens = tokens[tokens != tokenizer.end_of_text_id]
    ids = np.unique(tokens)
    closing = ids[[tokenizer.decode([int(token)]).endswith("\n") for token in ids]]
    return Haystack(tokens, np.nonzero(np.isin(tokens, closing))[0] + 1)


def make_rows(draw: TextDraw, row_of: Callable[[TextDraw], tuple[Sequence[Hidden], Sequence[Question]]]) -> TextRows:
    """`draw.n_rows` rows: a stretch of text with what `row_of` hides in it, then its questions with their answers.

    Every row has the same number of tokens; the text takes what the hidden sentences and the questions leave.

    Raises:
        ConfigError: where they leave no room for text.
    """
    rows, targets = [], []
    for _ in range(draw.n_rows):
        hidden, questions = row_of(draw)
        tail, of_target = _tail(draw, questions)
        pieces = [draw.encode(each.text) for each in hidden]
        text = draw.haystack.stretch(draw.rng, draw.room(*pieces, tail))
        body = _with_hidden(text, pieces, [each.depth for each in hidden])
        rows.append(np.concatenate([draw.prefix, body, tail]))
        groups = [group for question in questions for group in question.groups]
        targets.append((of_target, groups, [place == 0 for each in questions for place in range(len(each.answers))]))
    return _stacked(draw, rows, targets)


def stack_text_rows(parts: Sequence[TextRows], n_rows: int) -> TextRows:
    """The rows of `parts` in order, their answers numbered anew, and padding rows up to `n_rows`."""
    batch = pad_to(stack_rows([part.batch for part in parts]), n_rows)
    numbers = np.full(batch.target_mask.shape, -1)
    groups = np.concatenate([part.answers.groups for part in parts])
    opens = np.concatenate([part.answers.opens for part in parts])
    row = first = 0
    for part in parts:
        of_target = part.answers.of_target
        numbers[row : row + len(of_target)] = np.where(of_target < 0, -1, of_target + first)
        row, first = row + len(of_target), first + part.answers.groups.size
    return TextRows(batch, Answers(numbers, groups, opens))


def quoting_rows(draw: TextDraw, n_asked: int, n_answer: int) -> TextRows:
    """Rows that end with the first `n_asked` tokens of a line of their text, whose next `n_answer` tokens are the answer."""
    rows, targets = [], []
    opening = draw.encode('\n\nThe text above says, word for word: "')
    n_text = draw.room(opening, np.zeros(n_asked + n_answer, np.int32))
    for _ in range(draw.n_rows):
        text = draw.haystack.stretch(draw.rng, n_text)
        starts = text.line_ends[text.line_ends <= n_text - n_asked - n_answer]
        # A line long enough to be quoted; any place of the text where it has none.
        following = np.searchsorted(text.line_ends, starts, side="right")
        ends = np.append(text.line_ends, n_text)[following]
        starts = starts[ends - starts >= n_asked + n_answer]
        start = int(draw.rng.choice(starts)) if starts.size else int(draw.rng.integers(n_text - n_asked - n_answer + 1))
        quoted = text.tokens[start : start + n_asked + n_answer]
        rows.append(np.concatenate([draw.prefix, text.tokens, opening, quoted]))
        of_target = np.full(opening.size + quoted.size, -1)
        of_target[-n_answer:] = 0
        targets.append((of_target, [start * N_DEPTHS // n_text], [True]))
    return _stacked(draw, rows, targets)


def depth_group(depth: float) -> int:
    """The stretch of the text, 0 to `N_DEPTHS` - 1, that a depth lies in."""
    return min(int(depth * N_DEPTHS), N_DEPTHS - 1)


def _tail(draw: TextDraw, questions: Sequence[Question]) -> tuple[Tokens, Tokens]:
    """Token ids of all questions with their answers, and the number of the answer of each; -1 for the others.

    Encoded as one text, since a tokenizer may join what stands at a border; an answer is what its prompt does not decide.
    """
    text, bounds = "\n", []
    for question in questions:
        for before, answer in zip((question.prompt, *[","] * (len(question.answers) - 1)), question.answers, strict=True):
            text += before
            bounds.append((text, text + answer))
            text += answer
    tail = draw.encode(text)
    of_target = np.full(tail.size, -1)
    for number, (before, after) in enumerate(bounds):
        of_target[_n_common(draw.encode(before), tail) : _n_common(draw.encode(after), tail)] = number
    return tail, of_target


def _n_common(a: Tokens, b: Tokens) -> int:
    n = min(a.size, b.size)
    differs = np.nonzero(a[:n] != b[:n])[0]
    return int(differs[0]) if differs.size else n


def _with_hidden(text: Haystack, pieces: Sequence[Tokens], depths: Sequence[float]) -> Tokens:
    """The tokens of `text` with each piece at the line end nearest to its depth."""
    places = text.line_ends if text.line_ends.size else np.arange(text.tokens.size)
    wanted = np.asarray(depths) * text.tokens.size
    nearest = [int(places[np.abs(places - place).argmin()]) for place in wanted]
    parts, last = [], 0
    for i in np.argsort(wanted, kind="stable"):
        parts += [text.tokens[last : nearest[i]], pieces[i]]
        last = nearest[i]
    return np.concatenate([*parts, text.tokens[last:]])


def _stacked(draw: TextDraw, rows: Sequence[Tokens], targets: Sequence[tuple[Tokens, list[int], list[bool]]]) -> TextRows:
    """Rows of `seq_len` + 1 tokens as inputs and targets; answers are numbered through the batch."""
    shape = (draw.n_rows, draw.seq_len)
    whole = np.stack(rows).astype(np.int32) if rows else np.zeros((0, draw.seq_len + 1), np.int32)
    of_target = np.full(shape, -1)
    groups: list[int] = []
    opens: list[bool] = []
    for row, (numbers, group, first) in enumerate(targets):
        of_target[row, draw.seq_len - numbers.size :] = np.where(numbers < 0, -1, numbers + len(groups))
        groups += group
        opens += first
    mask = of_target >= 0
    batch = Batch(whole[:, :-1], np.where(mask, whole[:, 1:], 0).astype(np.int32), mask, np.ones(shape, np.int32))
    return TextRows(batch, Answers(of_target, np.asarray(groups, np.int64), np.asarray(opens, bool)))
