"""Pages are handed out once, come back, and run out with a message."""

import pytest

from dsa_jax.generation import OutOfPagesError, PageAllocator, make_block_table


def test_rows_take_what_they_need_and_give_it_back():
    pool = PageAllocator(5, page_size=4)
    first, second = pool.allocate(9), pool.allocate(4)
    assert first == [0, 1, 2] and second == [3] and pool.n_free == 1
    assert make_block_table([first, second], 4).tolist() == [[0, 1, 2, -1], [3, -1, -1, -1]]
    assert pool.allocate(0) == []
    pool.release(first)
    assert pool.n_free == 4 and not set(pool.allocate(16)) & set(second)


def test_too_few_pages_hand_out_nothing_and_say_so():
    pool = PageAllocator(2, page_size=64)
    with pytest.raises(OutOfPagesError, match="129 tokens need 3 pages of 64; 2 of 2 are free"):
        pool.allocate(129)
    assert pool.n_free == 2


def test_a_page_cannot_come_back_twice():
    pool = PageAllocator(2, page_size=64)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(ValueError, match="page 0 is not owned"):
        pool.release(pages)
    with pytest.raises(ValueError, match="page 7 is not owned"):
        pool.release([7])
