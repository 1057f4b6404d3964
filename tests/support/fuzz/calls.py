"""One call of a case: lengths, block tables and what stands where, drawn with numpy."""

import dataclasses
from collections import Counter

import numpy as np

from .cases import BLOCK, Case

# What a token of the cache holds.
UNUSED, USED, HIDDEN_NAN, MINUS_INF = range(4)
BLOCKS = (BLOCK, BLOCK, 2 * BLOCK, 4 * BLOCK)  # keys that implementations take at a time
DEVIATIONS = (0.1, 1.0, 1.0, 3.0, 3.0, 10.0, 100.0, 1e3, 1e4)  # of the scores


@dataclasses.dataclass
class Call:
    """The arguments that differ between calls of one case.

    `stored` [num_pages, page_size] says what each token of the cache holds: UNUSED ones hold NaN,
    and in int8 pages any number. `valid` [B]: the requests that the op must compute; the others'
    rows must be NaN.
    """

    seq_lens: np.ndarray
    query_lens: np.ndarray  # [B], S where the case does not give them
    block_tables: np.ndarray
    stored: np.ndarray
    valid: np.ndarray
    nan_query: np.ndarray  # [B, S, H] bool: rows of q that hold NaN
    deviation: float  # of the scores
    key_size: float  # standard deviation of the cache's values
    seed: int  # of the random values
    features: Counter[str]


def draw_call(rng: np.random.Generator, case: Case, odd: float = 0.3) -> Call:
    """A random call. odd: how likely it has each of a hidden NaN, scores of -inf, bad requests."""
    features: Counter[str] = Counter()
    seq_lens = _lengths(rng, case)
    queries = np.full(case.batch, case.tokens, np.int32)
    if case.ragged:
        queries = rng.integers(0, case.tokens + 1, case.batch).astype(np.int32)
        queries = np.where(rng.random(case.batch) < 0.4, case.tokens, queries)
        queries = np.minimum(queries, seq_lens).astype(np.int32)
    else:  # a length below S is a request whose new tokens are not all cached
        seq_lens = np.where(seq_lens > 0, np.maximum(seq_lens, case.tokens), 0).astype(np.int32)
    tables, stored = _pages(rng, case, seq_lens, features)
    if rng.random() < odd:
        _hide_nan(rng, case, seq_lens, queries, tables, stored, features)
    if rng.random() < odd:
        _put_minus_inf(rng, case, seq_lens, tables, stored, features)
    valid = np.ones(case.batch, bool)
    if rng.random() < odd:
        valid = _spoil(rng, case, seq_lens, queries, tables, features)
    nan_query = np.zeros((case.batch, case.tokens, case.heads), bool)
    if rng.random() < 0.1:
        place = tuple(rng.integers(n) for n in nan_query.shape)
        nan_query[place] = True
        features["calls with a query of NaN"] += 1
    deviation = float(rng.choice(DEVIATIONS))
    features["calls with scores of deviation >= 1000"] += deviation >= 1e3
    return Call(
        seq_lens=seq_lens,
        query_lens=queries,
        block_tables=tables,
        stored=stored,
        valid=valid,
        nan_query=nan_query,
        deviation=deviation,
        key_size=float(rng.choice((0.1, 1.0))),
        seed=int(rng.integers(2**31)),
        features=features,
    )


