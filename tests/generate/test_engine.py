"""The engine: results do not depend on what else runs, how prompts are cut, or what is guessed."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from golden_logits import check_logits

from experiments.generate import engine as engine_module
from experiments.generate.engine import TRACES, Batch, Engine, Sizes, decode_step
from experiments.generate.model import next_tokens
from experiments.generate.requests import Request, lookup_drafter, no_drafter

# The model has layers of one kind, so that each step traces one layer.
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


@functools.partial(jax.jit, static_argnums=(1, 4), donate_argnums=2)
def decode_with_logits(params, config, pool, batch, with_plan, mesh=None):
    """The engine's decode step; also returns its logits, [B * S, vocab]. One program has both."""
    found = []

    def noted(logits, *sampling):
        found.append(logits)
        return next_tokens(logits, *sampling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "next_tokens", noted)
        out = decode_step.__wrapped__(params, config, pool, batch, with_plan)
    return out, found[0]


@pytest.fixture(autouse=True)
def _one_decode_program(monkeypatch):
    monkeypatch.setattr(engine_module, "decode_step", lambda *a: decode_with_logits(*a)[0])


def test_tokens_are_those_of_transformers(golden):
    """Requests arrive while others decode, prompts are cut, and a request is preempted.

    Each step is traced once.
    """
    want = golden(NAME)[2]
    for every in (1, 4):
        engine = serve(golden, requests_of(want), every=every)
        assert engine.finished == dict(enumerate(want["tokens"].tolist()))
        assert engine.counts["preempted"] or every > 1
    mine = {key: n for key, n in TRACES.items() if key[-1] == SIZES.num_pages}
    assert sorted(key[0] for key in mine) == ["decode", "prefill"]
    assert set(mine.values()) == {1}


def test_logits_are_those_of_transformers(golden):
    """They are those of the decode step, which here gets the prompts as drafts, too."""
    config, params, want = golden(NAME)

    def step(tokens, pool, tables, seq_lens, query_lens):
        greedy = np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(3, np.uint32)
        batch = Batch(tokens, tables, seq_lens, query_lens, *greedy)
        (_, pool), logits = decode_with_logits(params, config, pool, batch, False)
        return logits.reshape(*tokens.shape, -1), pool

    sizes = {"rows": SIZES.slots, "width": 1 + SIZES.drafts, "num_pages": SIZES.num_pages}
    check_logits(config, want, step, **sizes, wave=2)


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
        Request(i, prompt + [i] * (i % 2), 6, temperature=1.0 + i / 4, top_p=0.9, seed=i // 2)
        for i in range(3)
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
