"""Tokenizers: round trips, ids that are no text, and what is said when one cannot be had."""

import json
import sys

import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data import ByteTokenizer, Tokenizer, load_tokenizer

EURO = "a €\n"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def write_tokenizer(folder, end_of_text="</s>"):
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    words = {"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4, end_of_text: 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([end_of_text])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode(EURO).tolist() == [97, 32, 0xE2, 0x82, 0xAC, 10]
    assert tokenizer.decode(tokenizer.encode(EURO)) == EURO
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (257, 256)


def test_bytes_decode_of_ids_that_are_no_text():
    assert ByteTokenizer().decode([97, 256, 98]) == "ab"
    assert ByteTokenizer().decode([97, 300, 0xE2, -1, 98]) == f"a{UNKNOWN * 3}b"
    assert ByteTokenizer().decode([]) == ""


def test_tokenizer_json_round_trip(tmp_path):
    file = write_tokenizer(tmp_path)
    for path in (file, tmp_path):
        tokenizer = load_tokenizer(str(path))
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.encode("to be or not").tolist() == [1, 2, 3, 4]
        assert tokenizer.decode([1, 2, 5]) == "to be"
        assert tokenizer.decode([1, 6, 2]) == f"to{UNKNOWN}be"
        assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (6, 5)


def test_a_prompt_starts_as_the_tokenizer_starts_a_text(tmp_path):
    file = write_tokenizer(tmp_path)
    assert load_tokenizer(str(file)).encode_prompt("to be").tolist() == [1, 2]
    assert ByteTokenizer().encode_prompt("a").tolist() == [97]
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    ends = [("[UNK]", 0), ("</s>", 5)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="[UNK] $A </s>", special_tokens=ends)
    tokenizer.save(str(file))
    assert load_tokenizer(str(file)).encode_prompt("to be").tolist() == [0, 1, 2]
    assert load_tokenizer(str(file)).encode_prompt("").tolist() == [0]


@pytest.mark.parametrize("token", ["<end>", {"content": "<end>"}], ids=["string", "object"])
def test_end_of_text_is_read_from_the_tokenizer_config(tmp_path, token):
    file = write_tokenizer(tmp_path, end_of_text="<end>")
    with pytest.raises(ConfigError, match="no token that ends a document"):
        load_tokenizer(str(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(str(file)).end_of_text_id == 5


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.text\.tokenizer is .*none\.json"):
        load_tokenizer(str(tmp_path / "none.json"))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'dsa-jax\[hf\]'"):
        load_tokenizer(str(tmp_path))
