"""Page allocation of a paged KV cache, on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than a row asks for."""


class PageAllocator:
    """Allocates the pages of a pool, the lowest free ones first."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        """A pool of `n_pages` free pages of `page_size` tokens."""
        if n_pages < 0 or page_size < 1:
            raise ValueError(f"n_pages is {n_pages} and page_size {page_size}; expected at least 0 and 1.")
        self.n_pages = n_pages
        self.page_size = page_size
        self._free = list(range(n_pages - 1, -1, -1))

    @property
    def n_free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def pages_for(self, n_tokens: int) -> int:
        """Number of pages for `n_tokens`."""
        return -(-n_tokens // self.page_size)

    def allocate(self, n_tokens: int) -> list[int]:
        """Allocate pages for `n_tokens` tokens.

        Raises:
            OutOfPagesError: where fewer are free; none is allocated then.
        """
        wanted = self.pages_for(n_tokens)
        if wanted > len(self._free):
            raise OutOfPagesError(
                f"{n_tokens} tokens need {wanted} pages of {self.page_size}; {len(self._free)} of {self.n_pages} are free. "
                "Release the pages of finished rows, or make the cache with more pages."
            )
        return [self._free.pop() for _ in range(wanted)]

    def release(self, pages: Sequence[int]) -> None:
        """Free pages.

        Raises:
            ValueError: for a page that is free already or not of this pool.
        """
        for page in pages:
            if not 0 <= page < self.n_pages or page in self._free:
                raise ValueError(f"page {page} is not owned by anybody; expected a page that allocate handed out.")
            self._free.append(page)


def make_block_table(pages: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B {width}"]:
    """Block table of `Transformer.init_cache` from the pages of each row: int32, -1 after the last."""
    table = np.full((len(pages), width), -1, np.int32)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = owned
    return table
