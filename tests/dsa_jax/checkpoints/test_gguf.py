"""A GGUF file becomes a Hugging Face directory that computes what its source did."""

import json

import gguf
import numpy as np
import pytest

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.convert import to_hf
from dsa_jax.checkpoints.gguf import DTYPES, with_split_halves, write_hf_directory
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config import ConfigError
from dsa_jax.params import parameter_paths

WIDTH, HEADS, GROUPS, HEAD_DIM, MLP = 32, 4, 2, 8, 64
TOKENS = ["<|end|>", "<|start|>", "a", "b", "ab", "1", "2"]


def tensors():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    layer = {
        "attn_norm": draw(WIDTH),
        "ffn_norm": draw(WIDTH),
        "attn_q": draw(HEADS * HEAD_DIM, WIDTH),
        "attn_k": draw(GROUPS * HEAD_DIM, WIDTH),
        "attn_v": draw(GROUPS * HEAD_DIM, WIDTH),
        "attn_output": draw(WIDTH, HEADS * HEAD_DIM),
        "ffn_gate": draw(MLP, WIDTH),
        "ffn_up": draw(MLP, WIDTH),
        "ffn_down": draw(WIDTH, MLP),
    }
    named = {f"blk.0.{name}.weight": value for name, value in layer.items()}
    return named | {"token_embd.weight": draw(len(TOKENS), WIDTH), "output_norm.weight": draw(WIDTH)}


def write(path, *, architecture="llama", pre="smollm", change=None, quantised=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    for name, value in (change or (lambda named: named))(tensors()).items():
        if name == quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_tokens_and_settings_arrive(tmp_path):
    source = write(tmp_path / "tiny.gguf", quantised="blk.0.ffn_up.weight")
    assert "now a Hugging Face checkpoint" in to_hf(source, tmp_path / "hf")
    loaded = load_pretrained(tmp_path / "hf", dtype="float32")
    attention, given = loaded.config.attention, tensors()
    assert (loaded.config.norm_eps, attention.rope.theta, loaded.config.tie_embeddings) == (1e-5, 5000.0, True)
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (HEADS, GROUPS, HEAD_DIM)
    assert loaded.config.eos_token_ids == (0,) and loaded.config.bos_token_id == 1
    kernel = {path.split("/", 1)[1]: np.asarray(leaf[0]).T for path, leaf in parameter_paths(loaded.params).items()}
    in_bfloat16 = given["blk.0.attn_v.weight"].astype(DTYPES["bfloat16"]).astype(np.float32)
    np.testing.assert_array_equal(kernel["attention/wv/kernel"], in_bfloat16)
    np.testing.assert_allclose(kernel["mlp/up/kernel"], given["blk.0.ffn_up.weight"], atol=0.03)
    assert list(loaded.tokenizer.encode("ab12")) == [4, 5, 6]


def test_rotary_pairs_are_split_into_halves():
    interleaved = np.arange(8.0).reshape(8, 1)  # two heads of four channels: pairs (0, 1), (2, 3)
    np.testing.assert_array_equal(with_split_halves(interleaved, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; expected 'llama'"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'; expected"),
        ({"change": lambda named: named | {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight"),
        ({"change": lambda named: named | {"blk.0.attn_q.bias": np.ones(4, np.float32)}}, "attn_q.bias"),
    ],
)
def test_a_file_it_cannot_convert_is_refused_and_nothing_written(tmp_path, change, message):
    source = write(tmp_path / "tiny.gguf", **change)
    with pytest.raises(CheckpointError, match=message):
        write_hf_directory(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_full_directory_a_damaged_file_and_fp8_are_refused(tmp_path):
    source = write(tmp_path / "tiny.gguf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="not empty"):
        to_hf(source, tmp_path / "hf")
    with pytest.raises(ConfigError, match="weight_format"):
        to_hf(source, tmp_path / "other", weight_format="fp8_blocks")
    source.write_bytes(b"no gguf at all")
    with pytest.raises(CheckpointError, match="cannot be read as a GGUF file"):
        to_hf(source, tmp_path / "other")
