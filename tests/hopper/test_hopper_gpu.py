"""GPU tests of the Hopper kernels: every option against float64, repeats, unequal lengths.

One test runs anywhere. It shows that a plan here has the tiles that are to be tested. On a GPU the
tests assert that of each of their plans.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from even_plan import kept_items
from hopper_batch import SCALE, HopperBatch, invalid_requests, op, with_latents_times

from mla_jax import paged_mla_attention, plan_fixed, plan_splits
from pallas_kernels.hopper import device, planning
from pallas_kernels.hopper.tuned import choose_config

BF16, F16 = jnp.bfloat16, jnp.float16
WIDTHS = [(128, 64), (256, 64), (384, 128), (384, 64), (256, 192)]
LENGTHS = [1, 63, 64, 65, 20, 140, 0, 4096, 777]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 5, 8, 16, 24, 40, 64, 80, 128])
def test_heads_on_the_gpu(heads):
    batch = HopperBatch(np.random.default_rng(heads), LENGTHS, heads=heads)
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 40, 64, 80, 128])
@pytest.mark.parametrize("seq_lens", [[0], [65], [4100], [70, 0, 300]])
def test_few_tokens_on_the_gpu(heads, seq_lens):
    batch = HopperBatch(np.random.default_rng(heads), seq_lens, heads=heads, num_queries=1)
    batch.check(*op(batch, few_tokens=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "page_size"),
    [
        *itertools.product([16, 64, 128], [1, 16, 128]),
        (40, 1), (16, 2), (64, 4), (128, 8), (16, 32),
    ],
)  # fmt: skip
def test_page_sizes_on_the_gpu(heads, page_size):
    batch = HopperBatch(np.random.default_rng(heads), LENGTHS, heads=heads, page_size=page_size)
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("heads", "times"), [(16, 1), (16, 4), (24, 4), (64, 1), (128, 1)])
def test_other_widths_on_the_gpu(heads, times, widths):
    kv_lora_rank, rope_dim = widths
    batch = HopperBatch(
        np.random.default_rng(heads), LENGTHS * times, heads=heads,
        kv_lora_rank=kv_lora_rank, rope_dim=rope_dim,
    )  # fmt: skip
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "num_queries"), [(16, 2), (16, 4), (64, 2), (128, 3)])
@pytest.mark.parametrize(("causal", "page_size"), [(True, 64), (False, 64), (True, 1)])
def test_several_tokens_on_the_gpu(heads, num_queries, causal, page_size):
    rng = np.random.default_rng(num_queries)
    lens = [length if length > 4 else 0 for length in LENGTHS]
    queries = [min(length, int(rng.integers(1, num_queries + 1))) for length in lens]
    shape = {"heads": heads, "num_queries": num_queries, "page_size": page_size}
    batch = HopperBatch(rng, lens, query_lens=queries, **shape)
    batch.check(*op(batch, causal=causal), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "rescale", "partial_dtype", "page_size"),
    [
        (F16, "multiply", F16, 64),
        (F16, "multiply", F16, 1),
        (BF16, "exponent_add", jnp.float32, 64),
        (BF16, "multiply", jnp.float32, 64),
    ],
)
def test_options_on_the_gpu(heads, dtype, rescale, partial_dtype, page_size):
    shape = {"heads": heads, "dtype": dtype, "page_size": page_size}
    batch = HopperBatch(np.random.default_rng(heads), LENGTHS, **shape)
    batch.check(*op(batch, rescale=rescale, partial_dtype=partial_dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "times"), [(64, 1), (128, 1), (64, 20), (128, 30)])
def test_partials_of_any_size_on_the_gpu(heads, times):
    lens = [5000, 900, 1800] * times  # in many work items per tile, or in two
    batch = HopperBatch(np.random.default_rng(heads), lens, heads=heads)
    o, lse = op(batch)
    batch.check(o, lse)
    for factor in (2.0**60, 2.0**-60):
        scaled_o, scaled_lse = op(with_latents_times(batch, factor))
        np.testing.assert_array_equal(scaled_o, o * factor)
        np.testing.assert_array_equal(scaled_lse, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_long_and_repeated_on_the_gpu(heads, page_size):
    lens, shape = [65536, 4096, 3, 1000], {"heads": heads, "page_size": page_size}
    check_repeats(HopperBatch(np.random.default_rng(heads), lens, **shape))


@pytest.mark.gpu
@pytest.mark.parametrize("few_tokens", [False, True])
@pytest.mark.parametrize(("heads", "page_size"), [(16, 64), (33, 8), (128, 64)])
def test_chunks_on_the_gpu(heads, page_size, few_tokens):
    """Most tiles have fewer blocks than their request, and those of padding have none."""
    rng, queries = np.random.default_rng(heads), [130, 5, 70, 0]
    shape = {"heads": heads, "num_queries": 130, "page_size": page_size, "query_lens": queries}
    batch = HopperBatch(rng, [700, 130, 70, 64], **shape)
    batch.check(*op(batch, few_tokens=few_tokens))


# Shortest and longest length, number of requests, workers or page size, and at least how many items
# of the plan keep their partial.
PAIRS = [(800, 1023, 60, 132, 100), (1, 1999, 60, 40, 20)]  # one item per worker, and up to five
TWO_ITEMS = [(800, 1023, 100, 64, 35), (1, 1999, 40, 16, 15)]
SHAPES = [(64, 1, 64), (64, 1, 16), (40, 1, 1), (24, 2, 64), (16, 1, 64), (4, 2, 64), (24, 1, 1)]


def drawn(shortest, longest, requests):
    rng = np.random.default_rng(64)
    return rng, rng.integers(shortest, longest + 1, requests).tolist()


def plan_in_pairs(lens, rows, workers):
    """Returns a plan with many shared tiles, whatever the cost of a split in tuned.json."""
    tiles = choose_config(rows if rows <= 32 else 64, batch=len(lens))
    assert tiles.in_pairs
    return plan_splits(
        jnp.array(lens, jnp.int32), num_workers=workers, rows=rows, in_pairs=True,
        rows_per_tile=tiles.rows_per_tile, overhead=tiles.split_overhead, merge_overhead=8,
    )  # fmt: skip


def test_a_plan_splits_tiles_in_two(monkeypatch):
    monkeypatch.setattr(device, "num_sms", lambda: 132)
    shortest, longest, requests, _, least = TWO_ITEMS[1]
    _, lens = drawn(shortest, longest, requests)
    plan = planning.plan_decode(jnp.array(lens, jnp.int32), 128).split
    assert kept_items(plan, "by_first") >= least


@pytest.mark.gpu
@pytest.mark.parametrize(("shortest", "longest", "requests", "workers", "least"), PAIRS)
@pytest.mark.parametrize(("heads", "num_queries", "page_size"), SHAPES)
def test_pairs_of_workers_repeated_on_the_gpu(
    shortest, longest, requests, workers, least, heads, num_queries, page_size
):
    rng, lens = drawn(shortest, longest, requests)
    shape = {"heads": heads, "num_queries": num_queries, "page_size": page_size}
    plan = plan_in_pairs(lens, heads * num_queries, workers)
    assert kept_items(plan, "in_pairs") >= least
    check_repeats(HopperBatch(rng, lens, **shape), plan)


@pytest.mark.gpu
@pytest.mark.parametrize("rescale", ["multiply", "exponent_add"])
@pytest.mark.parametrize(("shortest", "longest", "requests", "page_size", "least"), TWO_ITEMS)
def test_tiles_in_two_items_repeated_on_the_gpu(
    shortest, longest, requests, page_size, least, rescale
):
    rng, lens = drawn(shortest, longest, requests)
    batch = HopperBatch(rng, lens, heads=64, num_queries=2, page_size=page_size)
    plan = planning.plan_decode(batch.seq_lens, 128)
    assert kept_items(plan.split, "by_first") >= least
    check_repeats(batch, plan, rescale=rescale)


def check_repeats(batch, plan=None, **options):
    """300 repeats give the same bits. A result that changes would show a race."""
    first = op(batch, plan, **options)
    batch.check(*first)
    call = functools.partial(
        paged_mla_attention, plan=plan, softmax_scale=SCALE, implementation="hopper", **options
    )
    step = jax.jit(lambda q, c, t, s, n: call(q, c, t, s, query_lens=n))
    arrays = batch.q, batch.cache, batch.block_tables, batch.seq_lens, batch.query_lens
    results = [step(*arrays) for _ in range(300)]
    for o, lse in results:
        assert jnp.array_equal(o, first[0])
        assert jnp.array_equal(lse, first[1])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_one_long_request_among_short_ones_on_the_gpu(heads):
    """The long request's tile has many more work items than a tile has on average."""
    batch = HopperBatch(np.random.default_rng(heads), [65536, *range(1, 128)], heads=heads)
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "rows_per_tile", "times"), [(16, 16, 1), (16, 16, 10), (64, 64, 1), (128, 128, 1)]
)
def test_batch_invariant_on_the_gpu(heads, rows_per_tile, times):
    """With a fixed split, a request's rows have the same bits alone and in a batch."""
    lens = [3000, 100, 4096, 1025] * times
    batch = HopperBatch(np.random.default_rng(heads), lens, heads=heads)

    def attend(rows):
        part = HopperBatch.__new__(HopperBatch)
        part.__dict__.update(batch.__dict__)
        for name in ("q", "block_tables", "seq_lens", "query_lens"):
            setattr(part, name, getattr(batch, name)[rows])
        plan = plan_fixed(
            part.seq_lens, split_size=512, max_seq_len=4096, rows=heads,
            rows_per_tile=rows_per_tile, num_workers=132 // max(1, rows_per_tile // 64),
        )  # fmt: skip
        return op(part, plan=plan)

    together = attend(slice(None))
    batch.check(*together)
    for i in range(4):
        alone = attend(slice(i, i + 1))
        assert jnp.array_equal(alone[0][0], together[0][i])
        assert jnp.array_equal(alone[1][0], together[1][i])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", [8, 24, 64])
