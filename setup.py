"""Package metadata and the optional dependency sets. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HF = ["tokenizers>=0.23"]
PLOT = ["matplotlib>=3.10"]
DATA = ["grain>=0.2.18,<0.3", "pyarrow>=21", "zstandard>=0.23"]
# Exactly this torch: its CPU build is small, and the fixtures were made with it.
GGUF = ["gguf>=0.17"]
PARITY = ["transformers>=5.23", "torch==2.13.0"]
LINT = ["ruff>=0.17", "mypy>=2.4"]
# Compiles the GPU kernels for an H200 without one (make aot). Pinned: what spills depends on the compiler's version.
AOT = ["jax==0.11.2", "jax-cuda13-plugin[with-cuda]==0.11.2", "jax-cuda13-pjrt==0.11.2", "jax-triton==0.3.1", "triton==3.6.0"]
TEST = ["pytest>=9", "pytest-xdist>=3.8", "hypothesis>=6.170", "beartype>=0.22", *HF, *GGUF, *PLOT, *DATA, *LINT]

VERSION = re.search(r'__version__ = "(.*)"', Path(__file__).with_name("dsa_jax").joinpath("__init__.py").read_text())[1]

setup(
    name="dsa-jax",
    version=VERSION,
    description="DeepSeek Sparse Attention for pretrained transformers, in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["dsa_jax*", "pallas_kernels*", "experiments*", "configs*"]),
    package_data={"pallas_kernels.tuning": ["table.json"], "dsa_jax.benchmarks": ["h200.txtpb"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<1.0",
        "numpy>=2.0",
        "absl-py>=2.3",
        "safetensors>=0.8",
        "jaxtyping>=0.3.11",
        "pyyaml>=6",
        "rich>=14",
    ],
    extras_require={
        "cuda13": ["jax[cuda13]"],
        "aot": AOT,
        "triton": ["jax-triton>=0.3.1"],
        "hf": HF,
        "plot": PLOT,
        "data": DATA,
        "real": [*GGUF, *HF, *PLOT],
        "tensorboard": ["tensorboardX>=2.6.5"],
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "notebooks": ["jupytext>=1.19", "nbclient>=0.10", "ipykernel", *PLOT],
        "parity": PARITY,
        "test": TEST,
        "dev": [*TEST, "tensorboardX>=2.6.5"],
    },
)
