"""The page allocator: never a page twice, never a page lost, nothing changed on an error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.cache import PagedKVCache


def test_allocates_extends_and_frees():
    allocator = PageAllocator(8, page_size=16)
    allocator.allocate("a", 17)
    allocator.allocate("b", 0)
    assert len(allocator.pages("a")) == 2
    assert allocator.pages("b") == ()
    first = allocator.pages("a")
    allocator.extend("a", 32)  # fits in the pages it has
    assert allocator.pages("a") == first
    allocator.extend("a", 33)
    assert allocator.pages("a")[:2] == first
    assert allocator.num_tokens("a") == 33
    assert allocator.num_free == 5
    assert allocator.requests == ("a", "b")
    allocator.free("a")
    assert allocator.num_free == 8
    assert allocator.requests == ("b",)


def test_block_tables_are_filled_up():
    allocator = PageAllocator(4, page_size=1)
    allocator.allocate(0, 2)
    allocator.allocate(1, 1)
    tables = allocator.block_tables([1, 0], 3, fill=-7)
    assert tables.dtype == np.int32
    assert tables.tolist() == [[*allocator.pages(1), -7, -7], [*allocator.pages(0), -7]]


def test_out_of_pages_changes_nothing():
    allocator = PageAllocator(3, page_size=16)
    allocator.allocate("a", 20)
    pages = allocator.pages("a")
    with pytest.raises(OutOfPagesError, match=r"'b' wants 2 more pages .* 1 of 3 are free"):
        allocator.allocate("b", 17)
    with pytest.raises(OutOfPagesError, match="'a' wants 2 more pages"):
        allocator.extend("a", 50)
    assert allocator.requests == ("a",)
    assert (allocator.pages("a"), allocator.num_tokens("a")) == (pages, 20)
    assert allocator.num_free == 1


def test_bad_input_names_the_argument():
    allocator = PageAllocator(3, page_size=16)
    allocator.allocate("a", 20)
    with pytest.raises(ValueError, match="num_pages must be a positive integer, got 0"):
        PageAllocator(0, page_size=16)
    with pytest.raises(ValueError, match="page_size must be a positive integer"):
        PageAllocator(1, page_size=-1)
    with pytest.raises(ValueError, match="request_id must be a new one, got 'a'"):
        allocator.allocate("a", 1)
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        allocator.allocate("b", -1)
    with pytest.raises(ValueError, match="num_tokens must be at least the 20"):
        allocator.extend("a", 19)
    with pytest.raises(ValueError, match="max_pages must be at least the 2"):
        allocator.block_tables(["a"], 1)
    with pytest.raises(ValueError, match="page_size must be that of the cache = 64, got 16"):
        allocator.block_tables(["a"], 2, cache=PagedKVCache.create(3, page_size=64))
    with pytest.raises(ValueError, match="num_pages must be at most the cache's 2, got 3"):
        allocator.block_tables(["a"], 2, cache=PagedKVCache.create(2, page_size=16))
    assert allocator.block_tables(["a"], 2, cache=PagedKVCache.create(3, page_size=16)).any()
    for call in (allocator.free, allocator.pages, allocator.num_tokens):
        with pytest.raises(KeyError, match="'b' is not live"):
            call("b")
    assert allocator.requests == ("a",)


@given(
    st.integers(1, 12),
    st.sampled_from([1, 16, 64]),
    st.lists(
        st.tuples(
            st.sampled_from(["allocate", "extend", "free"]), st.integers(0, 3), st.integers(0, 99)
        )
    ),
)
def test_any_life_keeps_every_page_once(num_pages, page_size, steps):
    allocator = PageAllocator(num_pages, page_size)
    tokens = {}
    for action, request, count in steps:
        before = {r: allocator.pages(r) for r in allocator.requests}
        try:
            if action == "free":
                allocator.free(request)
                del tokens[request]
            else:
                getattr(allocator, action)(request, count)
                tokens[request] = count
        except (OutOfPagesError, KeyError, ValueError):
            assert {r: allocator.pages(r) for r in allocator.requests} == before
        held = [page for r in allocator.requests for page in allocator.pages(r)]
        assert set(allocator.requests) == set(tokens)
        assert len(set(held)) == len(held) == num_pages - allocator.num_free
        for r, n in tokens.items():
            assert len(allocator.pages(r)) == -(-n // page_size)
    for r in allocator.requests:
        allocator.free(r)
    allocator.allocate("all", num_pages * page_size)
    assert sorted(allocator.pages("all")) == list(range(num_pages))
