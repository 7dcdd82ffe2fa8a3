"""Training checkpoints, complete or ignored: asynchronous Orbax saves, each sealed by a manifest of its files.

Layout: `<directory>/<step>/` as Orbax writes it (items `state` and `meta`) plus `manifest.json`, written last, before the move
that makes the step visible. A step without a manifest, or whose files differ from it in size or CRC-32, does not count.
Orbax's AsyncCheckpointer is used rather than its CheckpointManager: the manager counts every directory with a bare number as a
step and takes a broken one for the newest, while listing, validity and pruning are decided here.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsa_jax.config import STAGES, Config
from dsa_jax.params import nested_parameters
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.manifest import (
    LeafSpec,
    StageCheckpointError,
    damage,
    first_line,
    has_manifest,
    read_leaves,
    write_manifest,
)
from dsa_jax.run.processes import is_main, on_main

_LOG = logging.getLogger(__name__)
_PRUNED = ".pruned"  # ends the name of a directory that is being removed
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a directory that Orbax has not finished


class Restored(NamedTuple):
    """A checkpoint in memory."""

    step: int
    tree: Any
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one stage, newest `keep` valid ones kept.

    A tree is any pytree of JAX arrays, numpy arrays and Python numbers; its leaves are stored under their key path
    (`params/layers/attention/indexer/wq_b/kernel`), so a NamedTuple and a dict with the same names are the same checkpoint.
    `save` returns once the arrays are copied; they are written in the background until `wait`, `close` or the next `save`,
    where an error is raised. Several processes write one checkpoint together, each its own part of every array, and must
    call the same methods in the same order; the first one judges, seals and removes.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1.")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._pending: tuple[int, dict[str, LeafSpec]] | None = None
        self._verified: set[int] = set()
        _silence_orbax()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
        """Start writing `tree` and the JSON object `meta` as `step`; a valid checkpoint of that step is left as it is.

        Raises:
            StageCheckpointError: when this save, or the one before it, cannot be written. Earlier checkpoints are intact.
            ValueError: for a tree without arrays or with a leaf that is no array.
        """
        self.wait()
        if on_main(lambda: step in self._verified or damage(self._path(step)) is None):
            return
        leaves = {path: _storable(path, leaf) for path, leaf in _named_leaves(tree).items()}
        if not leaves:
            raise ValueError("the tree to save has no arrays.")
        target = self._path(step)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if is_main():
                _set_aside(target)
            self._pending = (step, {path: _spec(leaf) for path, leaf in leaves.items()})
            self._checkpointer.save(
                target,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(nested_parameters(leaves)), meta=ocp.args.JsonSave(dict(meta))
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Return once every save so far is on disk and sealed.

        Raises:
            StageCheckpointError: when the background save failed; what it had written is removed.
        """
        if self._pending is None:
            return
        step, _ = self._pending
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = None
        self._verified.add(step)
        if is_main():
            self._prune()

    def close(self) -> None:
        """Wait, then release the background threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Steps that have a directory here, ascending, whether valid or not."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in self.directory.iterdir()
            if entry.name.isdecimal() and entry.is_dir() and not entry.is_symlink()
        )

    def latest_valid(self) -> int | None:
        """The newest step whose files all match its manifest; a warning names every newer directory that is ignored."""
        self.wait()
        return on_main(self._find_valid)

    def describe(self, step: int) -> dict[str, LeafSpec]:
        """Shape and dtype of every leaf of a checkpoint, by path.

        Raises:
            StageCheckpointError: when `step` is missing or was never completed.
        """
        return read_leaves(self._path(step))

    def restore(self, step: int, abstract_tree: Any, *, subset: bool = False) -> Restored:
        """Read a checkpoint into the structure of `abstract_tree`.

        Leaves are `jax.ShapeDtypeStruct` or JAX arrays (give a JAX array with that sharding, default: the first device), numpy
        arrays (give numpy arrays) or Python numbers (give Python numbers). Nothing is cast. With `subset` the checkpoint may
        hold more leaves than asked for.

        Raises:
            StageCheckpointError: for a missing or unreadable checkpoint; for leaves that are missing, extra, or of another
                shape or dtype, naming the path and both.
        """
        self.wait()
        leaves = _named_leaves(abstract_tree)
        self._require_match(step, leaves, subset)
        target = self._path(step)
        if problem := on_main(lambda: None if step in self._verified else damage(target)):
            raise StageCheckpointError(f"checkpoint {target} is damaged: {problem}.")
        self._verified.add(step)
        targets = nested_parameters({path: _restore_target(leaf) for path, leaf in leaves.items()})
        arguments = ocp.args.PyTreeRestore(
            item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets), partial_restore=subset
        )
        try:
            stored = self._checkpointer.restore(target, args=ocp.args.Composite(state=arguments, meta=ocp.args.JsonRestore()))
        except Exception as error:
            raise StageCheckpointError(f"checkpoint {target} cannot be read: {first_line(error)}") from error
        found = _named_leaves(stored.state)
        restored = [_like(leaf, found[path]) for path, leaf in leaves.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(abstract_tree), restored), stored.meta)

    def _find_valid(self) -> int | None:
        for unfinished in self._unfinished():
            _LOG.warning("ignoring the half-written checkpoint %s", unfinished)
        for step in reversed(self.steps()):
            problem = damage(self._path(step))
            if problem is None:
                self._verified.add(step)
                return step
            _LOG.warning("ignoring checkpoint %s: %s", self._path(step), problem)
        return None

    def _seal(self) -> None:
        """Runs in Orbax's background thread when all files are written, just before its rename makes the step visible."""
        if self._pending is None or not is_main():
            return
        step, leaves = self._pending
        (unfinished,) = self.directory.glob(f"{step}{_UNFINISHED}*")
        write_manifest(unfinished, step, leaves)

    def _prune(self) -> None:
        """Remove all but the newest valid checkpoints, and what killed processes left of others."""
        for leftover in (*self._unfinished(), *self.directory.glob(f"*{_PRUNED}")):
            shutil.rmtree(leftover, ignore_errors=True)
        intact = 0
        for step in reversed([step for step in self.steps() if has_manifest(self._path(step))]):
            if intact == self._keep:
                # Renamed first: killed on the way, half of it is no step.
                pruned = self._path(step).with_name(f"{step}{_PRUNED}")
                self._path(step).rename(pruned)
                shutil.rmtree(pruned, ignore_errors=True)
                self._verified.discard(step)
            elif step in self._verified or damage(self._path(step)) is None:
                self._verified.add(step)
                intact += 1

    def _failed(self, step: int, error: Exception) -> StageCheckpointError:
        self._pending = None
        for leftover in self._unfinished() if is_main() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        return StageCheckpointError(
            f"checkpoint {self._path(step)} cannot be written: {first_line(error)} Earlier checkpoints are intact. Check free "
            "space and permissions, then run the same command again."
        )

    def _unfinished(self) -> list[Path]:
        return sorted(self.directory.glob(f"*{_UNFINISHED}*")) if self.directory.is_dir() else []

    def _require_match(self, step: int, leaves: Mapping[str, Any], subset: bool) -> None:
        stored = self.describe(step)
        problems = [f"{path} is missing in the checkpoint" for path in sorted(leaves.keys() - stored.keys())]
        if not subset:
            problems += [f"{path} is in the checkpoint but not expected" for path in sorted(stored.keys() - leaves.keys())]
        for path in sorted(leaves.keys() & stored.keys()):
            wanted = _spec(_storable(path, leaves[path]))
            if wanted != stored[path]:
                problems.append(f"{path} is {stored[path]} in the checkpoint; expected {wanted}")
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise StageCheckpointError(
                f"checkpoint {self._path(step)} does not fit: {'; '.join(problems[:8])}{more}. Use the config the "
                "checkpoint was made with (config.json of its run)."
            )


