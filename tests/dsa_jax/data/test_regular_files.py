"""Files that are opened, decompressed and decoded, and those that are refused."""

import gzip
import json
import os
import sys
import zlib

import numpy as np
import pytest

from dsa_jax.config import ConfigError, TextConfig
from dsa_jax.data import ByteTokenizer, documents, load_corpus, regular_files
from dsa_jax.data.documents import user_documents
from dsa_jax.data.regular_files import opened, read_regular, read_text, text_blocks

TEXT = "the rain in Spain, 雨 and € — " * 4000


def documents_of(path, **fields):
    return ["".join(document) for document in user_documents(str(path), ByteTokenizer(), **fields)]


def lines(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


@pytest.fixture
def zstd():
    """Compresses by the zstandard package; its frames are what every other writer makes."""
    return pytest.importorskip("zstandard", reason="the data extra is not installed").ZstdCompressor().compress


def test_gzip_is_read_as_what_it_holds(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "b.JSONL.GZ").write_bytes(gzip.compress(lines("one").encode()) + gzip.compress(lines("two").encode()))
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b""))
    assert documents_of(tmp_path) == [TEXT, "one", "two", ""]


@pytest.mark.parametrize("kind", ["cut", "changed", "none"])
def test_damaged_gzip_is_an_error(tmp_path, kind):
    content = gzip.compress(TEXT.encode())
    content = {"cut": content[:-9], "changed": content[:-6] + b"x" + content[-5:], "none": b"plain text"}[kind]
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt\.gz cannot be read: ") as caught:
        documents_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_zstd_is_read_as_what_it_holds(tmp_path, zstd):
    (tmp_path / "a.txt.zst").write_bytes(zstd(TEXT.encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(lines("one").encode()) + zstd(lines("two").encode()))
    (tmp_path / "c.txt.zst").write_bytes(b"")
    assert documents_of(tmp_path) == [TEXT, "one", "two", ""]


@pytest.mark.parametrize("kind", ["cut", "half", "followed", "none"])
def test_damaged_zstd_is_an_error(tmp_path, zstd, kind):
    content = zstd(np.random.default_rng(0).bytes(10**5).hex().encode())
    content = {"cut": content[:-5], "half": content[: len(content) // 2], "followed": content + b"xx", "none": b"plain text"}[
        kind
    ]
    (tmp_path / "a.txt.zst").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt\.zst cannot be read: its compressed data are (cut off|damaged)"):
        documents_of(tmp_path)


class Frame:
    """A decompressor with the interface that both packages share; a frame is "<", zlib's data and what zlib leaves."""

    def __init__(self):
        self._zlib, self.eof, self.unused_data = zlib.decompressobj(), False, b""

    def decompress(self, data):
        content = self._zlib.decompress(data)
        self.eof, self.unused_data = self._zlib.eof, self._zlib.unused_data
        return content


def test_frames_follow_each_other_in_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(regular_files, "_zstd", lambda _: Frame)
    monkeypatch.setattr(regular_files, "_COMPRESSED_BLOCK", 7)
    parts = [TEXT.encode(), b"", b"end"]
    file = tmp_path / "a.zst"
    file.write_bytes(b"".join(map(zlib.compress, parts)))
    assert read_regular(file) == b"".join(parts)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="its compressed data are cut off"):
        read_regular(file)


def test_zstd_that_cannot_be_read_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(documents, "reads_zstd", lambda: False)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    (tmp_path / "b.txt").write_text("text")
    assert documents_of(tmp_path) == ["text"]
    assert "1 .zst files, which need `pip install zstandard`, (a.jsonl.zst)" in caplog.text
    if sys.version_info < (3, 14):
        with pytest.raises(ImportError, match=r"a\.jsonl\.zst needs the zstandard package.*pip install 'dsa-jax\[data\]'"):
            documents_of(tmp_path / "a.jsonl.zst")


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + lines("one", "two").encode())
    (tmp_path / "b.txt").write_bytes(mark + b"three\xef\xbb\xbf")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(mark + b"four"))
    (tmp_path / "d.txt").write_bytes(mark)
    assert documents_of(tmp_path) == ["one", "two", "three\ufeff", "four", ""]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_another_encoding_is_named(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes("text é".encode(encoding))
    message = (
        r"is not UTF-8 \(it begins as UTF-16 does\): .* at byte 0" if encoding == "utf-16" else r"is not UTF-8: .* at byte 10"
    )
    with pytest.raises(ConfigError, match=message):
        documents_of(file)


@pytest.mark.parametrize("n", [5, 2**20 - 1, 2**20, 2**20 + 1])
def test_characters_across_blocks_and_the_place_of_bad_bytes(tmp_path, n):
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * n + "€雨".encode())
    assert documents_of(file) == ["a" * n + "€雨"]
    file.write_bytes(b"a" * n + b"\xe2\x82x")
    with pytest.raises(ConfigError, match=rf"is not UTF-8: .* at byte {n}\."):
        documents_of(file)
    file.write_bytes(b"a" * n + b"\xe2\x82")
    with pytest.raises(ConfigError, match=rf"is not UTF-8: unexpected end of data at byte {n}\."):
        documents_of(file)


def test_a_large_text_comes_in_blocks(tmp_path):
    (tmp_path / "a.txt").write_text("a" * (5 * 2**20 + 3))
    with opened(tmp_path / "a.txt") as stream:
        assert [len(block) for block in text_blocks(stream, tmp_path)] == [2**20] * 5 + [3]


def test_null_is_an_empty_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n{"text": ""}\n')
    corpus = load_corpus(TextConfig(path=str(tmp_path), held_out_fraction=0.5), ByteTokenizer())
    assert sum(corpus.describe()["n_documents"].values()) == 2
    (tmp_path / "a.jsonl").write_text('{"body": null}\n')
    assert documents_of(tmp_path, column="body") == [""]
    for wrong in ("null", "{}", '{"body": false}', '{"body": ["a"]}', "[" * 10**5):
        (tmp_path / "a.jsonl").write_text(wrong)
        with pytest.raises(ConfigError, match=r'a\.jsonl, line 1 (has no "body" string|is not JSON)'):
            documents_of(tmp_path, column="body")


@pytest.mark.parametrize("kind", ["FIFO", "character device", "directory"])
def test_only_regular_files_are_opened(tmp_path, kind):
    file = tmp_path / "file"
    {"FIFO": os.mkfifo, "character device": lambda path: path.symlink_to("/dev/zero"), "directory": os.mkdir}[kind](file)
    with pytest.raises(ConfigError, match=f"file is a {kind}; expected a regular file"):
        read_regular(file)


def test_a_fifo_that_takes_the_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr(regular_files, "special_kind", lambda _: "")
    with pytest.raises(ConfigError, match="is a FIFO"):
        read_regular(tmp_path / "file")


def test_no_more_is_read_than_allowed(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", most_bytes=5) == b"12345"
    with pytest.raises(ConfigError, match="has more than 4 bytes"):
        read_regular(tmp_path / "file", most_bytes=4)


def test_a_text_is_that_of_a_regular_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfthe rain\r\n\xef\xbb\xbf")
    assert read_text(file) == "the rain\r\n\ufeff"
    for content, message in ((b"caf\xe9", "is not UTF-8: .* at byte 3"), (b"\xff\xfea\0", "it begins as UTF-16 does")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"prompt\.txt .*{message}"):
            read_text(file)
    with pytest.raises(ConfigError, match=r"nowhere cannot be read: No such file"):
        read_text(tmp_path / "nowhere")
