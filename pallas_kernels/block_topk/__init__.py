"""Which blocks of keys hold most probability of attention to compressed keys: the selection of native sparse attention."""
