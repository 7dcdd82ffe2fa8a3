"""The command as a user runs it, on a run directory, and its errors."""

import os

import jax

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.data import ByteTokenizer
from dsa_jax.foreign import printable_text
from dsa_jax.generation import generate
from dsa_jax.model import build_model, init_params
from dsa_jax.run.checkpoints import CheckpointStore
from dsa_jax.run.directory import open_run
from tests.dsa_jax.conftest import compile_quickly
from tests.dsa_jax.train.tiny import tiny_config
from tests.experiments.commands import ROOT, finish, start

__all__ = ["compile_quickly"]  # as the commands do

PROMPT, NEW = "naïve: ", 12


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
    os.mkfifo(tmp_path / "fifo")
    run = f"--checkpoint={tmp_path / 'run'}"
    limits = f"--max_new_tokens={NEW}", "--attention=sparse"
    processes = {
        "one": start("generate", run, f"--prompt={PROMPT}", *limits, "--page_size=8"),
        "two": start("generate", run, "--prompt=b", f"--prompt_file={tmp_path}/prompt.txt", *limits),
        "split": start("generate", run, f"--prompt={PROMPT}", *limits, "--parallel=tp2", n_devices=2),
        "nothing": start("generate", run),
        "fifo": start("generate", run, f"--prompt_file={tmp_path}/fifo"),
        "uneven": start("generate", run, "--prompt=a", "--parallel=tp5", n_devices=5),
        "cold": start("generate", run, "--prompt=a", "--temperature=-1"),
        "no-tokenizer": start("generate", f"--checkpoint={ROOT / 'tests/fixtures/hf/llama'}", "--prompt=a"),
    }
    results = {name: finish(process) for name, process in processes.items()}

    prompts = [loaded.tokenizer.encode(text).tolist() for text in ("b", PROMPT)]
    expected = generate(loaded, prompts, max_new_tokens=NEW, attention="sparse", stop_tokens=[256]).token_ids
    texts = [loaded.tokenizer.decode(tokens) for tokens in expected]
    for name in ("one", "split"):
        status, output, errors = results[name]
        assert status == 0, errors
        assert output == printable_text(f"{PROMPT}{texts[1]}\n")
        assert errors.strip().splitlines()[-1].startswith("prefill 8 tokens, ") and "decode" in errors
    status, output, errors = results["two"]
    assert status == 0, errors
    assert output == printable_text(f"b{texts[0]}\n\n{PROMPT}{texts[1]}\n\n")

    messages = {
        "nothing": "there is nothing to continue",
        "fifo": f"--prompt_file: {tmp_path}/fifo is a FIFO; expected a regular file",
        "cold": "temperature is -1.0; expected 0 (greedy) or a positive number",
        "no-tokenizer": "has no tokenizer",
        "uneven": "parallel.tensor is 5, which does not divide axis 2 of dense_layers/attention/wkv_b/kernel",
    }
    for name, message in messages.items():
        status, output, errors = results[name]
        assert status == 2 and output == "" and "Traceback" not in errors, errors
        assert errors.strip().splitlines()[-1].startswith("error: ") and message in errors, errors