def _lengths(rng: np.random.Generator, case: Case) -> np.ndarray:
    """[B] int32, 0 .. longest: equal, any, at the edges of pages and blocks, or one long one."""
    most, batch = case.longest, case.batch
    pattern = rng.choice(("equal", "any", "edges", "edges", "one long", "full"))
    if pattern == "equal":
        lengths = np.full(batch, rng.integers(0, most + 1))
    elif pattern == "any":
        lengths = rng.integers(0, most + 1, batch)
    elif pattern == "edges":
        unit = rng.choice((case.page_size, BLOCK, *BLOCKS), batch)
        lengths = unit * rng.integers(0, most // unit + 1) + rng.integers(-1, 2, batch)
    elif pattern == "one long":
        lengths = rng.integers(0, min(most, 2 * BLOCK) + 1, batch)
        lengths[rng.integers(batch)] = most
    else:
        lengths = np.full(batch, most)
    short = rng.random(batch) < 0.15
    lengths = np.where(short, rng.choice((0, 0, 1, 2, case.tokens), batch), lengths)
    return np.clip(lengths, 0, most).astype(np.int32)


def _pages(
    rng: np.random.Generator, case: Case, seq_lens: np.ndarray, features: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Block tables with garbage in their unused slots, and which tokens of the pages are in use.

    Requests share pages where some other request's are drawn for them, or where there are too few.
    """
    garbage = np.array([-1, -(2**31), 2**31 - 1, case.num_pages, 2147480000, 0], np.int32)
    tables = rng.choice(garbage, (case.batch, case.max_pages)).astype(np.int32)
    stored = np.zeros((case.num_pages, case.page_size), np.uint8)
    free = rng.permutation(case.num_pages)
    taken, shares = 0, rng.random() < 0.3
    for request, length in enumerate(seq_lens):
        count = -(-int(length) // case.page_size)
        if count > len(free) - taken:
            mine = rng.integers(case.num_pages, size=count)
            features["requests with shared pages"] += 1
        elif shares and request and count and rng.random() < 0.5:
            mine = free[taken : taken + count].copy()
            before = tables[rng.integers(request)][:count]
            reused = (rng.random(count) < 0.7) & (before >= 0) & (before < case.num_pages)
            mine[reused] = before[reused]
            features["requests with shared pages"] += 1
        else:
            mine = free[taken : taken + count]
            taken += count
        tables[request, :count] = mine
        places = np.arange(length)
        stored[mine[places // case.page_size], places % case.page_size] = USED
    return tables, stored


def _store(
    case: Case, tables: np.ndarray, stored: np.ndarray, request: int, places: np.ndarray, what: int
) -> None:
    stored[tables[request, places // case.page_size], places % case.page_size] = what


def _hide_nan(
    rng: np.random.Generator,
    case: Case,
    seq_lens: np.ndarray,
    queries: np.ndarray,
    tables: np.ndarray,
    stored: np.ndarray,
    features: Counter[str],
) -> None:
    """NaN in a cached token that only later tokens of its request may see."""
    for request in np.flatnonzero((queries > 1) & (rng.random(case.batch) < 0.6)):
        from_the_end = int(rng.integers(1, queries[request]))
        place = np.array([seq_lens[request] - from_the_end])
        if place[0] < 0:
            continue
        _store(case, tables, stored, request, place, HIDDEN_NAN)
        features["requests with a hidden NaN"] += 1


def _put_minus_inf(
    rng: np.random.Generator,
    case: Case,
    seq_lens: np.ndarray,
    tables: np.ndarray,
    stored: np.ndarray,
    features: Counter[str],
) -> None:
    """Keys whose scores are -inf: the first block, one in the middle, the last, any, or all."""
    block = int(rng.choice(BLOCKS))
    for request in np.flatnonzero((seq_lens > 0) & (rng.random(case.batch) < 0.7)):
        length = int(seq_lens[request])
        where = rng.choice(("first", "first", "first", "middle", "last", "any", "all"))
        last = (length - 1) // block
        begin, end = {
            "first": (0, block),
            "middle": (last // 2 * block, (last // 2 + 1) * block),
            "last": (last * block, length),
            "any": tuple(sorted(rng.integers(0, length + 1, 2))),
            "all": (0, length),
        }[str(where)]
        places = np.arange(begin, min(end, length))
        kept = stored[tables[request, places // case.page_size], places % case.page_size] == USED
        _store(case, tables, stored, request, places[kept], MINUS_INF)
        features["requests with scores of -inf"] += 1


def _spoil(
    rng: np.random.Generator,
    case: Case,
    seq_lens: np.ndarray,
    queries: np.ndarray,
    tables: np.ndarray,
    features: Counter[str],
) -> np.ndarray:
    """Makes some requests impossible, in place; which are not."""
    valid = np.ones(case.batch, bool)
    for request in np.flatnonzero(rng.random(case.batch) < 0.4):
        length = int(seq_lens[request])
        ways = ["negative length", "length past the table"]
        ways += ["page out of range"] * 2 if length else []
        # A bad bound of packed tokens would spoil other requests, too.
        ways += ["query_lens"] if case.ragged and not case.packed else []
        way = rng.choice(ways)
        if way == "negative length":
            seq_lens[request] = rng.choice((-1, -7, -(2**31)))
        elif way == "length past the table":
            seq_lens[request] = case.capacity + int(rng.choice((1, case.page_size)))
            if rng.random() < 0.2:
                seq_lens[request] = 2**31 - 1
        elif way == "page out of range":
            slot = rng.integers(-(-length // case.page_size))
            tables[request, slot] = rng.choice((-1, case.num_pages, 2**31 - 1, -(2**31)))
        else:
            queries[request] = rng.choice((-1, case.tokens + 1, 2**31 - 1))
            if 0 <= length < case.tokens:
                queries[request] = length + 1
        valid[request] = False
        features[f"requests with {way}"] += 1
    return valid