def test_finds_invalid_requests_on_the_gpu(heads, page_size):
    batch, expected = invalid_requests(heads, page_size)
    expected.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64])
def test_more_workers_than_sms_on_the_gpu(heads):
    """The workers can't wait for each other, so the merge is a launch of its own."""
    batch = HopperBatch(np.random.default_rng(heads), LENGTHS, heads=heads)
    plan = plan_splits(batch.seq_lens, num_workers=300, rows=heads, rows_per_tile=heads)
    batch.check(*op(batch, plan=plan))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64])
def test_independent_launches_of_one_program_on_the_gpu(heads):
    """The launches share counters. XLA runs them in order, so they never overlap."""
    batch = HopperBatch(np.random.default_rng(heads), [4096, 2500], heads=heads)
    plan = plan_splits(batch.seq_lens, num_workers=10, rows=heads, rows_per_tile=heads, overhead=1)
    one = jax.jit(lambda q: paged_mla_attention(
        q, batch.cache, batch.block_tables, batch.seq_lens,
        softmax_scale=SCALE, implementation="hopper", plan=plan,
    ))  # fmt: skip
    queries = [batch.q * scale for scale in (0.25, 0.5, 0.75, 1.0)]
    for got, query in zip(jax.jit(lambda qs: [one(q) for q in qs])(queries), queries, strict=True):
        assert jnp.array_equal(got[0], one(query)[0])


@pytest.mark.gpu
def test_inside_a_scan_on_the_gpu():
    """A decode loop in lax.scan is traced once, and its lengths grow on the device."""
    batch = HopperBatch(np.random.default_rng(0), [64, 640], heads=16)

    def step(seq_lens, _):
        out = paged_mla_attention(
            batch.q, batch.cache, batch.block_tables, seq_lens,
            softmax_scale=SCALE, implementation="hopper",
        )  # fmt: skip
        return seq_lens + 1, out

    start = batch.seq_lens - 5
    _, (o, lse) = jax.jit(lambda s: jax.lax.scan(step, s, None, length=6))(start)
    batch.check(o[-1], lse[-1])
    invalid = jnp.array([100000, 640], jnp.int32)
    _, (o, _) = jax.jit(lambda s: jax.lax.scan(step, s, None, length=1))(invalid)
    assert jnp.isnan(o[0, 0]).all()
    assert jnp.isfinite(o[0, 1]).all()
