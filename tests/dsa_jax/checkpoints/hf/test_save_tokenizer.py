"""The tokenizer that goes with a saved model: its own files, whatever they are called, and what is no tokenizer."""

import json

import numpy as np
import pytest

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config import ModelConfig
from dsa_jax.data.tokenizer import ByteTokenizer, JsonTokenizer
from tests.dsa_jax.checkpoints.hf.test_save import assert_same, config_json, drawn, gqa


def word_tokenizer(directory):
    """A tokenizer.json with what usually lies beside it."""
    directory.mkdir(exist_ok=True)
    vocab = {"w0": 0, "w1": 1, "</s>": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model} | parts
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (directory / "unrelated.bin").write_bytes(b"0")
    return directory


@pytest.mark.parametrize("given", [JsonTokenizer, str, lambda path: path / "tokenizer.json"], ids=["object", "folder", "file"])
def test_tokenizer_files_come_along(saved, given):
    target, loaded = saved
    source = word_tokenizer(target.parent / "tokenizer")
    loaded.config.eos_token_ids = (2,)
    save_pretrained(target, loaded.config, loaded.params, tokenizer=given(source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "unrelated.bin").exists()
    again = load_pretrained(target)
    assert again.tokenizer is not None
    assert again.tokenizer.end_of_text_id == 2
    assert again.config.eos_token_ids == (2,)


@pytest.mark.parametrize("given", [JsonTokenizer, str], ids=["object", "file"])
def test_a_tokenizer_of_another_name_is_the_one_that_is_written(saved, given):
    target, loaded = saved
    folder = word_tokenizer(target.parent / "others")
    file = folder / "mine.json"
    file.write_text((folder / "tokenizer.json").read_text().replace('"w0": 0, "w1": 1', '"w1": 0, "w0": 1'))
    save_pretrained(target, loaded.config, loaded.params, tokenizer=given(file))
    again = load_pretrained(target).tokenizer
    assert again.encode("w0 w1").tolist() == [1, 0] and again.end_of_text_id == 2
    assert not (target / "generation_config.json").exists()  # that of the folder's own tokenizer


def test_other_files_of_a_tokenizer_stand_for_their_folder(saved):
    target, loaded = saved
    folder = word_tokenizer(target.parent / "pieces")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    save_pretrained(target, loaded.config, loaded.params, tokenizer=str(folder / "tokenizer.model"))
    assert (target / "tokenizer.model").read_bytes() == b"pieces" and load_pretrained(target).tokenizer.end_of_text_id == 2
    with pytest.raises(CheckpointError, match=r"unrelated\.bin'; expected a directory with"):
        save_pretrained(target, loaded.config, loaded.params, tokenizer=str(folder / "unrelated.bin"))


def test_the_byte_tokenizer_is_a_field(tmp_path):
    config = ModelConfig(vocab_size=257, hidden_dim=32, mlp_dim=40, n_layers=1, attention=gqa())
    save_pretrained(tmp_path / "ours", config, drawn(config), tokenizer=ByteTokenizer())
    assert config_json(tmp_path / "ours")["dsa_tokenizer"] == "bytes"
    assert isinstance(load_pretrained(tmp_path / "ours").tokenizer, ByteTokenizer)


class OtherTokenizer:
    """A tokenizer of the user's own, which has no files to copy."""

    name, vocab_size, end_of_text_id = "other", 3, 2

    def encode(self, text):
        return np.zeros(len(text), np.int32)

    encode_prompt = encode

    def decode(self, ids):
        return "?" * len(ids)


def test_all_end_tokens_are_written(saved):
    """Those of the model, of the generation settings and of the tokenizer, to both files: generation here stops at each."""
    target, loaded = saved
    folder = word_tokenizer(target.parent / "words")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_k": 3}))
    for ends, expected in (((5,), [5, 2, 7]), ((7, 6), [7, 6, 2]), ((), [2, 7])):
        loaded.config.eos_token_ids = ends
        save_pretrained(target, loaded.config, loaded.params, tokenizer=folder)
        written = json.loads((target / "generation_config.json").read_text())
        assert written == {"eos_token_id": expected, "top_k": 3} and config_json(target)["eos_token_id"] == expected
        assert load_pretrained(target).config.eos_token_ids == load_pretrained(target).stop_tokens == tuple(expected)
        assert loaded.config.eos_token_ids == ends


def test_the_end_token_of_a_tokenizer_without_generation_settings_is_written(tmp_path):
    config = ModelConfig(vocab_size=257, hidden_dim=32, mlp_dim=40, n_layers=1, attention=gqa())
    save_pretrained(tmp_path, config, drawn(config), tokenizer=ByteTokenizer())
    assert config_json(tmp_path)["eos_token_id"] == 256
    config.eos_token_ids = (2,)
    save_pretrained(tmp_path, config, drawn(config), tokenizer=JsonTokenizer(word_tokenizer(tmp_path.with_name("words"))))
    assert config_json(tmp_path)["eos_token_id"] == 2


def test_the_files_that_declare_tokens_come_along(saved):
    target, loaded = saved
    folder = word_tokenizer(target.parent / "declared")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<end>": 3}))
    (folder / "tokenizer.json").rename(folder / "mine.json")
    save_pretrained(target, loaded.config, loaded.params, tokenizer=folder / "mine.json")
    again = load_pretrained(target)
    assert again.tokenizer.encode("w1 <end>").tolist() == [1, 3] and 3 in again.config.eos_token_ids


def test_a_tokenizer_must_be_one(saved):
    target, loaded = saved
    for wrong in (str(target), OtherTokenizer()):
        with pytest.raises(CheckpointError, match="tokenizer is"):
            save_pretrained(target, loaded.config, loaded.params, tokenizer=wrong)
    assert_same(load_pretrained(target).params, loaded.params)
