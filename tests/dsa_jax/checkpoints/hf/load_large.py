"""Write a random bfloat16 checkpoint in four files, load it, and report time and peak memory of the process.

    python tests/dsa_jax/checkpoints/hf/load_large.py DIR [--layers=19]

The first call writes, the second one loads. 19 layers are 1.03e9 parameters. What it prints is JSON: parameters, bytes,
seconds, and the resident memory before loading and at its highest.
"""

import json
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.hf.safetensors_file import TensorToWrite, write_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
N_FILES = 4
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 5632, 16, 8, 128, 32000


def shapes(n_layers):
    """Every tensor of the checkpoint."""
    attention = {
        "q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    }
    mlp = {"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)}
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{prefix}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        found |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found


def write(directory, n_layers):
    """Write the checkpoint; a tensor starts at its own place of one random pattern."""
    directory.mkdir(parents=True, exist_ok=True)
    pattern = np.random.default_rng(0).standard_normal(1 << 20).astype(BFLOAT16)

    def tensor(name, shape):
        return TensorToWrite(name, BFLOAT16, shape, lambda: np.resize(np.roll(pattern, len(name)), shape))

    tensors = [tensor(name, shape) for name, shape in shapes(n_layers).items()]
    weight_map = {}
    for number in range(N_FILES):
        file, part = f"model-{number + 1:05d}-of-{N_FILES:05d}.safetensors", tensors[number::N_FILES]
        write_file(directory / file, part, {"format": "pt"})
        weight_map |= {each.name: file for each in part}
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "head_dim": HEAD_DIM,
        "num_hidden_layers": n_layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(each.n_bytes for each in tensors)


def memory(field):
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main():
    """Write in a process of its own, so that only loading is measured."""
    directory = Path(sys.argv[1])
    n_layers = int(sys.argv[2].removeprefix("--layers=")) if len(sys.argv) > 2 else 19
    if not (directory / "config.json").is_file():
        write(directory, n_layers)
        print(f"wrote {directory}; run again to load it")
        return
    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = memory("VmRSS"), time.perf_counter()
    params = jax.block_until_ready(load_pretrained(directory).params)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(params)
    report = {
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "seconds": round(seconds, 2),
        "resident_before": before,
        "resident_highest": memory("VmHWM"),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
