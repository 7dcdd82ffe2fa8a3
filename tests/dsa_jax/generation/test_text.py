"""Streamed text is the text, in pieces that never cut a character."""

import pytest

from dsa_jax.data import ByteTokenizer
from dsa_jax.generation.text import TextStream

TEXT = "a €, naïve 🙂 end"


def test_pieces_are_whole_characters_and_add_up():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, tokenizer.encode("before").tolist())
    pieces = [stream.add(token) for token in tokens]
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert stream.finish() == ""


def test_what_never_becomes_a_character_is_shown_at_the_end():
    stream = TextStream(ByteTokenizer())
    broken = [ord("a"), 0xE2, 0x82]  # the euro sign without its last byte
    assert [stream.add(token) for token in broken] == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    other = TextStream(ByteTokenizer())
    assert [other.add(token) for token in (0xE2, ord("b"), 256, ord("c"))] == ["", "\N{REPLACEMENT CHARACTER}b", "", "c"]


def test_a_word_that_is_written_differently_at_the_start_of_a_text():
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")

    class Pieces:
        """SentencePiece style: the space before a word is part of its token and goes at the start of a text."""

        name, vocab_size, end_of_text_id = "pieces", 4, 3
        decoder = tokenizers.decoders.Metaspace()

        def encode(self, text):
            raise NotImplementedError

        def encode_prompt(self, text):
            raise NotImplementedError

        def decode(self, ids):
            return self.decoder.decode([["▁to", "▁be", "come", ""][i] for i in ids])

    stream = TextStream(Pieces(), [0])
    assert Pieces().decode([1, 2]) == "become"
    assert [stream.add(token) for token in (1, 2, 3, 0)] == [" be", "come", "", " to"]
