"""Compiled programs that are kept between test runs: shared by all processes of a run, and dropped when nobody reads them."""

import os
import time

import jax

from tests.conftest import drop_unused

DAY = 24 * 3600


def test_every_process_of_a_run_finds_them():
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1


def test_unread_programs_go_first_and_then_those_read_longest_ago(tmp_path):
    folder = tmp_path / "jax-0.0-cpu"
    folder.mkdir()
    for name, days in {"today": 0, "yesterday": 1, "last-month": 30}.items():
        file = folder / f"{name}-cache"
        file.write_bytes(bytes(10))
        os.utime(file, (time.time() - days * DAY,) * 2)
    left = lambda: {file.name.removesuffix("-cache") for file in folder.iterdir()}
    drop_unused(tmp_path)
    assert left() == {"today", "yesterday"}
    drop_unused(tmp_path, max_bytes=15)
    assert left() == {"today"}
    drop_unused(tmp_path / "nowhere")
