"""Corpora: what is read, how it is split, and which inputs are refused with which words."""

import json
import pickle

import numpy as np
import pytest

from dsa_jax.config import ConfigError, TextConfig
from dsa_jax.data import ByteTokenizer, load_corpus
from dsa_jax.data.documents import user_documents
from dsa_jax.data.split import digest, split_documents

END = ByteTokenizer.end_of_text_id


def load(path, **fields):
    return load_corpus(TextConfig(path=str(path), **fields), ByteTokenizer())


def documents_of(stream):
    return [document.tolist() for document in np.split(stream.tokens, stream.starts[1:])]


def texts_of(corpus):
    tokens = documents_of(corpus.train) + documents_of(corpus.held_out)
    assert all(document[-1] == END for document in tokens)
    return sorted(bytes(document[:-1]).decode() for document in tokens)


def write_lines(file, texts):
    file.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")


def test_the_standard_library_is_the_default():
    corpus = load_corpus(TextConfig(max_tokens=300_000), ByteTokenizer())
    described = corpus.describe()
    assert described["source"] == "python-stdlib"
    assert described["tokenizer"] == "bytes"
    assert sum(described["n_tokens"].values()) == 300_000
    assert b"__future__" in corpus.train.tokens[corpus.train.tokens < 256].astype(np.uint8).tobytes()
    assert json.loads(json.dumps(described)) == described


def test_all_kinds_of_files_of_a_directory(tmp_path):
    words = [f"document number {i} €" for i in range(60)]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text(words[59], encoding="utf-8")
    write_lines(tmp_path / "many.jsonl", [*words[1:50], ""])
    with (tmp_path / "many.jsonl").open("a") as file:
        file.write("\n")
    ids = [token for text in words[50:59] for token in (*text.encode(), END)]
    np.save(tmp_path / "tokens.npy", np.array(ids[:-1], np.int64))
    (tmp_path / "README.md").write_text(words[0], encoding="utf-8")
    (tmp_path / "table.csv").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")

    corpus = load(tmp_path)
    assert texts_of(corpus) == sorted(words)
    assert corpus.describe()["split_unit"] == "document"
    again = load(tmp_path)
    assert again.describe() == corpus.describe()
    np.testing.assert_array_equal(again.train.tokens, corpus.train.tokens)


