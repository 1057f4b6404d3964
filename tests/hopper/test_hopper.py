"""The Hopper kernels over a float cache in the interpreter. test_hopper_gpu.py runs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guards import run_guarded
from hopper_batch import SCALE, HopperBatch, invalid_requests, with_latents_times
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import plan_fixed, plan_splits
from pallas_kernels.hopper import attention
from pallas_kernels.hopper.kernels.merge import merge
from pallas_kernels.hopper.parts.combine import row_scales
from pallas_kernels.hopper.tuned import config_of_height
from pallas_kernels.hopper.work_items import PARTIAL, work_list

BF16, F16 = jnp.bfloat16, jnp.float16


def run(
    batch, *, workers=None, rows_per_tile=None, plan=None, tiles=None,
    rescale="multiply", causal=True, partial_dtype=None,
):  # fmt: skip
    """Runs the kernels in the interpreter, on a plan for few workers, so that tiles are split.

    The outputs have guards. The numbers of rows vary over the tests and are rarely whole tiles.
    """
    requests, tokens, heads, width = batch.q.shape
    plan = plan or plan_splits(
        jnp.maximum(batch.seq_lens, 0),
        num_workers=workers,
        rows=tokens * heads,
        rows_per_tile=rows_per_tile,
        overhead=1,
    )
    return run_guarded(
        attention.attend,
        batch.q.reshape(requests, tokens * heads, width),
        batch.cache.pages,
        batch.block_tables,
        batch.seq_lens,
        batch.query_lens,
        plan,
        num_heads=heads,
        kv_lora_rank=batch.cache.kv_lora_rank,
        softmax_scale=SCALE,
        causal=causal,
        rescale=rescale,
        partial_dtype=partial_dtype,
        tiles=tiles,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )


@pytest.mark.parametrize(
    ("seq_lens", "shape", "options"),
    [
        ([200, 0, -1, 65, 1], {"heads": 13}, {"workers": 2, "rows_per_tile": 16}),
        (
            [190, 70],
            {"heads": 7, "num_queries": 2, "query_lens": [2, 1], "dtype": F16},
            {"workers": 2, "rows_per_tile": 16, "partial_dtype": "float16"},
        ),
        (
            [330, -1, 0, 20],
            {"heads": 39, "page_size": 128},
            {"workers": 2, "rows_per_tile": 64, "partial_dtype": "float32"},
        ),
        (
            [140, 260],
            {"heads": 19, "num_queries": 3, "query_lens": [3, 1]},
            {"workers": 2, "rows_per_tile": 64, "rescale": "exponent_add"},
        ),
        ([150], {"heads": 129}, {"workers": 1, "rows_per_tile": 128}),
        ([75, 0, -1, 66], {"heads": 9, "page_size": 1}, {"workers": 2, "rows_per_tile": 16}),
        (  # several row tiles of the transposed kernel; two of them share a token's heads
            [70, 200],
            {"heads": 17, "num_queries": 2, "query_lens": [2, 1]},
            {"workers": 3, "rows_per_tile": 16},
        ),
        (
            [190, 70],
            {
                "heads": 31, "num_queries": 2, "query_lens": [2, 1], "page_size": 8, "dtype": F16,
            },
            {"workers": 2, "rows_per_tile": 64},
        ),
        ([150], {"heads": 65, "page_size": 1}, {"workers": 1, "rows_per_tile": 128}),
    ],
)  # fmt: skip
def test_interpreted(races, seq_lens, shape, options):
    batch = HopperBatch(np.random.default_rng(seq_lens[0]), seq_lens, **shape)
    batch.check(*run(batch, **options))
    assert not races.found


@pytest.mark.parametrize(
    ("seq_lens", "shape", "workers", "rescale", "invalid_page"),
    [
        (  # a short and a long request per pair, whose workers both run the long one last
            [60, 400],
            {"heads": 41, "num_queries": 2, "query_lens": [2, 1], "dtype": F16},
            4,
            "exponent_add",
            False,
        ),
        ([400], {"heads": 47}, 2, "multiply", True),  # one of the two has the invalid page
        (  # transposed
            [60, 400, 60, 400],
            {"heads": 5, "num_queries": 2, "query_lens": [2, 1, 0, 2], "dtype": F16},
            4,
            "multiply",
            False,
        ),
        ([400], {"heads": 23}, 2, "multiply", True),
    ],
)
def test_pairs_of_workers_interpreted(races, seq_lens, shape, workers, rescale, invalid_page):
    batch = HopperBatch(np.random.default_rng(1), seq_lens, **shape)
    rows = batch.q.shape[1] * batch.q.shape[2]
    rows_per_tile = rows + -rows % 8 if rows <= 32 else 64
    tiles = config_of_height(rows_per_tile, num_tiles=50)
    assert tiles.in_pairs
    plan = plan_splits(
        batch.seq_lens, num_workers=workers, rows=rows, rows_per_tile=rows_per_tile, overhead=1
    )
    shared = work_list(plan, "in_pairs")[1][:, PARTIAL] < -1
    assert shared.sum() == workers  # each shares a tile with the other CTA
    if invalid_page:
        last_page = (seq_lens[0] - 1) // batch.cache.page_size
        # The page that is read in its place has no NaN.
        assert jnp.isfinite(batch.cache.pages[0]).all()
        batch.block_tables = batch.block_tables.at[0, last_page].set(batch.cache.num_pages)
    o, lse = run(batch, plan=plan, tiles=tiles, rescale=rescale)
    if invalid_page:
        batch.seq_lens = batch.seq_lens.at[0].set(-1)
    batch.check(o, lse)
    assert not races.found


@pytest.mark.parametrize("invalid_page", [False, True])
def test_a_tile_in_two_work_items_interpreted(races, invalid_page):
    """The cluster of the first item adds the partial that another cluster has stored."""
    races.in_global = False
    shape = {"heads": 33, "num_queries": 2, "query_lens": [2, 1, 0], "dtype": F16}
    batch = HopperBatch(np.random.default_rng(2), [20, 450, 0], **shape)
    plan = plan_splits(batch.seq_lens, num_workers=2, rows=66, rows_per_tile=128, overhead=1)
    assert (work_list(plan, "by_first")[1][:, PARTIAL] < -1).sum() == 1
    if invalid_page:
        batch.block_tables = batch.block_tables.at[1, 450 // batch.cache.page_size].set(-1)
    o, lse = run(batch, plan=plan, partial_dtype="float16")
    if invalid_page:
        batch.seq_lens = batch.seq_lens.at[1].set(-1)
    batch.check(o, lse)
    assert not races.found


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1.2e-38, 6e-8, 1.0, 65535.9, 3.4e38])
def test_scaled_float16_holds_any_row(largest):
    largest = np.float32(largest)
    scale, inverse = map(np.float32, row_scales(jnp.float32(largest)))
    assert scale * inverse == 1
    scaled = np.float16(largest * inverse)
    assert scaled <= 2**15
    assert scaled >= 2**14 or largest < 2.0**-112
    assert abs(np.float32(scaled) * scale - largest) <= largest / 2**11


@pytest.mark.parametrize(
    ("heads", "rows_per_tile", "seq_lens", "widths", "partials", "factor"),
    [
        (33, 64, [20, 230], {}, 2, 2.0**60),
        (97, 128, [450], {"kv_lora_rank": 128}, 3, 2.0**-60),
    ],
)
def test_partials_of_any_size_interpreted(
    races, heads, rows_per_tile, seq_lens, widths, partials, factor
):
    """float16 ends at 65504 and 6e-8, so partials have a power-of-two scale per row."""
    races.in_global = partials > 2 or rows_per_tile == 64  # two items: as above
    batch = HopperBatch(np.random.default_rng(heads), seq_lens, heads=heads, **widths)
    options = {"rows": heads, "rows_per_tile": rows_per_tile, "overhead": 1}
    plan = plan_splits(batch.seq_lens, num_workers=3, **options)
    assert plan.tile_partial_start[-1] == partials
    o, lse = run(with_latents_times(batch, factor), plan=plan)
    batch.check(o / factor, lse)
    assert not races.found


def test_bfloat16_partials_interpreted(races):
    """A tile of 64 rows in three work items, whose partials are bfloat16."""
    batch = HopperBatch(np.random.default_rng(3), [450], heads=63, kv_lora_rank=128)
    options = {"workers": 3, "rows_per_tile": 64, "partial_dtype": "bfloat16"}
    batch.check(*run(batch, **options))
    assert not races.found


@pytest.mark.parametrize(("heads", "rows_per_tile"), [(15, 16), (55, 64)])
def test_pages_of_16_interpreted(heads, rows_per_tile):
    """Does not ask the race detector, which follows only one TMA copy per barrier phase."""
    batch = HopperBatch(np.random.default_rng(heads), [75, 130], heads=heads, page_size=16)
    batch.check(*run(batch, workers=2, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize(
    ("kv_lora_rank", "rope_dim", "heads", "rows_per_tile"), [(128, 64, 56, 64), (384, 128, 11, 16)]
)
def test_other_widths_interpreted(races, kv_lora_rank, rope_dim, heads, rows_per_tile):
    rng = np.random.default_rng(kv_lora_rank)
    widths = {"kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim}
    batch = HopperBatch(rng, [75, 0, 200], heads=heads, **widths)
    batch.check(*run(batch, workers=2, rows_per_tile=rows_per_tile))
    assert not races.found


@pytest.mark.parametrize(("heads", "rows_per_tile"), [(16, 16), (64, 64)])
def test_a_plan_for_other_lengths_interpreted(heads, rows_per_tile):
    """Tiles that the plan does not cover, or for which it reads past the end, are NaN."""
    batch = HopperBatch(np.random.default_rng(heads), [200, 130, 64, 0], heads=heads)
    plan = plan_splits(
        jnp.array([200, 64, 65, 1], jnp.int32),
        num_workers=2, rows=heads, rows_per_tile=rows_per_tile, overhead=1,
    )  # fmt: skip
    o, lse = run(batch, plan=plan)
    for x in (o, lse):
        assert np.isnan(np.asarray(x, np.float32)[1:]).all()
    batch.seq_lens = batch.seq_lens.at[1:].set(-1)
    batch.check(o, lse)


@pytest.mark.parametrize(("heads", "rows_per_tile", "page_size"), [(8, 16, 64), (24, 64, 2)])
def test_finds_invalid_requests_interpreted(heads, rows_per_tile, page_size):
    batch, expected = invalid_requests(heads, page_size)
    expected.check(*run(batch, workers=3, rows_per_tile=rows_per_tile))


@pytest.mark.parametrize(
    ("rows", "ctas", "width", "fixed"), [(16, 1, 128, False), (64, 2, 64, True)]
)
def test_merges_tiles_of_two_partials_and_of_many(races, rows, ctas, width, fixed):
    """Unused partials are NaN, and one partial has a row that sees no key."""
    rng = np.random.default_rng(rows + ctas)
    lens = jnp.array([64 * 70, 0, 64, 64 * 6, 128], jnp.int32)
    sizes = {"rows": rows * ctas, "rows_per_tile": rows * ctas, "num_workers": 18, "overhead": 1}
    if fixed:
        plan = plan_fixed(lens, split_size=192, max_seq_len=64 * 70, **sizes)
    else:
        plan = plan_splits(lens, **sizes)
    starts = np.asarray(plan.tile_partial_start)
    counts = np.diff(starts)  # one long request among short ones
    assert counts.max() > 8
    assert 2 in counts
    partial_lse = rng.standard_normal((plan.num_partials, ctas * rows)).astype(np.float32) * 3
    partial_lse[0, 3] = -np.inf
    partial_o = rng.standard_normal((plan.num_partials, ctas * rows, width)).astype(np.float32)
    partial_o[0, 3] = 0.0
    partial_lse[starts[-1] :], partial_o[starts[-1] :] = np.nan, np.nan
    stored = partial_o
    if rows == 64:  # as `decode` stores it: blocks of 64 x 8 in the order of its registers
        stored = partial_o.reshape(-1, ctas, 64, width // 8, 8).swapaxes(2, 3)
        stored = stored.reshape(-1, ctas, width // 8, 512)

    @jax.jit
    def run_merge(o, lse):
        o, lse = jax.new_ref(o), jax.new_ref(lse)
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        partials = jnp.asarray(stored), jnp.asarray(partial_lse)
        merge(o, lse, partials, plan, work_list(plan), num_rows=ctas * rows, interpret=interpret)
        return o[...], lse[...]

    shape = (5, ctas * rows, width)
    o, lse = run_merge(jnp.full(shape, 7.0), jnp.full(shape[:2], 7.0))
    for tile, (first, count) in enumerate(zip(starts, counts, strict=False)):
        if not count:
            assert (o[tile] == 7).all()
            assert (lse[tile] == 7).all()
            continue
        part = partial_lse[first : first + count].astype(np.float64)
        top = part.max(axis=0)
        weights = np.exp(part - top)
        expected = (weights[..., None] * partial_o[first : first + count]).sum(axis=0)
        expected /= weights.sum(axis=0)[:, None]
        np.testing.assert_allclose(o[tile], expected, rtol=2e-5, atol=2e-6)
        expected_lse = top + np.log(weights.sum(axis=0))
        np.testing.assert_allclose(lse[tile], expected_lse, rtol=1e-6, atol=1e-6)
    assert not races.found


def test_a_nan_query_changes_no_other_row_interpreted():
    batch = HopperBatch(np.random.default_rng(0), [70], heads=40)
    clean = run(batch, workers=1, rows_per_tile=64)
    batch.q = batch.q.at[0, 0, 3, 5].set(jnp.nan)
    for got, expected in zip(run(batch, workers=1, rows_per_tile=64), clean, strict=True):
        assert np.isnan(np.asarray(got, np.float32)[0, 3]).all()
        np.testing.assert_array_equal(got[0, 4:], expected[0, 4:])


def test_the_pass_rule_fails_what_is_wrong():
    batch = HopperBatch(np.random.default_rng(0), [100], heads=16)
    o, lse = run(batch, workers=1, rows_per_tile=16)
    for wrong in ((o.at[0, 3, 7].add(0.02), lse), (o, lse.at[0, 0].add(1e-3))):
        with pytest.raises(AssertionError):
            batch.check(*wrong)
