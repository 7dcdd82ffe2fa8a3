"""A GGUF file of a Llama model, dequantised to a Hugging Face directory.

Source: the format's specification (ggml-org/ggml, docs/gguf.md). The `gguf` package parses and dequantises.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.safetensors_file import TensorToWrite, write_file
from dsa_jax.extras import import_extra

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [_SINGLE_DIGITS, _BYTE_LEVEL]},
}
_CONTROL = 3  # token type of control tokens
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_hf_directory(file: Path, directory: Path, *, dtype: str = "bfloat16") -> str:
    """Write the model and tokenizer of `file` as a Hugging Face directory; returns a line to print.

    The rotary pairs of queries and keys, which GGUF interleaves, are split into halves again, as Hugging Face has them.

    Args:
        file: a GGUF file with a model of the architecture `llama` and a byte-level BPE tokenizer.
        directory: new or empty; complete once it is there.
        dtype: of the tensors written, "float32" or "bfloat16".

    Raises:
        CheckpointError: for a file that is no GGUF, another architecture, tensor or tokenizer, or a directory with files.
        MissingExtraError: without the `gguf` package.
    """
    gguf = import_extra("gguf", extra="real", purpose="reading a GGUF file")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not empty; expected a new directory. Choose another one.")
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF file: {error}. Download it again.") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"{file} has the architecture {fields.get('general.architecture')!r}; expected 'llama'.")
    tokenizer, config = _tokenizer(file, fields), _config(file, fields, dtype)
    tensors = [_tensor(file, tensor, config, DTYPES[dtype]) for tensor in reader.tensors]
    config["tie_word_embeddings"] = "lm_head.weight" not in {tensor.name for tensor in tensors}
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_file(temporary / "model.safetensors", tensors, {"format": "pt"})
        for name, content in (("config.json", config), *tokenizer.items()):
            (temporary / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return f"{file} is now a Hugging Face checkpoint in {directory}"


def _config(file: Path, fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    def required(name: str) -> Any:
        if name not in fields:
            raise CheckpointError(f"{file} lacks the field {name}. Download it again, or convert another file.")
        return fields[name]

    for name in fields:
        if name.startswith("llama.rope.scaling") and fields[name] not in ("none", 1.0):
            raise CheckpointError(f"{file} has {name} = {fields[name]!r}; expected a model without rotary scaling.")
    end, start = required("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.bos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(required("tokenizer.ggml.tokens")),
        "hidden_size": required("llama.embedding_length"),
        "intermediate_size": required("llama.feed_forward_length"),
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": required("llama.attention.head_count"),
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", required("llama.attention.head_count")),
        "max_position_embeddings": required("llama.context_length"),
        "rms_norm_eps": float(f"{required('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored in float32
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", end),
        "torch_dtype": dtype,
    }


def _tensor(file: Path, tensor: Any, config: dict[str, Any], dtype: np.dtype) -> TensorToWrite:
    """One tensor under its Hugging Face name, dequantised when it is fetched."""
    part, heads = "", 0
    if tensor.name in _TOP_TENSORS:
        name = _TOP_TENSORS[tensor.name]
    else:
        prefix, _, rest = tensor.name.partition(".")
        layer, _, part = rest.removesuffix(".weight").partition(".")
        if prefix != "blk" or part not in _LAYER_TENSORS:
            raise CheckpointError(f"{file} has the tensor {tensor.name}, which a plain Llama model has not.")
        name = f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(part, 0)
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def fetch() -> Shaped[np.ndarray, "..."]:
        quants = import_extra("gguf.quants", extra="real", purpose="reading a GGUF file")
        weight = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        return (with_split_halves(weight, heads) if heads else weight).astype(dtype)

    return TensorToWrite(name, dtype, shape, fetch)


def with_split_halves(weight: Float[np.ndarray, "R E"], n_heads: int) -> Float[np.ndarray, "R E"]:
    """Rows of `n_heads` heads with channels (0, D/2, 1, D/2 + 1, ...), rotary pairs side by side, in the order 0 to D - 1."""
    rows, width = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _tokenizer(file: Path, fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of the tokenizer, by name."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file} has the tokenizer {kind!r} with the pre-tokenizer {pre!r}; expected 'gpt2' with one of "
            f"{', '.join(_PRE_TOKENIZERS)}. Take the model's Hugging Face directory instead."
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": index, "content": token, **plain, "special": True}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _CONTROL
    ]
    model = {"type": "BPE", "fuse_unk": False, "byte_fallback": False}
    model |= {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": fields["tokenizer.ggml.merges"]}
    special = {
        name: tokens[fields[field]]
        for name, field in (
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
        )
        if field in fields
    }
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": fields.get("llama.context_length"), **special}
    settings["add_bos_token"] = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": _PRE_TOKENIZERS[pre],
            "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
            "model": model,
        },
        "tokenizer_config.json": settings,
        "generation_config.json": {
            name: fields[f"tokenizer.ggml.{field}"]
            for name, field in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"))
            if f"tokenizer.ggml.{field}" in fields
        },
    }
