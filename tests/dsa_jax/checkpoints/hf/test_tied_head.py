"""A head among the weights of a checkpoint whose config.json ties it to the embedding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.from_hf import checkpoint_params, resolve_checkpoint
from dsa_jax.checkpoints.hf import CheckpointError, read_model_config
from dsa_jax.config import Config
from dsa_jax.params import parameter_paths
from tests.dsa_jax.checkpoints.hf.tiny import HIDDEN, VOCAB, config_of, read_tensors, tensors_of, write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied(directory, head, **options):
    content = config_of("llama_tied")
    tensors = tensors_of(content)
    return write_checkpoint(directory, content, tensors | {HEAD: head(tensors[EMBEDDING])}, **options)


@pytest.mark.parametrize("n_files", [1, 3])
def test_the_stored_head_is_used_where_it_differs(n_files, tmp_path, caplog):
    directory = tied(tmp_path / "tied", lambda embedding: np.roll(embedding, 1, axis=0), n_files=n_files)
    loaded = load_pretrained(directory)
    assert not loaded.config.tie_embeddings
    assert "lm_head.weight holds other values" in caplog.text
    np.testing.assert_array_equal(loaded.params["lm_head"]["kernel"], read_tensors(directory)[HEAD].T)
    untied = write_checkpoint(tmp_path / "untied", config_of("llama_tied", tie_word_embeddings=False), read_tensors(directory))
    ids = jnp.array([[5, 6, 7]])
    ours, theirs = (
        each.model.apply({"params": each.params}, ids).logits.argmax(-1) for each in (loaded, load_pretrained(untied))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_one_other_number_in_the_last_row_is_enough(tmp_path):
    def head(embedding):
        changed = embedding.copy()
        changed[-1, -1] += 1
        return changed

    assert not read_model_config(tied(tmp_path, head)).tie_embeddings


@pytest.mark.parametrize(
    "head",
    [
        lambda embedding: embedding,
        lambda embedding: embedding.astype(np.float64),
        lambda embedding: np.zeros((0, HIDDEN), np.float32),
    ],
    ids=["a copy", "a wider copy", "an empty tensor"],
)
def test_equal_copies_stay_tied(head, tmp_path):
    loaded = load_pretrained(tied(tmp_path, head))
    assert loaded.config.tie_embeddings
    assert "lm_head" not in loaded.params


def test_a_copy_in_another_type_is_compared_by_value(tmp_path):
    content = config_of("llama_tied", dtype="bfloat16")
    tensors = tensors_of(content)
    same = tensors | {HEAD: tensors[EMBEDDING].astype(np.float32)}
    assert read_model_config(write_checkpoint(tmp_path / "same", content, same)).tie_embeddings
    finer = tensors | {HEAD: tensors[EMBEDDING].astype(np.float32) * np.float32(1.001)}
    assert not np.array_equal(finer[HEAD], finer[HEAD].astype(ml_dtypes.bfloat16))
    assert not read_model_config(write_checkpoint(tmp_path / "finer", content, finer)).tie_embeddings


def test_a_head_of_another_shape_is_an_error_and_no_tie(tmp_path):
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight with shape \[{VOCAB - 1}, {HIDDEN}\]"):
        load_pretrained(tied(tmp_path, lambda embedding: embedding[:-1]))


def test_a_retrofit_and_an_export_keep_the_stored_head(tmp_path):
    config = Config()
    config.init.hf_dir = str(tied(tmp_path / "tied", lambda embedding: -embedding))
    config.data.text.tokenizer, config.data.recall_fraction = "bytes", 1.0
    resolved = resolve_checkpoint(config)
    assert not resolved.model.tie_embeddings
    assert "lm_head/kernel" in parameter_paths(checkpoint_params(resolved))
    loaded = load_pretrained(tmp_path / "tied")
    save_pretrained(tmp_path / "exported", loaded.config, loaded.params)
    again = load_pretrained(tmp_path / "exported")
    assert not again.config.tie_embeddings
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_config_without_weights_is_what_it_says(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama_tied"))
    (directory / "model.safetensors").unlink()
    assert read_model_config(directory).tie_embeddings
