"""The command as a user runs it, on a run directory, and its errors."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from dsa_jax.data import ByteTokenizer
from dsa_jax.generation import generate
from dsa_jax.model import build_model, init_params
from dsa_jax.pretrained import Pretrained
from dsa_jax.train.checkpoint import CheckpointStore
from dsa_jax.train.rundir import open_run
from tests.dsa_jax.train.tiny import tiny_config

ROOT = Path(__file__).parents[2]
PROMPT, NEW = "naïve: ", 12


def start(*arguments, n_devices=1):
    devices = f"--xla_force_host_platform_device_count={n_devices}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": os.environ["DSA_TEST_CACHE"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-m", "experiments.generate", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def saved_run(directory):
    """A run directory with random parameters, and the model in it."""
    config = tiny_config("mla")
    config.model.tie_embeddings = False
    model = build_model(config.model)
    params = init_params(model, jax.random.key(1))
    run = open_run(directory, config)
    with CheckpointStore(run.checkpoint_dir("pretrain"), keep=1) as store:
        store.save(0, {"params": params}, {"stage": "pretrain", "step": 0})
        store.wait()
    return Pretrained(config.model, model, params, ByteTokenizer())


def test_text_on_stdout_rates_on_stderr_and_errors_in_one_line(tmp_path):
    loaded = saved_run(tmp_path / "run")
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    run = f"--checkpoint={tmp_path / 'run'}"
    limits = f"--max_new_tokens={NEW}", "--attention=sparse"
    processes = {
        "one": start(run, f"--prompt={PROMPT}", *limits, "--page_size=8"),
        "two": start(run, "--prompt=b", f"--prompt_file={tmp_path}/prompt.txt", *limits),
        "split": start(run, f"--prompt={PROMPT}", *limits, "--parallel=tp2", n_devices=2),
        "nothing": start(run),
        "uneven": start(run, "--prompt=a", "--parallel=tp5", n_devices=5),
        "cold": start(run, "--prompt=a", "--temperature=-1"),
        "no-tokenizer": start(f"--checkpoint={ROOT / 'tests/fixtures/hf/llama'}", "--prompt=a"),
    }
    results = {name: (*process.communicate(timeout=300), process.returncode) for name, process in processes.items()}

    prompts = [loaded.tokenizer.encode(text).tolist() for text in ("b", PROMPT)]
    expected = generate(loaded, prompts, max_new_tokens=NEW, attention="sparse", stop_tokens=[256]).token_ids
    texts = [loaded.tokenizer.decode(tokens) for tokens in expected]
    for name in ("one", "split"):
        output, errors, status = results[name]
        assert status == 0, errors
        assert output == f"{PROMPT}{texts[1]}\n"
        assert errors.strip().splitlines()[-1].startswith("prefill 8 tokens, ") and "decode" in errors
    output, errors, status = results["two"]
    assert status == 0, errors
    assert output == f"b{texts[0]}\n\n{PROMPT}{texts[1]}\n\n"

    messages = {
        "nothing": "there is nothing to continue",
        "cold": "temperature is -1.0; expected 0 (greedy) or a positive number",
        "no-tokenizer": "has no tokenizer",
        "uneven": "parallel.tensor is 5, which does not divide axis 2 of dense_layers/attention/wkv_b/kernel",
    }
    for name, message in messages.items():
        output, errors, status = results[name]
        assert status == 2 and output == "" and "Traceback" not in errors, errors
        assert errors.strip().splitlines()[-1].startswith("error: ") and message in errors, errors
