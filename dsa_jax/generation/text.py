"""Detokenizing tokens that arrive one at a time, and finding where a stop string ends them."""

from collections.abc import Sequence

from dsa_jax.data.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Incremental detokenizer: a character is returned once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """A stream that continues the text of `prompt`, which it does not repeat."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._n_shown = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty where a character is incomplete."""
        self._tokens.append(token)
        return self._settle(final=False)

    def finish(self) -> str:
        """The remaining text; bytes that are no character become U+FFFD."""
        return self._settle(final=True)

    def _settle(self, *, final: bool) -> str:
        # Tokens already shown are decoded again as context: a tokenizer may write a word differently at the start of a text.
        context = self._tokenizer.decode(self._tokens[: self._n_shown])
        text = self._tokenizer.decode(self._tokens)
        if len(text) <= len(context) or (text.endswith(_INCOMPLETE) and not final):
            return ""
        # The tokens of the last piece are context enough for the next.
        self._tokens, self._n_shown = self._tokens[self._n_shown :], len(self._tokens) - self._n_shown
        return text[len(context) :]


class TextUntil:
    """The text of tokens that arrive one at a time, up to the first of some stop strings.

    A stop string may spell control tokens, which are looked for as they are spelled but are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """An empty text that ends before the first of `stops`; empty strings among them count for nothing."""
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._stream = TextStream(tokenizer)
        self._pieces: list[tuple[str, bool]] = []  # as spelled; whether it is part of the text
        self._spelled = ""
        self._end: int | None = None

    def add(self, token: int) -> bool:
        """Take the next token; whether a stop string has ended the text."""
        piece = self._stream.add(token)
        # A token that stands for nothing by itself is a control token; one that waits for the rest of a character is not.
        is_text = bool(piece or self._tokenizer.decode([token]))
        return self._append(piece if is_text else self._tokenizer.decode([token], control_tokens=True), is_text)

    def finish(self) -> str:
        """The text up to the first stop string, or all of it; bytes that are no character become U+FFFD."""
        if self._end is None:
            self._append(self._stream.finish(), True)
        text, start = "", 0
        for piece, is_text in self._pieces:
            end = len(piece) if self._end is None else max(0, self._end - start)
            text += piece[:end] if is_text else ""
            start += len(piece)
        return text

    def _append(self, piece: str, is_text: bool) -> bool:
        searched = len(self._spelled)
        self._spelled += piece
        self._pieces.append((piece, is_text))
        if self._end is None:
            places = (self._spelled.find(stop, max(0, searched - len(stop) + 1)) for stop in self._stops)
            self._end = min((place for place in places if place >= 0), default=None)
        return self._end is not None
