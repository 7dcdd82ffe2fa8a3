"""Test-wide set-up: the CPU backend with eight emulated devices, and compiled programs kept between test runs."""

import contextlib
import hashlib
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import pytest

COMPILED = Path(__file__).parents[1] / ".cache" / "compiled"
MAX_AGE, MAX_BYTES = 14 * 24 * 3600, 2**30


def cache_directory() -> Path:
    """Compiled programs of this jax on this kind of processor; another one could not run them."""
    try:
        processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        lines = [line for line in processor.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        lines = [platform.processor()]
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    name = f"jax-{version('jax')}-jaxlib-{version('jaxlib')}-{platform.system()}-{platform.machine()}-{key}"
    return COMPILED / name.lower()


def drop_unused(directory: Path, *, max_age: float = MAX_AGE, max_bytes: int = MAX_BYTES) -> None:
    """Delete programs that no run has read for `max_age` seconds, then those read longest ago, until `max_bytes` are left.

    File systems note the time of a read to the day.
    """
    found = []
    for path in directory.rglob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # deleted by another run
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = 0
    for used, size, path in sorted(found, reverse=True):
        total += size
        if total > max_bytes or time.time() - used > max_age:
            path.unlink(missing_ok=True)


# Read when jax is imported, here and by the commands that tests start, so nothing may import it before these lines.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # once for all the processes of a run
        drop_unused(COMPILED)


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory):
    """No token ids of earlier runs, and none left in the user's own cache; commands that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
