"""Requests served alone: how far apart two choices of a token are where they differ."""

import functools

import jax
import numpy as np
import pytest

from experiments.generate.alone import Alone, bound_of, distance, served_alone
from experiments.generate.engine import Engine, Sizes
from experiments.generate.requests import Request, no_drafter

# The tokens that both results have, 37 of a prompt and 2 new ones, end with a chunk of one token.
SIZES = Sizes(slots=1, drafts=0, prefill_rows=1, chunk=19, max_tokens=64, num_pages=4)


def test_the_first_token_that_differs(golden):
    """The distance is that of transformers' logits, after the tokens that are the same."""
    config, params, want = golden("deepseek_v2")
    prompt = want["prompts"][0, : want["prompt_lens"][0]].tolist()
    request = Request("a", prompt, 4)
    new_engine = functools.partial(Engine, params, config)
    served = new_engine(SIZES, no_drafter)
    tokens = served.run([request])["a"]
    assert served_alone(new_engine, SIZES, [request], served) == Alone(0, 0.0, 0.0)

    logits = want["decode"][0, 1].astype(np.float64)  # of the third new token
    best, second = np.argsort(-logits)[:2]
    assert (len(prompt) + 2) % SIZES.chunk == 1
    assert tokens[2] == best
    served.finished["a"] = [*tokens[:2], int(second), tokens[3]]
    found = served_alone(new_engine, SIZES, [request], served)
    assert found.differ == 1
    assert found.gap == pytest.approx((logits[best] - logits[second]) / logits.std(), rel=1e-3)
    assert not found.passed
    assert found.in_words(1) == "1 of 1 differ when served alone"


def test_bounds(golden):
    config, _, _ = golden("deepseek_v2")  # three layers
    assert bound_of(config, "float32") == 0
    bound = bound_of(config, "bfloat16")
    assert bound == pytest.approx(20 * 2**-8 * 3**0.5)
    assert Alone(2, 0.9 * bound, bound).passed
    assert not Alone(2, 1.1 * bound, bound).passed
    assert "at most 0.12 standard" in Alone(2, 0.9 * bound, bound).in_words(4)
    assert not Alone(1, 0.0, 0.0).passed  # in float32, two equal logits


def noise_of(seed, position, count):
    return np.asarray(jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), count))


def test_distances_of_two_choices():
    """Greedy ones, draws, and a draw whose token is at the edge of those that may be drawn."""
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    deviation = logits.std()
    greedy = distance(logits, Request(0, [1], 1), 7, 1, 2)
    assert greedy == pytest.approx(np.log(2) / deviation, rel=1e-5)

    seeds = {seed: noise_of(seed, 7, 4) for seed in range(20)}
    drawn = Request(0, [1], 1, temperature=2.0, top_p=1.0, seed=3)
    sums = logits[0] / 2 + seeds[3]
    found = distance(logits, drawn, 7, 0, 1)
    assert found == pytest.approx(2 * abs(sums[0] - sums[1]) / deviation, rel=1e-4)

    # Tokens 0 and 1 may be drawn, token 2 may not; its sum is larger than that of token 0 by more
    # than its logit is below that of token 1.
    sums = {seed: logits[0] + noise for seed, noise in seeds.items()}
    seed = next(s for s, one in sums.items() if one[2] - one[0] > 1)
    at_edge = Request(0, [1], 1, temperature=1.0, top_p=0.75, seed=seed)
    for pair in ((0, 2), (2, 0)):
        assert distance(logits, at_edge, 7, *pair) == pytest.approx(np.log(2) / deviation, rel=1e-4)
