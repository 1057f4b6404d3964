"""The engine: results do not depend on what else runs, how prompts are cut, or what is guessed."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments.generate.engine import TRACES, Engine, Sizes
from experiments.generate.requests import Request, lookup_drafter, no_drafter

# The model has layers of one kind, so that XLA compiles one layer per step.
NAME = "deepseek_v2"
# Three requests of the golden file take 9 pages together, so that some are preempted.
SIZES = Sizes(slots=3, drafts=2, prefill_rows=2, chunk=8, max_tokens=64, num_pages=6, page_size=16)


def requests_of(want):
    return [
        Request(i, prompt[:length].tolist(), want["tokens"].shape[1])
        for i, (prompt, length) in enumerate(zip(want["prompts"], want["prompt_lens"], strict=True))
    ]


def serve(golden, requests, drafter=lookup_drafter, every=1):
    """Serves requests of which one arrives every so many steps; checks that all pages are free."""
    config, params, _ = golden(NAME)
    engine = Engine(params, config, SIZES, drafter)
    arriving = list(requests)
    for number in itertools.count():
        if arriving and number % every == 0:
            engine.submit(arriving.pop(0))
        if not arriving and not engine.is_busy:
            break
        engine.step()
        assert number < 1000
    assert engine.allocator.num_free == SIZES.num_pages
    return engine


def test_tokens_are_those_of_transformers(golden):
    """Requests arrive while others decode, prompts are cut, and a request is preempted."""
    want = golden(NAME)[2]
    for every in (1, 4):
        engine = serve(golden, requests_of(want), every=every)
        assert engine.finished == dict(enumerate(want["tokens"].tolist()))
    assert serve(golden, requests_of(want)).counts["preempted"]


def test_each_step_is_traced_once(golden):
    serve(golden, requests_of(golden(NAME)[2]), every=3)
    mine = {key: n for key, n in TRACES.items() if key[-1] == SIZES.num_pages}
    assert sorted(key[0] for key in mine) == ["decode", "prefill"]
    assert set(mine.values()) == {1}


def test_right_and_wrong_drafts(golden):
    """Drafts are right, wrong, or wrong after a right one; they change steps, not tokens."""
    config, _, want = golden(NAME)
    request, tokens = requests_of(want)[0], want["tokens"][0].tolist()
    start = len(request.prompt)

    def drafter(known, count):
        known = len(known) - start
        right = tokens[known : known + count]
        wrong = [(token + 1) % config.vocab_size for token in right]
        return (right, wrong, right[:1] + wrong[1:])[known % 3]

    engine = serve(golden, [request], drafter)
    assert engine.finished[0] == tokens
    assert 0 < engine.counts["drafts kept"] < engine.counts["drafts"]
    plain = serve(golden, [request], no_drafter)
    assert plain.finished[0] == tokens
    assert plain.counts["decode steps"] == len(tokens) - 1 > engine.counts["decode steps"]


def test_shared_prefixes_and_sampling_do_not_depend_on_the_batch(golden):
    want = golden(NAME)[2]
    prompt = want["prompts"][0, :36].tolist()
    requests = [
        Request(i, prompt + [i] * (i % 3), 10, temperature=1.0 + i / 4, top_p=0.9, seed=i // 2)
        for i in range(6)
    ]
    requests += [dataclasses.replace(requests[0], id="other seed", seed=99)]
    together = serve(golden, requests)
    assert together.counts["tokens from the prefix cache"] >= 32
    for request in requests:
        alone = serve(golden, [request], no_drafter)
        assert alone.finished[request.id] == together.finished[request.id], request.id
    assert together.finished[0] != together.finished["other seed"]


def test_stop_tokens_and_lengths(golden):
    want = golden(NAME)[2]
    request, tokens = requests_of(want)[1], want["tokens"][1].tolist()
    stop = tokens[4]
    stopped = dataclasses.replace(request, stop_tokens=frozenset([stop]))
    expected = tokens[: tokens.index(stop) + 1]
    assert serve(golden, [stopped]).finished[1] == expected
    one = dataclasses.replace(request, prompt=request.prompt[:1], max_new_tokens=1)
    assert len(serve(golden, [one]).finished[1]) == 1


def test_the_lookup_drafter():
    tokens = np.array([5, 1, 2, 3, 9, 8, 1, 2, 3])
    assert lookup_drafter(tokens, 2) == [9, 8]
    assert lookup_drafter(np.array([7, 4, 7]), 2) == [4, 7]
    assert lookup_drafter(np.array([1, 2, 9, 1, 2, 7, 1, 2]), 2) == [7, 1]  # the last time
    assert lookup_drafter(np.array([1, 2, 3]), 2) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [128]}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 64}, "must fit in 64 tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refused_requests(golden, changes, named):
    config, params, _ = golden(NAME)
    engine = Engine(params, config, SIZES)
    with pytest.raises(ValueError, match=named):
        engine.submit(dataclasses.replace(Request(0, [1], 1), **changes))
    assert not engine.is_busy
