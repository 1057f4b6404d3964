"""Requests that are served a second time, alone: whether a choice of a token was another one.

In float32 all tokens must be the same. In 16 bits rounding depends on the shape of the batch, and
two tokens whose logits are close may change places; all later tokens may then differ, too. So only
the first token that differs counts: how close were the two choices there? The model says so, by
logits of a third computation, a prefill of the tokens that both results have in common.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from experiments.generate.engine import Batch, Engine, Sizes, prefill_step
from experiments.generate.model import ModelConfig, draws, logits_of
from experiments.generate.requests import Request, no_drafter


@dataclasses.dataclass(frozen=True)
class Alone:
    """What differed.

    Attributes:
        differ: requests of which a token differed.
        gap: largest distance of two choices, in standard deviations of the logits; 0: none differ.
        bound: on `gap`.
    """

    differ: int
    gap: float
    bound: float

    @property
    def passed(self) -> bool:
        return not self.differ or self.gap < self.bound

    def in_words(self, requests: int) -> str:
        words = f"{self.differ} of {requests} differ when served alone"
        if not self.differ or not self.bound:
            return words
        return (
            f"{words}, first where two choices are at most {self.gap:.2g} standard deviations of "
            f"the logits apart (bound for rounding: {self.bound:.2g})"
        )


def bound_of(config: ModelConfig, dtype: DTypeLike) -> float:
    """Returns the bound on the gap, in standard deviations of the logits; 0 in float32.

    A value that is rounded to 16 bits has a relative error of up to u = eps / 2. Each layer adds
    two rounded results to the hidden states, and errors of different layers are independent, so
    that logits have errors of about u * sqrt(layers) standard deviations. Twice that allows for
    experts of nearly the same score that change places. Between two computations, the difference of
    two logits has twice the error of one logit, as a sum of four errors. The bound is five times
    that.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return 0.0
    error = 2 * float(jnp.finfo(dtype).eps) / 2 * config.num_layers**0.5
    return 5 * 2 * error


def served_alone(
    new_engine: Callable[..., Engine], sizes: Sizes, requests: Sequence[Request], served: Engine
) -> Alone:
    """Serves requests one by one, without drafts and shared prefixes, and compares the tokens.

    Uses the memory of the pool of `served`, and gives it back.
    """
    gaps = []
    for request in requests:
        alone = new_engine(sizes, no_drafter, pool=served.pool)
        pair = served.finished[request.id], alone.run([request])[request.id]
        served.pool = alone.pool
        if pair[0] != pair[1]:
            gaps.append(_gap(request, pair, served))
    bound = bound_of(served.config, served.params.embedding.dtype)
    return Alone(len(gaps), max(gaps, default=0.0), bound)


def _gap(request: Request, pair: tuple[list[int], list[int]], served: Engine) -> float:
    """Returns the distance of the first two choices that differ."""
    first = next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b)
    common = [*request.prompt, *pair[0][:first]]
    logits = _logits_after(common, served)
    return distance(logits, request, len(common), pair[0][first], pair[1][first])


def _logits_after(tokens: list[int], served: Engine) -> jax.Array:
    """Returns the logits after some tokens, [1, vocab], by the engine's program for prefills."""
    sizes = served.sizes
    height, width = sizes.prefill_rows, sizes.chunk
    pages = -(-len(tokens) // sizes.page_size)
    tables = np.full((height, sizes.max_pages), -1, np.int32)
    tables[0, :pages] = np.arange(pages)
    rest = np.zeros(height, np.float32), np.ones(height, np.float32), np.zeros(height, np.uint32)
    for start in range(0, len(tokens), width):
        row = tokens[start : start + width]
        new = np.zeros((height, width), np.int32)
        seq_lens, query_lens = np.zeros((2, height), np.int32)
        new[0, : len(row)], seq_lens[0], query_lens[0] = row, start + len(row), len(row)
        batch = Batch(new, tables, seq_lens, query_lens, *rest)
        _, hidden, served.pool = prefill_step(
            served.params, served.config, served.pool, batch, served.mesh
        )
    return jax.jit(logits_of, static_argnums=1)(served.params, served.config, hidden[:1])


def distance(logits: jax.Array, request: Request, position: int, one: int, other: int) -> float:
    """Returns how far logits are from another choice, in their standard deviations.

    logits: [1, vocab] float32, of which one computation chose the token `one` and another `other`.

    Greedy choices are as far apart as their logits. A draw compares sums of a scaled logit and
    noise, so that draws are as far apart as these sums. They may also differ because rounding took
    the token with the larger sum out of the tokens that may be drawn. The smaller distance counts.
    """
    if request.temperature == 0:
        gap = abs(logits[0, one] - logits[0, other])
    else:
        a_row = (
            np.array([value], dtype)
            for value, dtype in (
                (request.temperature, np.float32), (request.top_p, np.float32),
                (request.seed, np.uint32), (position, np.int32),
            )
        )  # fmt: skip
        scaled, least, noise = jax.jit(draws)(logits, *a_row)
        sums = (scaled + noise)[0]
        larger = one if sums[one] > sums[other] else other
        gap = min(abs(sums[one] - sums[other]), abs(scaled[0, larger] - least[0, 0]))
        gap *= request.temperature
    return float(gap / jnp.std(logits))
