"""Pages that requests share: fork, truncate, cached prefixes, eviction, copies before a write."""

import copy
import time

import numpy as np
import pytest
from allocator_model import Server

from mla_jax.allocator import OutOfPagesError, PageAllocator


# Together 100,000 operations.
@pytest.mark.parametrize(
    ("seed", "num_pages", "page_size", "most_requests"),
    [(1, 12, 4, 6), (2, 16, 1, 5), (3, 40, 3, 8)],
)
def test_answers_as_the_model_does(seed, num_pages, page_size, most_requests):
    server = Server(seed, num_pages, page_size, most_requests)
    server.run(25_000)
    for event in ("hit", "found", "evicted", "other tokens", "KeyError", "OutOfPagesError"):
        assert server.seen[event] > 5, event
    if page_size > 1:
        assert min(server.seen["copied"], server.seen["overwritten"]) > 50


def pairs(allocator):
    sources, targets = allocator.take_copies()
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


def test_the_first_to_write_gets_a_copy():
    allocator = PageAllocator(8, 4)
    allocator.allocate("a", 6)
    allocator.fork("a", "b")
    first, last = allocator.pages("a")
    assert (allocator.pages("b"), allocator.num_free) == ((first, last), 6)
    allocator.extend("b", 6)  # writes nothing
    assert pairs(allocator) == []
    allocator.extend("b", 7)
    new = allocator.pages("b")[1]
    assert (allocator.pages("b")[0], pairs(allocator)) == (first, [(last, new)])
    allocator.extend("a", 9)  # the last page is its own now
    assert (allocator.pages("a")[:2], pairs(allocator)) == ((first, last), [])
    allocator.free("a")
    assert allocator.ref_counts[[first, last, new]].tolist() == [1, 0, 1]


def test_a_copy_of_a_page_that_is_not_copied_yet_has_the_first_source():
    allocator = PageAllocator(8, 4)
    allocator.allocate("a", 2)
    allocator.fork("a", "b")
    allocator.extend("b", 3)
    allocator.truncate("b", 2)
    allocator.fork("b", "c")
    allocator.extend("c", 4)
    (a,), (b,), (c,) = map(allocator.pages, "abc")
    assert pairs(allocator) == [(a, b), (a, c)]


def test_no_copy_to_a_page_that_is_free_again():
    allocator = PageAllocator(8, 4)
    allocator.allocate("a", 2)
    allocator.fork("a", "b")
    allocator.extend("b", 3)
    allocator.free("b")
    assert pairs(allocator) == []


def test_cached_pages_are_evicted_oldest_first_and_last_pages_first():
    allocator = PageAllocator(4, 2)
    for name, tokens in (("a", [1, 2, 3, 4]), ("b", [5, 6, 7, 8])):
        allocator.allocate(name, 4)
        allocator.commit(name, tokens)
    a, b = allocator.pages("a"), allocator.pages("b")
    allocator.free("a")
    allocator.free("b")
    assert allocator.num_free == len(allocator.cached_pages) == 4
    assert allocator.lookup([1, 2, 3, 4, 9]) == (4, a)
    # The last token is computed, so its page is not shared. The hit makes page a[0] the newest.
    assert allocator.allocate("c", 0, tokens=[1, 2, 3, 4]) == 2
    allocator.free("c")
    for evicted, found in ((a[1], 2), (b[1], 2), (b[0], 2), (a[0], 0)):
        allocator.allocate(evicted, 2)
        assert allocator.pages(evicted) == (evicted,)
        assert allocator.lookup([1, 2, 3, 4]).num_tokens == found


def test_a_page_is_not_cached_after_it_is_overwritten():
    allocator = PageAllocator(4, 2)
    allocator.allocate("a", 4)
    allocator.commit("a", [1, 2, 3, 4])
    allocator.truncate("a", 3)
    assert allocator.lookup([1, 2, 3, 4]).num_tokens == 4
    allocator.extend("a", 4)
    assert allocator.lookup([1, 2, 3, 4]).num_tokens == 2
    allocator.commit("a", [1, 2, 3, 5])
    assert allocator.lookup([1, 2, 3, 5]).num_tokens == 4


