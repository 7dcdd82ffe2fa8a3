"""Test-wide set-up: the CPU backend with eight emulated devices, and compiled programs shared between the test processes."""

import os
import shutil
import tempfile

# Read when jax is imported or first used, so nothing may import it before these lines.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()


def pytest_configure(config):
    import jax

    # Many tests run the same small programs, in several processes: each is compiled once per test run.
    if not hasattr(config, "workerinput"):
        os.environ["DSA_TEST_CACHE"] = tempfile.mkdtemp(prefix="dsa-jax-tests-")
    jax.config.update("jax_compilation_cache_dir", os.environ["DSA_TEST_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["DSA_TEST_CACHE"], ignore_errors=True)
