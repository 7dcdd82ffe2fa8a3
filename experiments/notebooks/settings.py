"""Settings of the notebooks from environment variables."""

import os
from pathlib import Path

import experiments

SMALL = os.environ.get("NOTEBOOK_SMALL") == "1"
"""Whether to take a few steps only, for tests: everything runs, nothing is learned."""

RESULTS = Path(os.environ.get("NOTEBOOK_RESULTS") or Path(experiments.__path__[0]) / "results" / "ablations")
"""Directory of the result files of sweeps."""
