"""Block selection of native sparse attention: the blocks that hold most probability of attention to compressed keys."""
