"""Streamed text is the text, in pieces that never cut a character."""

import pytest

from dsa_jax.data import ByteTokenizer, load_tokenizer
from dsa_jax.generation.text import TextStream, TextUntil
from tests.dsa_jax.data.test_tokenizer_files import TURN_END, write

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


def until(tokenizer, tokens, stops):
    """(tokens read until the text ended, the text)."""
    text = TextUntil(tokenizer, stops)
    ended = next((n for n, token in enumerate(tokens, start=1) if text.add(token)), len(tokens))
    return ended, text.finish()


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["\n"], (4, "one")),
        ([".", "\n", ""], (4, "one")),
        (["e\nt"], (5, "on")),  # over several tokens
        (["€"], (12, "one\ntwo. ")),  # a character of three tokens
        ([], (13, "one\ntwo. €!")),
        (["!!", ""], (13, "one\ntwo. €!")),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stops, expected):
    tokenizer = ByteTokenizer()
    assert until(tokenizer, tokenizer.encode("one\ntwo. €!").tolist(), stops) == expected


def test_bytes_at_the_end_that_are_no_character_belong_to_the_text():
    assert until(ByteTokenizer(), [97, 0xE2, 0x82], ["b"]) == (3, "a\N{REPLACEMENT CHARACTER}")
    assert until(ByteTokenizer(), [97, 0xE2, 0x82], ["\N{REPLACEMENT CHARACTER}"]) == (3, "a")


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([TURN_END], (4, "w1 w2")),
        (["</s>", TURN_END], (2, "w1")),
        ([f"w2{TURN_END}"], (4, "w1 ")),
        ([f"{TURN_END} w3"], (5, "w1 w2")),
        (["w3"], (5, "w1 w2 ")),
    ],
)
def test_a_stop_string_may_spell_control_tokens(tmp_path, stops, expected):
    """The text itself holds none: `</s>`, which is no stop string in most cases, leaves nothing."""
    beside = {"tokenizer_config": {"added_tokens_decoder": {"44": {"content": TURN_END, "special": True}}}}
    tokenizer = load_tokenizer(write(tmp_path, beside=beside))
    w1, w2, w3, w4 = tokenizer.encode("w1 w2 w3 w4").tolist()
    tokens = [w1, 2, w2, 44, w3, w4]
    assert until(tokenizer, tokens, stops) == expected
