r"""Runs the notebooks: NAME.py, the source, becomes NAME.ipynb with its outputs.

python -m experiments.notebooks.build            # all
python -m experiments.notebooks.build costs parity
"""

import sys
import time
from pathlib import Path
from typing import Any

from dsa_jax.extras import import_extra
from dsa_jax.run.files import atomic_write_text

FOLDER = Path(__file__).parent
NAMES = ("indexer", "retrofit", "parity", "costs", "ablations")


def build(name: str) -> float:
    """Execute one notebook from its source and write it; the seconds that took.

    Raises:
        MissingExtraError: when the `notebooks` extra is not installed, with the command that installs it.
        nbclient.exceptions.CellExecutionError: when a cell fails; nothing is written.
    """
    jupytext, nbclient = (import_extra(name, extra="notebooks", purpose="a notebook") for name in ("jupytext", "nbclient"))
    started = time.perf_counter()
    notebook: Any = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    # In the kernel the repository is the working directory, so that nothing in the outputs names another.
    resources = {"metadata": {"path": str(FOLDER.parents[1])}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}  # drawn at random otherwise
        if cell["cell_type"] == "code":
            # Figures and prints are what a reader sees; the value of a last expression is an object's address.
            cell["outputs"] = [output for output in cell["outputs"] if output["output_type"] != "execute_result"]
    atomic_write_text(FOLDER / f"{name}.ipynb", jupytext.writes(notebook, fmt="ipynb"))
    return time.perf_counter() - started


def main(names: list[str]) -> int:
    """The command."""
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return 0
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"error: there is no notebook {unknown[0]}; expected one of {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    for name in names or NAMES:
        print(f"{name}: {build(name):.0f} seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
