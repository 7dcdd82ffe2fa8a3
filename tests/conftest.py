"""Test-wide set-up: the CPU backend with eight emulated devices, and compiled programs kept between test runs."""

import hashlib
import os
import platform
from pathlib import Path

# Read when jax is imported or first used, so nothing may import it before these lines.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()


def cache_directory() -> Path:
    """Compiled programs of this jax on this kind of processor; another one could not run them."""
    import jax
    import jaxlib

    try:
        processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines = [line for line in processor.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        lines = [platform.processor()]
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    name = f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{platform.system()}-{platform.machine()}-{key}"
    return Path(__file__).parents[1] / ".cache" / "compiled" / name.lower()


def pytest_configure(config):
    import jax

    # Commands that tests start share it, too.
    os.environ.setdefault("DSA_TEST_CACHE", str(cache_directory()))
    jax.config.update("jax_compilation_cache_dir", os.environ["DSA_TEST_CACHE"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
