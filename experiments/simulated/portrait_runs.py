"""Runs of kernels with time stamps on this machine's GPU, for the experiment `portrait`."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework.experiment import InputError
from experiments.framework.results import first_line
from mla_jax.hal import HardwareProfile, Problem
from mla_jax.hal.simulator.hopper import HopperKernel
from mla_jax.hal.simulator.hopper_prefill import HopperPrefill
from pallas_kernels.hopper import planning
from pallas_kernels.hopper.model import simulated_kernel
from pallas_kernels.hopper.portrait import attend_with_stamps, prefill_with_stamps
from pallas_kernels.hopper.prefill.model import simulated_prefill

WARM_UP, RUNS = 3, 4
PAGE, LATENT, WIDTH = 64, 512, 576
NOPE, ROPE, VALUE = 128, 64, 128  # columns of the expanded form
MOST_CACHES = 4  # which take turns, so that no run finds its keys in L2
L2_BYTES = 2e8  # of caches, more than any L2
INT8_SCALE = 1 / 64  # of a token


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of equal requests, and what is run on it.

    kind: "" for decode over bfloat16, "int8" for decode over an int8 cache, or "prefill", of
        requests without a prefix.
    """

    kind: str
    heads: int
    requests: int
    tokens: int

    @staticmethod
    def of(text: str) -> "Shape":
        """Returns the shape of [KIND:]HEADSxREQUESTSxTOKENS; InputError for other text."""
        match = re.fullmatch(r"(?:(int8|prefill):)?(\d+)x(\d+)x(\d+)", text)
        sizes = tuple(int(n) for n in match.groups()[1:]) if match else ()
        if match is None or min(sizes) < 1:
            raise InputError(
                f"--shapes: got {text!r}, wanted HEADSxREQUESTSxTOKENS, each at least 1, maybe "
                "behind int8: or prefill:"
            )
        return Shape(match[1] or "", *sizes)

    @property
    def problem(self) -> Problem:
        lengths = (self.tokens,) * self.requests
        if self.kind == "prefill":
            return Problem(lengths, self.heads, s_q=self.tokens)
        return Problem(lengths, self.heads, kv_dtype=self.kind or "bf16")

    @property
    def label(self) -> str:
        """Part of the names of its files."""
        return "_".join(filter(None, (self.kind, *map(str, dataclasses.astuple(self)[1:]))))

    def kernel(self, profile: HardwareProfile) -> HopperKernel | HopperPrefill:
        """Returns the simulated kernel. Raises ValueError for a shape that it does not take."""
        if self.kind == "prefill":
            return simulated_prefill(profile, self.problem)
        return simulated_kernel(profile, self.problem)


# Compiled, and the arguments of its runs, which it takes a random seed to make.
type _Ready = tuple[Any, Callable[[int], list[tuple]]]


def stamped_runs(shapes: Sequence[Shape], seed: int) -> Iterator[np.ndarray | str]:
    """Yields the stamps of some runs of each shape, [RUNS, CTAs, ...], or why there are none.

    All programs are compiled first, at the same time: each takes most of ten seconds.
    """
    with ThreadPoolExecutor(len(shapes)) as pool:
        compiled = [pool.submit(_compiled, shape) for shape in shapes]
    for made in compiled:
        try:
            yield _stamps(made, seed)
        except Exception as error:  # One shape must not lose the others.
            yield f"{type(error).__name__}: {first_line(error)}"


def _stamps(made: "Future[_Ready]", seed: int) -> np.ndarray:
    attend, arguments_of = made.result()
    arguments = arguments_of(seed)
    found = []
    for i in range(RUNS):
        for j in range(WARM_UP + 1):
            stamps = attend(*arguments[(i + j) % len(arguments)])[2]
        found.append(np.asarray(stamps))
    return np.stack(found)


def _compiled(shape: Shape) -> _Ready:
    return _compiled_prefill(shape) if shape.kind == "prefill" else _compiled_decode(shape)


def _compiled_prefill(shape: Shape) -> _Ready:
    rows, heads = shape.requests * shape.tokens, shape.heads
    shapes = (rows, heads, NOPE + ROPE), (rows, heads, NOPE), (rows, ROPE), (rows, heads, VALUE)
    bounds = jax.ShapeDtypeStruct((shape.requests + 1,), jnp.int32)
    structs = [jax.ShapeDtypeStruct(each, jnp.bfloat16) for each in shapes]
    scale = (NOPE + ROPE) ** -0.5
    lowered = prefill_with_stamps.lower(*structs, bounds, bounds, softmax_scale=scale)

    def arguments(seed: int) -> list[tuple]:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        arrays = [
            jax.random.normal(key, each, jnp.bfloat16)
            for key, each in zip(keys, shapes, strict=True)
        ]
        ends = jnp.arange(0, rows + 1, shape.tokens, dtype=jnp.int32)
        return [(*arrays, ends, ends)]

    return lowered.compile(), arguments


def _compiled_decode(shape: Shape) -> _Ready:
    problem, batch = shape.problem, shape.requests
    pages = -(-shape.tokens // PAGE)
    is_int8 = shape.kind == "int8"
    copies = min(MOST_CACHES, 1 + int(L2_BYTES // (batch * pages * PAGE * problem.token_bytes)))
    make = functools.partial(
        planning.plan_decode,
        rows=problem.rows,
        capacity=shape.tokens,
        cache="int8" if is_int8 else "float",
    )
    plan = jax.jit(make)(jnp.asarray(problem.kv_lens, jnp.int32))
    caches = copies * batch * pages, PAGE
    cache: tuple[jax.ShapeDtypeStruct, ...] = (
        jax.ShapeDtypeStruct((*caches, WIDTH), jnp.bfloat16),
    )
    if is_int8:
        cache = (
            jax.ShapeDtypeStruct((*caches, LATENT), jnp.int8),
            jax.ShapeDtypeStruct((*caches, WIDTH - LATENT), jnp.bfloat16),
            jax.ShapeDtypeStruct(caches, jnp.float32),
        )
    structs = (
        jax.ShapeDtypeStruct((batch, problem.rows, WIDTH), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((batch, pages), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    scale = WIDTH**-0.5
    lowered = attend_with_stamps.lower(*structs, plan, num_heads=problem.heads, softmax_scale=scale)

    def arguments(seed: int) -> list[tuple]:
        order = np.random.default_rng(seed).permutation(copies * batch * pages).astype(np.int32)
        tables = jnp.asarray(order.reshape(copies, batch, pages))
        keys = jax.random.split(jax.random.key(seed), 1 + len(cache))
        q, arrays = _random(keys[0], structs[0]), tuple(map(_random, keys[1:], cache))
        lengths = jnp.asarray(problem.kv_lens, jnp.int32)
        return [(q, arrays, table, lengths, plan) for table in tables]

    return lowered.compile(), arguments


def _random(key: jax.Array, struct: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns normal values, random int8, or the scales of those."""
    if struct.dtype == jnp.int8:
        return jax.random.randint(key, struct.shape, -127, 128, jnp.int8)
    if struct.dtype == jnp.float32:
        return jnp.full(struct.shape, INT8_SCALE)
    return jax.random.normal(key, struct.shape, struct.dtype)
