"""The page allocator: never a page twice, never a page lost, nothing changed on an error."""

import copy
import pickle
import sys
import threading
import time

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
    with pytest.raises(OutOfPagesError, match=r"'b' needs 2 more pages .* 1 of 3 are free"):
        allocator.allocate("b", 17)
    with pytest.raises(OutOfPagesError, match="'a' needs 2 more pages"):
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


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int8, np.int64])
def test_numpy_integers_count_as_what_they_are(kind):
    """Negated or added up in their own types they wrap: 17 tokens took 242 pages."""
    allocator = PageAllocator(kind(100), kind(16))
    allocator.allocate("a", kind(17))
    allocator.allocate("b", kind(0))
    allocator.extend("b", kind(127))
    assert [len(allocator.pages(r)) for r in "ab"] == [2, 8]
    assert allocator.num_free == 90
    tables = allocator.block_tables(["a"], kind(3), fill=kind(99))
    assert (tables.dtype, tables.shape, tables[0, 2]) == (np.int32, (1, 3), 99)
    state = allocator.num_pages, allocator.page_size, *map(allocator.num_tokens, "ab")
    assert state == (100, 16, 17, 127)
    assert {type(value) for value in state} == {int}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: PageAllocator(3.0, 16), TypeError, "num_pages must be an integer, got 3.0"),
        (lambda a: PageAllocator(True, 16), TypeError, "num_pages must be an integer, got True"),
        (lambda a: PageAllocator(2**31, 16), ValueError, "num_pages must be at most 2147483647"),
        (lambda a: PageAllocator(3, "16"), TypeError, "page_size must be an integer, got '16'"),
        (lambda a: a.allocate("b", 1.0), TypeError, "num_tokens must be an integer, got 1.0"),
        (lambda a: a.allocate("b", np.nan), TypeError, "num_tokens must be an integer, got nan"),
        (lambda a: a.allocate("b", None), TypeError, "num_tokens must be an integer, got None"),
        (lambda a: a.extend("a", 30.5), TypeError, "num_tokens must be an integer, got 30.5"),
        (lambda a: a.extend("a", True), TypeError, "num_tokens must be an integer, got True"),
        (lambda a: a.allocate(["b"], 1), TypeError, r"request_id must be hashable, got \['b'\]"),
        (lambda a: a.free({}), TypeError, r"request_id must be hashable, got \{\} of type dict"),
        (lambda a: a.block_tables("a", 2), TypeError, "request_ids must be a sequence .*got 'a'"),
        (lambda a: a.block_tables({"a"}, 2), TypeError, "request_ids must be a sequence .* set"),
        (lambda a: a.block_tables(None, 2), TypeError, "request_ids must be a sequence"),
        (lambda a: a.block_tables(["a"], 2.0), TypeError, "max_pages must be an integer"),
        (lambda a: a.block_tables(["a"], 0), ValueError, "max_pages must be a positive integer"),
        (lambda a: a.block_tables(["a"], 2, fill=2**40), ValueError, "fill must be in -2147483648"),
        (lambda a: a.block_tables(["a"], 2, fill=np.nan), TypeError, "fill must be an integer"),
        (lambda a: a.block_tables(["a"], 2, fill=True), TypeError, "fill must be an integer"),
        (lambda a: a.block_tables(["a"], 2, cache=3), TypeError, "cache must be a PagedKVCache or"),
    ],
)
def test_wrong_types_and_ranges_are_named(call, error, message):
    allocator = PageAllocator(3, page_size=16)
    allocator.allocate("a", 20)
    with pytest.raises(error, match=message):
        call(allocator)
    assert (allocator.num_free, allocator.requests) == (1, ("a",))


def test_a_copy_is_independent():
    allocator = PageAllocator(4, 16)
    allocator.allocate("a", 20)
    for other in (copy.deepcopy(allocator), copy.copy(allocator)):
        other.extend("a", 64)
        other.free("a")
        other.allocate("b", 1)
    other = pickle.loads(pickle.dumps(allocator))
    other.allocate("b", 1)
    assert (other.pages("a"), allocator.requests) == (allocator.pages("a"), ("a",))
    assert allocator.num_free == 2


def test_threads_lose_no_page():
    """Threads that change places often: without a lock some runs end with pages held by nobody."""
    allocator = PageAllocator(64, 1)
    errors = []

    def live(name):
        try:
            for turn in range(60):
                try:
                    allocator.allocate((name, turn), 12)
                    allocator.extend((name, turn), 24)
                    assert (allocator.block_tables([(name, turn)], 24) >= 0).all()
                    allocator.fork((name, turn), (name, turn, "fork"))
                    allocator.commit((name, turn), range(24))
                    allocator.truncate((name, turn, "fork"), 5)
                except OutOfPagesError:
                    pass
                for request in ((name, turn), (name, turn, "fork")):
                    if request in allocator.requests:
                        allocator.free(request)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=live, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert (allocator.num_free, allocator.requests) == (64, ())
    allocator.allocate("all", 64)
    assert sorted(allocator.pages("all")) == list(range(64))


class SlowToHash(str):
    """An id at whose every look-up another thread gets its turn."""

    def __hash__(self):
        time.sleep(1e-3)
        return super().__hash__()


def test_of_threads_that_allocate_one_request_one_does():
    allocator, refused = PageAllocator(64, 1), []

    def allocate():
        try:
            allocator.allocate(SlowToHash("a"), 5)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3, refused
    assert allocator.num_free == 64 - 5
