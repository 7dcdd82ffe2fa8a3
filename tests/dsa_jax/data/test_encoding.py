"""Documents to ids: in pieces, once, on all cores, and with the same ids as the whole text."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_jax.config import TextConfig
from dsa_jax.data import encoding, load_corpus, load_tokenizer
from dsa_jax.data.encoding import cut_at, encode_document, encode_documents
from dsa_jax.data.token_cache import TokenCache, default_cache
from dsa_jax.data.tokenizer import JsonTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
TEXT = "".join(f"line {i} of the text,\nwith {i * i} words\n" + "  \n" * (i % 3) for i in range(400))
CUTS = re.compile(r"(?<=a)(?=\r?\n)|(?<=\S\n)(?=a)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "_BATCH", 30_000)
    monkeypatch.setattr(encoding, "_AT_ONCE", 300)
    monkeypatch.setattr(encoding, "_WORTH_KEEPING", 1000)


def whole(tokenizer, text):
    return [*tokenizer.encode_prompt(text).tolist(), tokenizer.end_of_text_id]


def encoded(tokenizer, documents, **settings):
    return [ids.tolist() for ids in encode_documents(tokenizer, map(iter, documents), **settings)]


class Counting(JsonTokenizer):
    """Notes the sizes of what it is given."""

    def __init__(self, path):
        super().__init__(path)
        self.sizes = []

    def encode_pieces(self, pieces):
        self.sizes.append([len(piece) for piece in pieces])
        return super().encode_pieces(pieces)


@given(
    blocks=st.lists(st.text("a\n\r b", min_size=1, max_size=9), max_size=9),
    size=st.integers(1, 8),
    division=st.integers(1, 7),
)
def test_pieces_join_to_the_text_however_it_comes(blocks, size, division):
    text = "".join(blocks)
    pieces = list(cut_at(CUTS, blocks, size))
    assert "".join(pieces) == text and all(pieces)
    assert pieces == list(cut_at(CUTS, ["".join(part) for part in batched(text, division)], size))
    ends = list(itertools.accumulate(map(len, pieces)))
    places = [found.start() for found in CUTS.finditer(text)]
    assert set(ends[:-1]) <= set(places)
    # None could have ended earlier.
    for start, end in itertools.pairwise([0, *ends]):
        assert not [place for place in places if start + size <= place < end]
    assert list(cut_at(None, blocks, size)) == ([text] if text else [])


def batched(text, n):
    return [text[i : i + n] for i in range(0, len(text), n)]


def test_a_long_text_has_the_ids_of_the_whole_in_bounded_pieces(folder, small):
    tokenizer = Counting(folder)
    assert tokenizer.cuts is not None
    assert encoded(tokenizer, [batched(TEXT, 777)]) == [whole(tokenizer, TEXT)]
    sizes = [size for call in tokenizer.sizes for size in call]
    assert len(sizes) > 50 and max(sizes) < 200
    limit = 300 * min(os.cpu_count() or 1, 16)
    assert len(tokenizer.sizes) > 3 and max(map(sum, tokenizer.sizes)) < limit + 200
    assert encode_document(tokenizer, TEXT).tolist() == whole(tokenizer, TEXT)
    assert encode_document(tokenizer, "").size == 0


def test_documents_keep_their_order_and_ids_stay(tokenizer, small):
    ids = np.array([5, 6, tokenizer.end_of_text_id])
    documents = [["a b"], [], [""], ["c", " d\n"], ids, [TEXT[:500]], ["e"]]
    given_ = (document if isinstance(document, np.ndarray) else iter(document) for document in documents)
    got = [each.tolist() for each in encode_documents(tokenizer, given_)]
    texts = ["a b", "c d\n", None, TEXT[:500], "e"]
    assert got == [whole(tokenizer, text) if text else ids.tolist() for text in texts]


def test_a_tokenizer_that_opens_a_text_opens_each_document_once(folder, small):
    tokenizer = JsonTokenizer(folder)
    tokenizer.opening = np.array([7], np.int32)
    own = tokenizer.encode_pieces([tokenizer.decode([7]) + " again"])[0]
    assert own[0] == 7
    documents = [TEXT, "short", tokenizer.decode([7]) + " again"]
    assert encoded(tokenizer, [[text] for text in documents]) == [whole(tokenizer, text) for text in documents]


def test_a_text_that_cannot_be_cut_is_read_whole_and_that_is_said(folder, tmp_path, small, monkeypatch, caplog):
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    other.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encoding, "_LONG", 5000)
    tokenizer = Counting(tmp_path)
    assert tokenizer.cuts is None
    assert encoded(tokenizer, [batched(TEXT, 777), ["short"]]) == [whole(tokenizer, TEXT), whole(tokenizer, "short")]
    assert "this tokenizer may give other ids to text that is cut at line ends" in caplog.text
    caplog.clear()
    one_line = TEXT.replace("\n", " ")
    assert encoded(Counting(folder), [[one_line]]) == [whole(load_tokenizer(str(folder)), one_line)]
    assert "it has no line end where the tokenizer surely begins anew" in caplog.text


def test_the_corpus_is_tokenized_once_wherever_it_lies(folder, tmp_path, small, monkeypatch):
    monkeypatch.setenv("DSA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text(TEXT)
    first = load_corpus(TextConfig(path=str(tmp_path / "one")), Counting(folder))
    (tmp_path / "one").rename(tmp_path / "two")
    tokenizer = Counting(folder)
    again = load_corpus(TextConfig(path=str(tmp_path / "two")), tokenizer)
    assert not tokenizer.sizes
    np.testing.assert_array_equal(first.train.tokens, again.train.tokens)
    assert first.provenance["sha256"] == again.provenance["sha256"]
    (tmp_path / "two" / "a.txt").write_text(TEXT.replace("line 7 ", "line 8 "))
    load_corpus(TextConfig(path=str(tmp_path / "two")), tokenizer)
    assert sum(map(sum, tokenizer.sizes)) == len(TEXT)


@pytest.mark.parametrize("max_tokens", [1, 2, 50, 500, 3000, 10**6])
def test_max_tokens_reads_little_more_than_it_keeps(folder, small, max_tokens):
    tokenizer = Counting(folder)
    documents = [TEXT[:700], np.arange(8), TEXT, TEXT]
    given_ = (document if isinstance(document, np.ndarray) else iter([document]) for document in documents)
    got = np.concatenate(list(encode_documents(tokenizer, given_, max_tokens=max_tokens)))
    everything = [whole(tokenizer, TEXT[:700]), range(8), *[whole(tokenizer, TEXT)] * 2]
    expected = list(itertools.chain.from_iterable(everything))
    assert got.size >= min(max_tokens, len(expected)) and got.tolist() == expected[: got.size]
    assert sum(map(sum, tokenizer.sizes)) < 8 * max_tokens + 1000 or max_tokens > 500


def test_a_limited_corpus_is_that_of_the_whole_text(folder, tmp_path, small):
    (tmp_path / "a.txt").write_text(TEXT)
    tokenizer = load_tokenizer(str(folder))
    limited = load_corpus(TextConfig(path=str(tmp_path), max_tokens=500, held_out_fraction=0.5), tokenizer)
    tokens = sorted([*limited.train.tokens.tolist(), *limited.held_out.tokens.tolist()])
    assert tokens == sorted([*whole(tokenizer, TEXT)[:499], tokenizer.end_of_text_id])


def test_progress_is_told(tokenizer, small, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "_SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO")
    encoded(tokenizer, [[TEXT]])
    assert re.search(r"tokenized 0\.0 million characters of text, 0\.0\d million tokens, \d", caplog.text)


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path / "deep" / "tokens")


def arrays(*lists):
    return [np.array(each, np.uint16) for each in lists]


def test_the_cache_gives_back_what_it_was_given(cache, tmp_path):
    key = cache.key("t", np.uint16, ["a", "b", ""])
    assert cache.read(key, n=3) is None
    cache.write(key, arrays([1, 2], [], [3]))
    assert [each.tolist() for each in cache.read(key, n=3)] == [[1, 2], [], [3]]
    assert cache.read(key, n=3)[0].dtype == np.uint16
    assert [file.name for file in (tmp_path / "deep" / "tokens").iterdir()] == [f"{key}.tokens"]


def test_the_key_is_of_all_that_decides_the_ids(cache, folder, tmp_path):
    keys = [
        cache.key(*parts)
        for parts in (
            ("t", np.uint16, ["a", "b"]),
            ("u", np.uint16, ["a", "b"]),
            ("t", np.uint32, ["a", "b"]),
            ("t", np.uint16, ["ab"]),
            ("t", np.uint16, ["b", "a"]),
            ("t", np.uint16, ["a", "b", ""]),
        )
    ]
    assert len(set(keys)) == len(keys)
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.add_tokens(["line"])
    other.save(str(tmp_path / "tokenizer.json"))
    digests = {JsonTokenizer(each).digest for each in (folder, folder / "tokenizer.json", tmp_path)}
    assert len(digests) == 2


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "longer", "of another text", "fifo"])
def test_a_damaged_file_is_made_again(cache, tmp_path, kind, caplog):
    key = cache.key("t", np.uint16, ["a"])
    cache.write(key, arrays([1, 2, 3]))
    (file,) = (tmp_path / "deep" / "tokens").iterdir()
    content = file.read_bytes()
    if kind == "fifo":
        file.unlink()
        os.mkfifo(file)
    else:
        changed = {"flipped": content[:-1] + b"x", "cut": content[:-3], "empty": b"", "longer": content + b"x"}
        file.write_bytes(changed.get(kind, content))
    assert cache.read(key, n=2 if kind == "of another text" else 1) is None
    assert "is damaged" in caplog.text and "the text is tokenized again" in caplog.text
    cache.write(key, arrays([1, 2, 3]))
    assert cache.read(key, n=1)[0].tolist() == [1, 2, 3]


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = TokenCache(tmp_path / "file" / "tokens")
    cache.write("key", arrays([1]))
    assert "tokens are not kept in" in caplog.text and "DSA_JAX_CACHE names another directory" in caplog.text
    assert cache.read("key", n=1) is None


def test_what_a_killed_process_left_is_removed_after_a_day(cache, tmp_path):
    folder = tmp_path / "deep" / "tokens"
    folder.mkdir(parents=True)
    old, new = folder / ".a.tokens.1.tmp", folder / ".b.tokens.2.tmp"
    for file in (old, new):
        file.write_bytes(b"")
    os.utime(old, (0, 0))
    cache.write("key", arrays([1]))
    assert not old.exists() and new.exists()


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("DSA_JAX_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache()._directory == tmp_path / "mine" / "tokens"
    monkeypatch.delenv("DSA_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache()._directory == tmp_path / "xdg" / "dsa-jax" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache()._directory == tmp_path / ".cache" / "dsa-jax" / "tokens"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert default_cache() is None
