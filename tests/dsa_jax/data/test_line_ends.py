"""Text that is cut at line ends: the same ids, for every pre-tokenizer of which that is claimed, and no claim for others."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.data import line_ends
from dsa_jax.data.line_ends import safe_cuts

tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
pre, norm = tokenizers.pre_tokenizers, tokenizers.normalizers

# White space of all kinds, letters that combine and ligatures, and what patterns treat in their own ways.
ALPHABET = [*" \n\n\n\r\taB1.'s/@", "é", "中", "。", "Ж", "\u0301", "\u3000", "\x85", "ﬁ", "½"]
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)
DEEPSEEK = next(pattern for pattern in line_ends._DIVIDING if pattern.startswith("[!"))


def split(pattern, behavior="isolated"):
    return pre.Split(tokenizers.Regex(pattern), behavior)


def merging(pre_tokenizer, normalizer=None, added=()):
    """A tokenizer that merges any two neighbouring bytes within a piece, so that other pieces mean other ids."""
    letters = sorted({letter for character in ALPHABET for letter in BYTES.pre_tokenize_str(character)[0][0]})
    pairs = list(itertools.product(letters, letters))
    vocab = {name: i for i, name in enumerate([*sorted(pre.ByteLevel.alphabet()), *(a + b for a, b in pairs)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    return tokenizer


def cuts_of(tokenizer):
    return safe_cuts(json.loads(tokenizer.to_str()))


def pieces_of(text, cuts):
    places = [found.start() for found in cuts.finditer(text)]
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


def ids_of(tokenizer, pieces):
    return [token for each in tokenizer.encode_batch_fast(pieces, add_special_tokens=False) for token in each.ids]


def token(content, **how):
    return tokenizers.AddedToken(content, **how)


ADDED = [
    token("<x>"),
    token("aB", single_word=True),
    token("<m>", lstrip=True, rstrip=True),
    token("\n\n"),
    token("a>", rstrip=True),
]
SAFE = {
    **{f"pattern {i}": (pre.Sequence([split(each), BYTES]),) for i, each in enumerate(sorted(line_ends._DIVIDING))},
    "deepseek": (pre.Sequence([split(r"\p{N}{1,3}"), split(line_ends._CJK), split(DEEPSEEK), BYTES]),),
    "gpt2": (pre.ByteLevel(add_prefix_space=False),),
    "digits": (pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),),
    "punctuation": (pre.Sequence([pre.Punctuation("contiguous"), pre.ByteLevel(add_prefix_space=False)]),),
    "whitespace": (pre.Sequence([pre.Whitespace(), pre.ByteLevel(add_prefix_space=True)]),),
    "bert": (pre.Sequence([pre.BertPreTokenizer(), BYTES]),),
    "spaces": (pre.Sequence([pre.WhitespaceSplit(), BYTES]),),
    "NFC": (pre.ByteLevel(add_prefix_space=False), norm.NFC()),
    "NFKC": (pre.ByteLevel(add_prefix_space=False), norm.Sequence([norm.NFKC(), norm.Lowercase()])),
    "added": (pre.ByteLevel(add_prefix_space=False), None, ADDED),
}


@pytest.fixture(scope="module")
def safe():
    found = {name: merging(*parts) for name, parts in SAFE.items()}
    assert [name for name, tokenizer in found.items() if cuts_of(tokenizer) is not line_ends._CUTS] == []
    return found


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from([*ALPHABET, "a\nB", ".\n1", "<x>", "<m>", "a>"]), min_size=2, max_size=16).map("".join))
def test_pieces_have_the_ids_of_the_whole(safe, text):
    for name, tokenizer in safe.items():
        assert ids_of(tokenizer, pieces_of(text, line_ends._CUTS)) == tokenizer.encode(text, add_special_tokens=False).ids, name


@pytest.mark.parametrize("text", ["a\nB", "1.\na", "a\r\nB", "中\n中", "。\n中", "Ж\nЖ"])
def test_lines_of_many_scripts_can_be_cut(text):
    assert len(pieces_of(text, line_ends._CUTS)) > 1


@pytest.mark.parametrize("text", ["a  b", "a.\n b", ".\n\nB", ".\r\nB", " \nB", "\n", "\na", "."])
def test_where_it_is_not_certain_nothing_is_cut(text):
    assert pieces_of(text, line_ends._CUTS) == [text]


UNSAFE = {
    "no pre-tokenizer": (None,),
    "prefix": (pre.ByteLevel(add_prefix_space=True),),
    "bytes": (BYTES,),
    "metaspace": (pre.Metaspace(),),
    "metaspace after": (pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="first")]),),
    "spaces only": (pre.Split(" ", "merged_with_previous"),),
    "joined": (pre.Sequence([split(line_ends._GPT2, "contiguous"), BYTES]),),
    "with the next": (pre.Sequence([split("[\r\n]", "merged_with_next"), BYTES]),),
    "across": (pre.Sequence([split(r"\s?\p{L}+|\s+"), BYTES]),),
    "digits alone": (pre.Sequence([pre.Digits(), BYTES]),),
    "strips": (pre.ByteLevel(add_prefix_space=False), norm.Strip()),
    "prepends": (pre.ByteLevel(add_prefix_space=False), norm.Prepend("a")),
    "replaces": (pre.ByteLevel(add_prefix_space=False), norm.Sequence([norm.NFC(), norm.Replace("\n", " ")])),
    "spanning token": (pre.ByteLevel(add_prefix_space=False), None, [token("a\nB")]),
    "token takes the newline after": (pre.ByteLevel(add_prefix_space=False), None, [token("s", rstrip=True)]),
    "token takes the newline before": (pre.ByteLevel(add_prefix_space=False), None, [token("s>", lstrip=True)]),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_a_tokenizer_of_which_it_is_not_certain_reads_text_whole(name):
    parts = UNSAFE[name]
    assert cuts_of(merging(parts[0] or BYTES, *parts[1:])) is None
    if parts[0] is None:
        assert cuts_of(tokenizers.Tokenizer(tokenizers.models.BPE())) is None
