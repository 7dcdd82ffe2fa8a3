"""Live parity with the installed transformers: `make parity` makes the environment and runs it."""

import importlib.util
import os

import pytest

for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
        raise pytest.UsageError(f"tests/parity needs {package}, which is not installed here. Run `make parity`.")

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def compile_quickly():
    import jax

    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)
