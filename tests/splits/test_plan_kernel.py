"""The kernel that makes a plan, against the plan in JAX; and the plan's integer arithmetic."""

import functools
import math
from fractions import Fraction

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.splits.line import MOST_COST, unit_of, without_spread_overhead
from mla_jax.splits.planner import balanced_plan, plan_splits
from pallas_kernels.hopper import planning
from pallas_kernels.hopper.plan import call, where_lowered
from pallas_kernels.hopper.plan.kernel import make_plan
from pallas_kernels.hopper.work_items import work_list

LARGEST = 2**31 - 1
LONGEST = LARGEST - 100
# 18 tiles of 5 tokens for 4 workers in pairs
SIZES = {
    "num_workers": 4,
    "rows": 150,
    "num_heads": 30,
    "merge_overhead": 3,
    "in_pairs": True,
}


def maker(make, **options):
    """Returns a function of lengths and query lengths that returns a split and its work list."""

    @jax.jit
    def made(seq_lens, query_lens=None):
        work = []

        def keep(*args):
            split, *work[:] = make(*args)
            return split

        return plan_splits(seq_lens, query_lens=query_lens, make=keep, **options), *work

    return made


def specified(finish, longest=LARGEST):
    def make(seq_lens, query_lens, balance):
        split = balanced_plan(jnp.minimum(seq_lens, longest), query_lens, balance)
        work = work_list(split, finish)
        return split, work.ranges, work.items

    return make


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    paths = jax.tree.leaves_with_path(wanted)
    for one, (path, other) in zip(jax.tree.leaves(got), paths, strict=True):
        np.testing.assert_array_equal(one, other, jax.tree_util.keystr(path))


def test_one_kernel_makes_the_same_plan_interpreted():
    options = {"finish": "in_pairs", "longest": LONGEST}
    by_kernel = functools.partial(make_plan, **options, interpret=plgpu.InterpretGPUParams())
    made, wanted = maker(by_kernel, **SIZES), maker(specified(**options), **SIZES)
    seen = set()
    for lens, queries in (
        ([6400] * 6, [5] * 6),  # tiles for pairs, in halves
        ([640, 640, 640, 640, 0, 0], [1, 1, 1, 1, 0, 0]),  # whole tiles
        ([50_000, 0, 64, 3, 900, -7], [5, 1, 3, 2, 5, 0]),
        ([LARGEST, 10**9, 2**30, 10**8, 5, 12_345], [5, 5, 0, 2, 5, 4]),  # places of many blocks
    ):
        plan, *work = made(np.int32(lens), np.int32(queries))
        assert_same((plan, *work), wanted(np.int32(lens), np.int32(queries)))
        plan = jax.tree.map(np.asarray, plan)
        splits = (plan.block_start > 0).sum()
        of_pairs = plan.block_start[np.minimum(plan.worker_start[2:-1:2], plan.num_items - 1)]
        seen.add("whole" if not splits else "halves" if not of_pairs.any() else "shares")
    assert seen == {"whole", "halves", "shares"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("requests", "finish", "sizes"),
    [
        (1, "merge", {"num_workers": 132, "rows": 16, "rows_per_tile": 16, "overhead": 2}),
        (6, "in_pairs", SIZES),
        (40, "in_pairs", {"num_workers": 132, "rows": 16, "overhead": 2, "in_pairs": True}),
        (40, "by_first", {"num_workers": 66, "rows": 128, "rows_per_tile": 128}),
        (512, "merge", {"num_workers": 132, "rows": 16, "max_seq_len": 2**20}),
        (600, "by_first", {"num_workers": 57, "rows": 384}),
    ],
)
def test_one_kernel_makes_the_same_plan_on_the_gpu(requests, finish, sizes):
    made = maker(functools.partial(make_plan, finish=finish), **sizes)
    wanted = maker(specified(finish), **sizes)
    rng = np.random.default_rng(requests)
    for _ in range(200):
        mean = math.exp(rng.uniform(3, 13))
        lens = np.minimum(rng.exponential(mean, requests), 2**20).astype(np.int32)
        lens[rng.random(requests) < rng.choice([0, 0.3])] = 0
        queries = rng.integers(0, 6, requests).astype(np.int32) if "num_heads" in sizes else None
        assert_same(made(lens, queries), wanted(lens, queries))


@pytest.mark.parametrize("requests", [aot.on_gpu_machines(512)])
def test_compiles_for_sm90a(h200, requests):
    """It spills no registers."""
    plan = functools.partial(planning.plan_decode, rows=16, capacity=1000, clip=True)
    (report,) = aot.compile_sm90a(plan, jax.ShapeDtypeStruct((requests,), jnp.int32))
    assert report.spill_stores == report.spill_loads == report.stack_frame == 0


def test_a_plan_for_a_gpu_is_one_kernel(monkeypatch):
    """On a CPU, under vmap, partitioned, or with too many tiles for the kernel, JAX makes it."""

    def kernel(*_, **__):
        raise AssertionError("the kernel was called")

    def program(function, lens):
        return jax.jit(function).trace(lens).lower(lowering_platforms=("cuda",)).as_text()

    monkeypatch.setattr(call, "MOST_TILES", 4)
    plan = jax.jit(functools.partial(planning.plan_decode, rows=16, clip=True, capacity=640))
    lens = jax.ShapeDtypeStruct((4,), jnp.int32)
    text = program(lambda lens: jax.tree.leaves(plan(lens))[:-1], lens)  # without the counters
    assert "mla_decode_plan" in text
    assert text.count("custom_call") == 1

    monkeypatch.setattr(where_lowered, "make_plan", kernel)
    made = plan(jnp.int32([100, 700, -1, 0]))
    assert int(made.split.block_end.max()) == 10  # not 11, of 700 keys
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("x"))
    program(jax.vmap(plan), jax.ShapeDtypeStruct((2, 4), jnp.int32))
    program(plan, jax.ShapeDtypeStruct((4,), jnp.int32, sharding=spread))
    program(plan, jax.ShapeDtypeStruct((5,), jnp.int32))


def test_overhead_spread_over_a_tile_is_rounded_once():
    rng = np.random.default_rng(3)
    for overhead, largest in ((2, 100), (5, 8000), (5, 10**9), (40, 10**7)):
        count = rng.integers(1, 133, 50).astype(np.int32)
        cost = rng.integers(0, largest, 50).astype(np.int32)
        inside = (rng.random(50) * (cost + overhead)).astype(np.int32)
        rest = (rng.random(50) * count).astype(np.int32)
        got = without_spread_overhead(inside, rest, cost, count, overhead, 132)
        for i, value in enumerate(np.asarray(got).tolist()):
            place = int(inside[i]) + Fraction(int(rest[i]), int(count[i]))
            exact = place * Fraction(int(cost[i]), int(cost[i]) + overhead)
            in_int32 = (int(cost[i]) + overhead) * 132 * (2 * overhead + 3) <= LARGEST
            assert abs(value - exact) <= (Fraction(1, 2) if in_int32 else Fraction(3, 2))


def test_the_unit_is_the_smallest_that_fits_or_twice_that():
    rng = np.random.default_rng(4)
    for factor, overhead in ((1, 0), (6, 0), (1, 12_345)):
        for most in (2**10, 2**20, 2**31 - 1):
            blocks = np.minimum(rng.exponential(most / 2, 900), most).astype(np.int32)
            total = (blocks.astype(np.int64) + overhead).sum() * factor
            unit = int(unit_of(blocks, most=most, factor=factor, overhead=overhead))
            assert total <= unit * MOST_COST
            assert unit == 1 or total * 1.01 > unit * MOST_COST // 2
