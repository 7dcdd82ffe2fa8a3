"""Every GPU kernel lowered for an H200 at the shapes it is meant for; interpreting a kernel does not check any of that."""

import math
import re

import jax
import pytest
from lowering import lower_for_h200

from dsa_jax.benchmarks.kernel_cases import cases

CASES = {f"{case.name}: {case.shape}: {case.kernels[0]}": case for case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_h200(name):
    case = CASES[name]
    text = lower_for_h200(case.function, case.arrays)
    if any("scores" in kernel and "head_sums" in kernel for kernel in case.kernels):
        assert "max.NaN.f32" in text  # Triton's own maximum would hide that a key is NaN
    for kernel in case.kernels:
        # Mosaic GPU puts its kernels, names and all, into a string of bytes.
        assert f'"{kernel}"' in text or f"\\00{kernel}\\00" in text
    given = max(x.size for x in jax.tree.leaves(case.arrays))
    largest = max(math.prod(map(int, x.split("x")[:-1])) for x in re.findall(r"tensor<((?:\d+x)+)[a-z]", text))
    assert largest <= max(given, case.most_elements)
