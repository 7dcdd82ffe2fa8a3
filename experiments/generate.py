r"""Generate text from a checkpoint, streamed, with its speed.

    python -m experiments.generate --checkpoint=runs/quickstart --prompt='The sea was'
    python -m experiments.generate --checkpoint=HF_DIR --prompt_file=FILE --temperature=0.8 --top_p=0.95 --attention=dense
    python -m experiments.generate --checkpoint=HF_DIR --prompt='The sea was' --parallel=tp8

One prompt is streamed; several are generated together and printed one after the other.
"""

import sys
from pathlib import Path

from absl import flags

from dsa_jax.config import ConfigError
from dsa_jax.config.checks import user_path
from dsa_jax.config.limits import FRACTION, LENGTH, Choices, Range, Text
from dsa_jax.config.selections import common_selections
from experiments.flags import run_main
from experiments.values import limited_flag, path_flag

TEMPERATURE = Range(0.0, 3.4e38, meaning="0 (greedy) or a positive number, finite in float32")

_CHECKPOINT = path_flag("checkpoint", None, "Run directory or Hugging Face directory.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
_PROMPT_FILE = path_flag("prompt_file", "", "UTF-8 file that holds one prompt.")
_MAX_NEW_TOKENS = limited_flag("max_new_tokens", 128, int, Range(0, 2**30), "Tokens to write at most.")
_TEMPERATURE = limited_flag("temperature", 0.0, float, TEMPERATURE, "0 takes the most probable token; higher is more varied.")
_TOP_P = limited_flag("top_p", 1.0, float, FRACTION, "Draw from the most probable tokens that hold this probability together.")
_TOP_K = limited_flag("top_k", 0, int, Range(0, 2**31 - 1), "Draw from this many of the most probable tokens; 0: all.")
_SEED = limited_flag("seed", 0, int, Range(0, 2**32 - 1), "Seed of the sampling.")
_ATTENTION = limited_flag("attention", "", str, Choices(common_selections, or_empty=True), "Empty: as it was trained.")
_CACHE_DTYPE = limited_flag(
    "cache_dtype", "", str, Choices(("float32", "bfloat16", "fp8"), or_empty=True), "Empty: as the model computes."
)
_WEIGHT_FORMAT = flags.DEFINE_enum(
    "weight_format", "plain", ["plain", "fp8_blocks"], "fp8_blocks: keep a Hugging Face checkpoint's weights in fp8."
)
_PAGE_SIZE = limited_flag("page_size", 0, int, Range(0, 2**30), "Tokens per page of a paged cache; 0: contiguous.")
_PARALLEL = limited_flag(
    "parallel",
    "single",
    str,
    Text(200),
    "Devices to split weights and heads over, a preset as of config.parallel: tp8, ep4_tp2, fsdp8, ...",
)
_PREFILL_CHUNK = limited_flag("prefill_chunk", 512, int, LENGTH, "Prompt tokens processed at a time.")


def main(argv: list[str]) -> None:
    """Generate and print."""
    del argv
    from dsa_jax.checkpoints.open import open_checkpoint
    from dsa_jax.config import ParallelConfig
    from dsa_jax.data.documents import unpaired_surrogate
    from dsa_jax.generation import generate
    from dsa_jax.generation.text import TextStream
    from dsa_jax.opening import opening_line
    from dsa_jax.parallel.placement import on_mesh

    texts = [*_PROMPT.value, *([_read(user_path("--prompt_file", _PROMPT_FILE.value))] if _PROMPT_FILE.value else [])]
    if not texts:
        raise ConfigError("there is nothing to continue. Give --prompt=TEXT or --prompt_file=FILE.")
    for text in texts:
        if unpaired_surrogate(text):
            raise ConfigError(f"--prompt is {text!r}, which is not UTF-8. Put it into a file and give --prompt_file=FILE.")
    parallel = ParallelConfig(preset=_PARALLEL.value)
    with on_mesh(parallel):
        loaded = open_checkpoint(_CHECKPOINT.value, weight_format=_WEIGHT_FORMAT.value)
    print(opening_line(loaded.config, parallel), file=sys.stderr)  # stdout is the text alone
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{_CHECKPOINT.value} has no tokenizer that can be read; expected a tokenizer.json there, and the extra hf "
            "installed. A warning above says what is wrong with one that is there."
        )
    prompts = [tokenizer.encode_prompt(text).tolist() for text in texts]
    streams = [TextStream(tokenizer, prompt) for prompt in prompts]
    written = list(texts)
    n_shown = 0

    def show(row: int, text: str) -> None:
        nonlocal n_shown
        written[row] += text
        if len(texts) == 1:
            print(written[0][n_shown:], end="", flush=True)
            n_shown = len(written[0])

    result = generate(
        loaded,
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        attention=_ATTENTION.value or None,
        seed=_SEED.value,
        cache_dtype=_CACHE_DTYPE.value or None,
        page_size=_PAGE_SIZE.value or None,
        prefill_chunk=_PREFILL_CHUNK.value,
        on_token=lambda row, token: show(row, streams[row].add(token)),
    )
    for row, stream in enumerate(streams):
        show(row, stream.finish())
    if len(texts) == 1:
        print()
    else:
        for text in written:
            print(f"{text}\n")
    timings = result.timings
    print(
        f"prefill {timings.prefill_tokens} tokens, {timings.prefill_tokens_per_second:.1f} tokens/s; "
        f"decode {timings.decode_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s; "
        f"compilation {timings.compile_seconds:.1f} s; cache {timings.cache_bytes / 2**20:.1f} MiB",
        file=sys.stderr,
    )


def _read(path: Path) -> str:
    from dsa_jax.data.regular_files import read_text

    try:
        return read_text(path)
    except ConfigError as error:
        raise ConfigError(f"--prompt_file: {error}") from error


if __name__ == "__main__":
    run_main(main)
