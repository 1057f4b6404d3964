"""A server in plain Python that drives a PageAllocator at random, and knows what it must answer.

The model has its own list of token ids per request, its own counts, and prefixes as tuples instead
of hashes. `memory` is what the pages of a cache hold. The model copies and writes there as a server
does, so that each request can be read through its pages and compared with its token ids.
"""

import collections
import random

import numpy as np
import pytest

from mla_jax.allocator import OutOfPagesError, PageAllocator

ACTIONS = {
    "allocate": 3,
    "extend": 10,
    "step": 8,
    "fork": 2,
    "truncate": 3,
    "commit": 5,
    "free": 2,
    "lookup": 2,
    "bad_call": 1,
}
MOST_TOKENS = 40


class Server:
    def __init__(self, seed, num_pages, page_size, most_requests):
        self.random = random.Random(seed)
        self.page_size = page_size
        self.most_requests = most_requests
        self.allocator = PageAllocator(num_pages, page_size)
        self.memory = np.full((num_pages, page_size), -1)
        self.tokens = {}  # of each request
        self.written = {}  # how many of them are in `memory`
        self.pages = {}  # of each request, as the allocator answered last
        self.committed = {}  # pages of each request
        self.counts = [0] * num_pages
        self.free_pages = set(range(num_pages))
        self.evictable = []  # the page that is evicted first is the first
        self.prefix_of = {}  # page to the tuple of all token ids up to its end
        self.page_of = {}  # the inverse
        self.fresh = set()  # taken since the last step
        self.copies = {}  # target to source, since the last step
        self.last_request = None
        self.history = collections.deque([[]], maxlen=16)  # token ids that requests had
        self.seen = collections.Counter()

    def run(self, operations):
        actions = self.random.choices(list(ACTIONS), ACTIONS.values(), k=operations)
        for number, action in enumerate(actions):
            getattr(self, action)()
            if number % 100 == 0:
                self.check_all()
        for request in list(self.tokens):
            self.end(request)
        self.check_all()
        assert self.allocator.num_free == len(self.counts)

    def allocate(self):
        if len(self.tokens) == self.most_requests:
            return
        old = self.random.choice(self.history)
        prompt = old[: self.random.randint(0, len(old))]
        prompt = prompt + self.draw(self.random.randint(0, 8))
        hits = self.cached(prompt[:-1]) if self.random.random() < 0.8 else None
        found = [] if hits is None else hits
        count = self.random.choice([0, len(prompt)])
        total = max(count, len(found) * self.page_size)
        needed = -(-total // self.page_size) - len(found)
        room = len(self.free_pages) + sum(page not in found for page in self.evictable)
        new = object()
        call = self.allocator.allocate, new, count, *([] if hits is None else [prompt])
        if needed > room:
            self.refused(OutOfPagesError, *call)
            return
        assert call[0](*call[1:]) == len(found) * self.page_size
        pages = list(self.allocator.pages(new))
        assert pages[: len(found)] == found
        for page in found:
            self.counts[page] += 1
            self.evictable = [other for other in self.evictable if other != page]
        self.take(pages[len(found) :])
        self.tokens[new], self.pages[new] = prompt[:total], pages
        self.committed[new], self.written[new] = len(found), len(found) * self.page_size
        self.seen["hit"] += bool(found)
        self.check(new)

    def extend(self):
        if not (request := self.any_request()):
            return
        tokens, pages = self.tokens[request], self.pages[request]
        new = self.draw(min(self.random.choice([0, 1, 1, 2, 5]), MOST_TOKENS - len(tokens)))
        total = len(tokens) + len(new)
        writes_last = bool(new) and len(tokens) % self.page_size != 0
        copies = writes_last and self.counts[pages[-1]] > 1
        needed = -(-total // self.page_size) - len(pages) + copies
        if needed > len(self.free_pages) + len(self.evictable):
            self.refused(OutOfPagesError, self.allocator.extend, request, total)
            return
        self.allocator.extend(request, total)
        got = list(self.allocator.pages(request))
        if copies:
            self.take(got[len(pages) - 1 : len(pages)])
            old, pages[-1] = pages[-1], got[len(pages) - 1]
            self.fresh.remove(pages[-1])
            self.counts[old] -= 1
            self.seen["copied again"] += old in self.copies
            self.copies[pages[-1]] = self.copies.get(old, old)
            self.seen["copied"] += 1
        elif writes_last:
            self.seen["overwritten"] += pages[-1] in self.prefix_of
            self.forget(pages[-1])
        assert got[: len(pages)] == pages
        self.take(got[len(pages) :])
        self.tokens[request], self.pages[request] = tokens + new, got
        self.check(request)

    def step(self):
        """Copies pages, and writes the tokens that are not in `memory` yet."""
        size = self.random.choice([None, len(self.copies), len(self.copies) + 2])
        sources, targets = self.allocator.take_copies(size)
        if size is not None:
            assert (sources[len(self.copies) :] == -1).all()
            sources, targets = sources[: len(self.copies)], targets[: len(self.copies)]
        assert dict(zip(targets.tolist(), sources.tolist(), strict=True)) == self.copies
        self.copies.clear()
        self.memory[targets] = self.memory[sources]
        self.memory[list(self.fresh)] = -1
        self.fresh.clear()
        for request, tokens in self.tokens.items():
            for at in range(self.written[request], len(tokens)):
                page = self.pages[request][at // self.page_size]
                self.memory[page, at % self.page_size] = tokens[at]
            self.written[request] = len(tokens)
        for request in list(self.tokens)[:2]:
            self.check_content(request)

    def write(self, request):
        """Runs a step if a token of the request is not written yet."""
        if self.written[request] < len(self.tokens[request]):
            self.step()

    def fork(self):
        if not (request := self.any_request()) or len(self.tokens) == self.most_requests:
            return
        self.write(request)
        new = object()
        self.allocator.fork(request, new)
        for name in ("tokens", "written", "pages", "committed"):
            values = getattr(self, name)
            copied = values[request]
            values[new] = list(copied) if isinstance(copied, list) else copied
        for page in self.pages[new]:
            self.counts[page] += 1
        self.check(new)

    def truncate(self):
        if not (request := self.any_request()):
            return
        tokens, pages = self.tokens[request], self.pages[request]
        total = max(0, len(tokens) - self.random.choice([0, 1, 2, 2, 5, 40]))
        self.allocator.truncate(request, total)
        keep = -(-total // self.page_size)
        self.drop(pages[keep:])
        self.tokens[request], self.pages[request] = tokens[:total], pages[:keep]
        self.written[request] = min(total, self.written[request])
        self.committed[request] = min(self.committed[request], total // self.page_size)
        self.check(request)

    def commit(self):
        if not (request := self.any_request()):
            return
        self.write(request)
        tokens = self.tokens[request]
        tokens = tokens[: len(tokens) - self.random.choice([0, 0, 3])]
        given = np.array(tokens, np.int32) if self.random.random() < 0.3 else tokens
        self.allocator.commit(request, given)
        full = len(tokens) // self.page_size
        for index in range(self.committed[request], full):
            prefix, page = tuple(tokens[: (index + 1) * self.page_size]), self.pages[request][index]
            if prefix not in self.page_of:
                self.page_of[prefix], self.prefix_of[page] = page, prefix
        self.committed[request] = max(full, self.committed[request])
        assert self.allocator.cached_pages == set(self.prefix_of)

    def free(self):
        if request := self.any_request():
            self.end(request)

    def end(self, request):
        self.history.append(self.tokens[request])
        self.allocator.free(request)
        self.drop(self.pages[request])
        for values in (self.tokens, self.written, self.pages, self.committed):
            del values[request]

    def lookup(self):
        old = self.random.choice(self.history)
        tokens = old[: self.random.randint(0, len(old))]
        pages = self.cached(tokens)
        found = self.allocator.lookup(np.array(tokens, int) if len(tokens) % 2 else tokens)
        assert found == (len(pages) * self.page_size, tuple(pages))
        self.seen["found"] += bool(pages)
        for index, page in enumerate(pages):
            at = index * self.page_size
            assert list(self.memory[page]) == tokens[at : at + self.page_size]

    def bad_call(self):
        if not (request := self.any_request()):
            return
        total = len(self.tokens[request])
        calls = [
            (KeyError, "free", object()),
            (KeyError, "fork", object(), object()),
            (ValueError, "fork", request, request),
            (ValueError, "truncate", request, total + 1),
            (ValueError, "extend", request, total - 1),
            (ValueError, "commit", request, [1] * (total + 1)),
            (ValueError, "allocate", object(), 0, [-1] * (self.page_size + 1)),
        ]
        index = self.committed[request]
        is_full = total >= (index + 1) * self.page_size
        if is_full and self.pages[request][index] in self.prefix_of:
            # Another request committed this page, with other tokens.
            calls = [(ValueError, "commit", request, [9] * total)]
            self.seen["other tokens"] += 1
        error, name, *arguments = self.random.choice(calls)
        self.refused(error, getattr(self.allocator, name), *arguments)

    def draw(self, count):
        return [self.random.randint(0, 1) for _ in range(count)]

    def any_request(self):
        """A request, half of the time the one of the last call."""
        if self.tokens and (self.last_request not in self.tokens or self.random.random() < 0.5):
            self.last_request = self.random.choice(list(self.tokens))
        return self.last_request if self.tokens else None

    def cached(self, tokens):
        """The cached pages of the longest prefix."""
        pages = []
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            if (page := self.page_of.get(tuple(tokens[:end]))) is None:
                break
            pages.append(page)
        return pages

    def take(self, pages):
        """The allocator took these pages: free ones, or if there are none, the first to evict."""
        for page in pages:
            if self.free_pages:
                assert page in self.free_pages
                self.free_pages.remove(page)
            else:
                assert page == self.evictable.pop(0)
                self.forget(page)
                self.seen["evicted"] += 1
            assert self.counts[page] == 0
            self.counts[page] = 1
            self.fresh.add(page)

    def drop(self, pages):
        for page in reversed(pages):
            self.counts[page] -= 1
            if self.counts[page] == 0 and page in self.prefix_of:
                self.evictable.append(page)
            elif self.counts[page] == 0:
                self.free_pages.add(page)
                self.copies.pop(page, None)

    def forget(self, page):
        if page in self.prefix_of:
            del self.page_of[self.prefix_of.pop(page)]

    def refused(self, error, function, *arguments):
        """The call raises and changes nothing."""
        before = self.state()
        with pytest.raises(error):
            function(*arguments)
        assert self.state() == before
        self.seen[error.__name__] += 1

    def state(self):
        a = self.allocator
        requests = {r: (a.num_tokens(r), a.pages(r)) for r in a.requests}
        return requests, a.ref_counts.tolist(), a.cached_pages, a.num_free

    def check(self, request):
        allocator, pages = self.allocator, self.pages[request]
        assert allocator.num_tokens(request) == len(self.tokens[request])
        assert allocator.pages(request) == tuple(pages)
        assert len(pages) == -(-len(self.tokens[request]) // self.page_size)
        assert allocator.num_free == len(self.free_pages) + len(self.evictable)

    def check_content(self, request):
        pages, count = self.pages[request], self.written[request]
        assert self.memory[pages].ravel()[:count].tolist() == self.tokens[request][:count]

    def check_all(self):
        requests, counts, cached, _ = self.state()
        tokens = {r: (len(self.tokens[r]), tuple(self.pages[r])) for r in self.tokens}
        assert (requests, counts) == (tokens, self.counts)
        assert cached == set(self.prefix_of)
        held = collections.Counter(page for pages in self.pages.values() for page in pages)
        assert [held[page] for page in range(len(counts))] == counts
        self.step()
        for request in self.tokens:
            self.check_content(request)
        for page, prefix in self.prefix_of.items():
            assert tuple(self.memory[page].tolist()) == prefix[-self.page_size :]