def test_hits_that_no_request_has_are_not_counted_as_room():
    allocator = PageAllocator(3, 2)
    allocator.allocate("a", 4)
    allocator.commit("a", [1, 2, 3, 4])
    allocator.free("a")
    with pytest.raises(OutOfPagesError, match="'b' needs 2 more pages of 2 tokens, 1 of 3 are"):
        allocator.allocate("b", 8, tokens=[1, 2, 3, 4, 5])
    assert (allocator.requests, allocator.num_free) == ((), 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: a.fork("x", "b"), KeyError, "request 'x' is not live"),
        (lambda a: a.fork("a", "a"), ValueError, "new_request_id must be a new one, got 'a'"),
        (lambda a: a.fork("a", []), TypeError, r"request_id must be hashable, got \[\]"),
        (lambda a: a.truncate("x", 0), KeyError, "request 'x' is not live"),
        (lambda a: a.truncate("a", 6), ValueError, "num_tokens must be at most the 5 .* got 6"),
        (lambda a: a.truncate("a", -1), ValueError, "num_tokens must be at least 0, got -1"),
        (lambda a: a.truncate("a", 1.0), TypeError, "num_tokens must be an integer, got 1.0"),
        (lambda a: a.commit("x", []), KeyError, "request 'x' is not live"),
        (lambda a: a.commit("a", range(6)), ValueError, "tokens must be at most the 5 .* got 6"),
        (lambda a: a.commit("a", [0.5] * 5), TypeError, "tokens must be integers, got .* float64"),
        (lambda a: a.commit("a", [True] * 5), TypeError, "tokens must be integers, got .* bool"),
        (
            lambda a: a.commit("a", [[1]] * 5),
            TypeError,
            r"tokens must be integers, got .* \[5, 1\]",
        ),
        (lambda a: a.commit("a", [-1] * 5), ValueError, "tokens must be ids of at least 0, got -1"),
        (lambda a: a.commit("z", [1, 2, 3, 4, 1.5]), TypeError, "tokens must be .* of float64"),
        (lambda a: a.commit("z", [1] * 4 + [None]), TypeError, "tokens must be .* of object"),
        (lambda a: a.commit("z", [1, [2, 3]]), TypeError, "tokens must be integers, got .* object"),
        (lambda a: a.lookup([1.5]), TypeError, r"tokens must be .* array \[1\] of float64"),
        (lambda a: a.lookup([None]), TypeError, r"tokens must be .* array \[1\] of object"),
        (lambda a: a.allocate("b", 1, tokens=[1.5]), TypeError, "tokens must be .* of float64"),
        (lambda a: a.allocate("b", 1, tokens=[None]), TypeError, "tokens must be .* of object"),
        (lambda a: a.lookup([-1]), ValueError, "tokens must be ids of at least 0, got -1"),
        (lambda a: a.commit("a", 5), TypeError, "tokens must be a sequence of token ids .* got 5"),
        (lambda a: a.lookup("abcd"), TypeError, "tokens must be a sequence .* got 'abcd'"),
        (lambda a: a.lookup({1, 2}), TypeError, "tokens must be a sequence .* of type set"),
        (lambda a: a.lookup(np.zeros((4, 4), int)), TypeError, "tokens must be a sequence"),
        (lambda a: a.allocate("b", 0, [2**70] * 9), TypeError, "tokens must be integers"),
        (lambda a: a.allocate("b", 40, [1, 2]), OutOfPagesError, "'b' needs 10 more pages"),
        (lambda a: a.take_copies(0), ValueError, "size must be at least 1, .* got 0"),
        (lambda a: a.take_copies(-1), ValueError, "size must be at least 0, got -1"),
        (lambda a: a.take_copies(2.0), TypeError, "size must be an integer, got 2.0"),
    ],
)
def test_errors_are_clear_and_change_nothing(call, error, message):
    allocator = PageAllocator(6, 4)
    allocator.allocate("a", 5)
    allocator.fork("a", "z")
    allocator.extend("z", 6)  # a copy
    allocator.commit("z", [1, 2, 3, 4])

    def state():
        names = "requests", "num_free", "cached_pages"
        values = [allocator.pages(r) for r in allocator.requests]
        return values, [getattr(allocator, name) for name in names], allocator.ref_counts.tolist()

    before = state()
    with pytest.raises(error, match=message):
        call(allocator)
    assert state() == before
    assert len(pairs(allocator)) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_nothing(copied):
    allocator = PageAllocator(6, 2)
    allocator.allocate("a", 3)
    allocator.fork("a", "b")
    other = copied(allocator)
    other.extend("b", 4)
    other.commit("a", [1, 2])
    other.truncate("a", 0)
    assert (allocator.num_tokens("b"), allocator.cached_pages) == (3, frozenset())
    assert allocator.ref_counts.tolist() == [2, 2, 0, 0, 0, 0]
    assert pairs(allocator) == []
    assert len(pairs(other)) == 1


def test_time_per_page_does_not_grow():
    """With 16 times as many pages a call takes as long: eviction, hits and commits included."""

    def seconds(num_pages):
        allocator = PageAllocator(num_pages, 1)
        allocator.allocate("all", num_pages)
        allocator.commit("all", np.arange(num_pages))
        allocator.free("all")
        best = float("inf")
        for turn in range(5):
            start = time.process_time()
            for number in range(100):
                allocator.allocate("a", 8, tokens=[turn, number])
                allocator.fork("a", "b")
                allocator.extend("b", 9)
                allocator.free("a")
                allocator.truncate("b", 4)
                allocator.commit("b", [turn, number, 3, 4])
                allocator.free("b")
            best = min(best, time.process_time() - start)
        return best

    assert seconds(64_000) < 4 * seconds(4_000)
