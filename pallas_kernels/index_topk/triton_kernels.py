"""Triton kernel that selects the largest entries of long rows by radix; imported only where Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def _ordered(values):
    """Unsigned integers in the order of the floats."""
    bits = values.to(tl.uint32, bitcast=True)
    return bits ^ tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000)


@triton.jit
def radix_select(ranked, positions, WIDTH: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """Positions of the TOPK largest entries above -inf of each row, ascending, WIDTH where there are fewer.

    One program per row. Four passes count the next eight bits of the keys that agree with the threshold's bits so far; a fifth
    writes the positions, in order, by prefix sums. Equal entries go to the lower position. No NaN, no -0.0.
    """
    row = tl.program_id(0).to(tl.int64)
    ranked += row * WIDTH
    positions += row * TOPK
    bins = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)
    missing = tl.full([], TOPK, tl.int32)
    for level in tl.static_range(4):
        shift = 24 - 8 * level
        counts = tl.zeros([256], tl.int32)
        for first in range(0, WIDTH, BLOCK):
            position = first + tl.arange(0, BLOCK)
            agrees = position < WIDTH
            key = _ordered(tl.load(ranked + position, mask=agrees, other=0.0))
            if level > 0:
                agrees = agrees & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=agrees)
        larger = tl.sum(counts) - tl.cumsum(counts)
        is_digit = (larger < missing) & (larger + counts >= missing)
        digit = tl.sum(tl.where(is_digit, bins, 0))
        missing -= tl.sum(tl.where(is_digit, larger, 0))
        prefix = (prefix << 8) | digit.to(tl.uint32)
    # Only invisible entries, which nobody takes, are equal to a threshold of -inf.
    missing = tl.where(prefix == 0x007FFFFF, 0, missing)
    n_taken = tl.full([], 0, tl.int32)
    n_equal = tl.full([], 0, tl.int32)
    for first in range(0, WIDTH, BLOCK):
        position = first + tl.arange(0, BLOCK)
        exists = position < WIDTH
        key = _ordered(tl.load(ranked + position, mask=exists, other=0.0))
        equal = (exists & (key == prefix)).to(tl.int32)
        before = n_equal + tl.cumsum(equal) - equal
        take = ((exists & (key > prefix)) | ((equal == 1) & (before < missing))).to(tl.int32)
        place = n_taken + tl.cumsum(take) - take
        tl.store(positions + place, position, mask=take == 1)
        n_equal += tl.sum(equal)
        n_taken += tl.sum(take)
    for first in range(0, TOPK, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        tl.store(positions + slot, tl.full([BLOCK], WIDTH, tl.int32), mask=(slot >= n_taken) & (slot < TOPK))
