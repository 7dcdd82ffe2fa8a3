"""Imports run one way: experiments -> dsa_jax -> pallas_kernels, and no module reaches itself."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "experiments", "dsa_jax", "pallas_kernels")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


@cache
def imports_of(module):
    """Modules that `module` imports anywhere, in functions too, by full name; a name from a module counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found)


def imports_below(package):
    """(module, imported) for every import of every module of `package`."""
    return [(name, found) for name in MODULES if f"{name}.".startswith(f"{package}.") for found in sorted(imports_of(name))]


def test_no_module_reaches_itself():
    try:
        TopologicalSorter({name: imports_of(name) & MODULES.keys() for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pallas_kernels", ("flax", "dsa_jax", "experiments", "configs")),
        ("dsa_jax", ("experiments", "configs")),
        ("dsa_jax.config", ("jax", "jaxlib", "flax", "pallas_kernels")),
        ("configs", ("experiments",)),
    ],
)
def test_imports_run_one_way(package, forbidden):
    found = imports_below(package)
    assert len(found) > 5
    assert [(name, top) for name, top in found if top.split(".")[0] in forbidden] == []


def test_config_reaches_no_other_part():
    found = [name for _, name in imports_below("dsa_jax.config") if name.startswith("dsa_jax")]
    assert found
    assert [name for name in found if not name.startswith("dsa_jax.config")] == []