def newest_checkpoint(run: RunDirectory, stages: Sequence[str]) -> tuple[str, int] | None:
    """The last of `stages` that has a valid checkpoint, and that checkpoint's step; a warning names ignored ones."""
    for name in reversed(stages):
        folder = run.checkpoint_dir(name)
        if on_main(folder.is_dir):
            with CheckpointStore(folder, keep=1) as store:
                step = store.latest_valid()
            if step is not None:
                return name, step
    return None


def latest_position(run: RunDirectory, config: Config) -> tuple[str, int] | None:
    """The furthest stage of the recipe with a valid checkpoint, and that checkpoint's step."""
    return newest_checkpoint(run, [name for name in STAGES if getattr(config.train, name).n_steps])


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in pytree order."""
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        path = "/".join(parts) or "value"
        if path in named or any(not part for part in parts):
            raise ValueError(f"two leaves of the tree share the path {path!r}, or a name in it is empty.")
        named[path] = leaf
    return named


def _storable(path: str, leaf: Any) -> Any:
    if isinstance(leaf, bool | int | float | np.generic):
        return np.asarray(leaf)
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise ValueError(f"leaf {path} is a {type(leaf).__name__}; expected an array or a number.")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"leaf {path} is a typed PRNG key; store jax.random.key_data(key) instead.")
    return leaf


def _spec(leaf: Any) -> LeafSpec:
    return LeafSpec(tuple(leaf.shape), leaf.dtype.name)


def _restore_target(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array):
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.asarray(leaf)


def _like(leaf: Any, value: Any) -> Any:
    return value.item() if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic) else value


def _set_aside(target: Path) -> None:
    """Move a broken checkpoint of the same step out of the way; one such copy is kept."""
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        return
    aside = target.with_name(f"{target.name}.broken")
    if aside.is_symlink():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)
    _LOG.warning("moved the broken checkpoint %s to %s", target, aside)


class _NotFromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname and "exception was never retrieved" not in record.getMessage()


def _silence_orbax() -> None:
    """Drop what Orbax says beside the error that it raises: records of every save, and an error once per thread or array.

    After the first array that cannot be written it closes the event loop that the writes of the others report to: asyncio and
    Python would print a traceback for each.
    """
    for logger in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        if not any(isinstance(existing, _NotFromOrbax) for existing in logger.filters):
            logger.addFilter(_NotFromOrbax())
    if not isinstance(sys.unraisablehook, _ExceptClosedLoops):
        sys.unraisablehook = _ExceptClosedLoops(sys.unraisablehook)


class _ExceptClosedLoops:
    """A `sys.unraisablehook` that leaves to `former` all but reports to a closed event loop."""

    def __init__(self, former: Callable[[Any], object]) -> None:
        self._former = former

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._former(unraisable)
