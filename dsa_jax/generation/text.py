"""Detokenizing tokens that arrive one at a time."""

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