def test_the_side_of_a_document_depends_on_its_content_alone(tmp_path):
    texts = [f"text {i} " * 5 for i in range(200)]
    write_lines(tmp_path / "all.jsonl", texts)
    write_lines(tmp_path / "part.jsonl", [*texts[100:][::-1], texts[150], texts[150]])
    whole, part = load(tmp_path / "all.jsonl"), load(tmp_path / "part.jsonl")
    held_out = {bytes(document[:-1]).decode() for document in documents_of(whole.held_out)}
    assert 5 <= len(held_out) <= 40
    expected = {text for text in texts[100:] if text in held_out}
    assert {bytes(document[:-1]).decode() for document in documents_of(part.held_out)} == expected
    assert not {tuple(d) for d in documents_of(part.train)} & {tuple(d) for d in documents_of(part.held_out)}
    assert whole.describe()["sha256"] != part.describe()["sha256"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_a_single_document_is_cut_so_that_both_sides_have_text(tmp_path, fraction):
    file = tmp_path / "one.txt"
    file.write_text(" ".join(str(i) for i in range(4000)))
    corpus = load(file, held_out_fraction=fraction)
    assert corpus.describe()["split_unit"] == "piece"
    n_train, n_held_out = corpus.train.tokens.size, corpus.held_out.tokens.size
    assert n_train + n_held_out == file.stat().st_size + 1
    assert 0.5 * fraction < n_held_out / (n_train + n_held_out) < min(1.5 * fraction, 0.95)
    content = file.read_bytes()
    for document in documents_of(corpus.train) + documents_of(corpus.held_out):
        assert bytes(token for token in document if token != END) in content


def test_neighbouring_pieces_on_one_side_are_joined(tmp_path):
    (tmp_path / "one.txt").write_text(" ".join(str(i) for i in range(4000)))
    corpus = load(tmp_path / "one.txt", held_out_fraction=0.1)
    # 40 pieces with 4 or 5 held out leave at most 6 stretches of training text.
    assert corpus.held_out.starts.size <= 5
    assert corpus.train.starts.size <= corpus.held_out.starts.size + 1


def test_the_smallest_document_can_be_split():
    document = np.array([7, END], np.uint16)
    split = split_documents([document], [digest(document)], 0.1)
    assert sorted([split.train[0].tolist(), split.held_out[0].tolist()]) == [[7], [END]]


def test_another_field_of_jsonl_holds_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": word}) + "\n" for word in ("abcd", "efgh", "ijkl")))
    assert texts_of(load(tmp_path, column="content", held_out_fraction=0.5)) == ["abcd", "efgh", "ijkl"]
    with pytest.raises(ConfigError, match=r'line 1 has no "text" string.*data\.text\.column names'):
        load(tmp_path)


def test_max_tokens_keeps_the_start(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["abcd", "efgh", "ijkl"])
    assert sum(load(tmp_path, max_tokens=8, held_out_fraction=0.5).describe()["n_tokens"].values()) == 8
    limited = load(tmp_path, max_tokens=6, held_out_fraction=0.5)  # abcd, END, and one token too few for a document
    tokens = np.concatenate([limited.train.tokens, limited.held_out.tokens])
    assert sorted(tokens.tolist()) == [*b"abcd", END]
    for too_few in (1, -5):
        with pytest.raises(ConfigError, match=rf"holds no text within data\.text\.max_tokens \({too_few}\)"):
            load(tmp_path, max_tokens=too_few)


def test_large_vocabularies_take_four_bytes_per_token(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 100_000

    np.save(tmp_path / "a.npy", np.arange(0, 100_000, 7, dtype=np.uint32))
    corpus = load_corpus(TextConfig(path=str(tmp_path)), Wide())
    assert corpus.train.tokens.dtype == np.uint32
    tokens = np.concatenate([corpus.train.tokens, corpus.held_out.tokens])
    assert tokens.max() == 99_995
    assert load_corpus(TextConfig(max_tokens=999), ByteTokenizer()).train.tokens.dtype == np.uint16


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def write_bad(folder, name):
    file = folder / name
    if name == "latin1.txt":
        file.write_bytes(b"caf\xe9 au lait")
    elif name == "latin1.jsonl":
        file.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    elif name == "syntax.jsonl":
        file.write_text('{"text": "ok"}\n{"text": \n')
    elif name == "no_text.jsonl":
        file.write_text('{"text": "ok"}\n\n{"content": "x"}\n')
    elif name == "half.jsonl":
        file.write_text('{"text": "ok"}\n{"text": "half a pair \\ud83d of two"}\n')
    elif name == "list.jsonl":
        file.write_text('["text"]\n')
    elif name == "number.jsonl":
        file.write_text('{"text": 3}\n')
    elif name == "object.npy":
        np.save(file, np.array([Bomb()], object), allow_pickle=True)
    elif name == "pickle.npy":
        file.write_bytes(pickle.dumps(Bomb()))
    elif name == "zip.npy":
        with file.open("wb") as out:
            np.savez(out, a=np.arange(3))
    elif name == "float.npy":
        np.save(file, np.ones(4, np.float32))
    elif name == "bool.npy":
        np.save(file, np.ones(4, bool))
    elif name == "matrix.npy":
        np.save(file, np.ones((4, 4), np.int32))
    elif name == "negative.npy":
        np.save(file, np.array([3, -1], np.int32))
    elif name == "large.npy":
        np.save(file, np.array([3, 257], np.uint16))
    elif name == "cut.npy":
        np.save(file, np.arange(100))
        file.write_bytes(file.read_bytes()[:-8])
    elif name == "nothing.npy":
        np.save(file, np.zeros(0, np.int32))
    elif name in ("empty.txt", "empty.npy", "text.csv"):
        file.write_bytes(b"")
    elif name == "folder":
        file.mkdir()
    return file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latin1.txt", r"latin1\.txt is not UTF-8: .* at byte 3\b"),
        ("latin1.jsonl", r"latin1\.jsonl is not UTF-8: .* at byte 28\b"),
        ("syntax.jsonl", r"syntax\.jsonl, line 2 is not JSON"),
        ("no_text.jsonl", r'no_text\.jsonl, line 3 has no "text" string'),
        ("half.jsonl", r"half\.jsonl, line 2 holds '\\ud83d', half of a surrogate pair"),
        ("list.jsonl", r'list\.jsonl, line 1 has no "text" string'),
        ("number.jsonl", r'number\.jsonl, line 1 has no "text" string'),
        ("object.npy", r"object\.npy is not a plain \.npy array"),
        ("pickle.npy", r"pickle\.npy is not a plain \.npy array"),
        ("zip.npy", r"zip\.npy is not a plain \.npy array"),
        ("cut.npy", r"cut\.npy is not a plain \.npy array"),
        ("empty.npy", r"empty\.npy is not a plain \.npy array"),
        ("nothing.npy", r"holds no text"),
        ("float.npy", r"dtype float32; expected 1-D integer"),
        ("bool.npy", r"dtype bool; expected 1-D integer"),
        ("matrix.npy", r"shape \(4, 4\) .*; expected 1-D integer"),
        ("negative.npy", r"ids from -1 to 3; expected 0 to 256"),
        ("large.npy", r"ids from 3 to 257; expected 0 to 256, the vocabulary of tokenizer 'bytes'"),
        ("empty.txt", r"holds no text"),
        ("folder", r"where no file is \.txt, \.md, \.jsonl \(each perhaps \.gz or \.zst\) or \.npy"),
        ("text.csv", r"suffix '\.csv'; expected \.txt, \.md, \.jsonl .* or \.npy"),
        ("absent", r"does not exist"),
    ],
)
def test_a_bad_corpus_is_refused_in_one_line(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(write_bad(tmp_path, name))
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dsa_jax.data.regular_files.os.open", refuse)
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read: Permission denied"):
        load(file)


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 117,
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (3L,), 'a': (".ljust(117),
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (1.5,), }".ljust(117),
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (-3,), }".ljust(117),
        b"\x00" * 117,
    ],
)
def test_a_damaged_header_of_token_ids_is_named(tmp_path, header):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header + b"\n" + bytes(24))
    with pytest.raises(ConfigError, match=r"a\.npy is not a plain \.npy array"):
        list(user_documents(str(tmp_path), ByteTokenizer()))
