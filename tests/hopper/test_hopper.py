"""The Hopper kernels under the interpreter and compiled for sm_90a; test_hopper_gpu runs them."""

import dataclasses
import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guards import run_guarded
from hopper_batch import SCALE, HopperBatch, invalid_requests, with_latents_times
from jax.experimental.pallas import mosaic_gpu as plgpu
from sass import overwritten_in_flight

from mla_jax import (
    PagedKVCache,
    available_implementations,
    paged_mla_attention,
    plan_fixed,
    plan_splits,
)
from mla_jax.splits.decode_plan import DecodePlan
from pallas_kernels.hopper import attention, device, planning
from pallas_kernels.hopper.kernels.merge import merge
from pallas_kernels.hopper.parts.combine import row_scales
from pallas_kernels.hopper.tuned import choose_config, config_of_height
from pallas_kernels.hopper.work_items import PARTIAL, work_list

BF16, F16 = jnp.bfloat16, jnp.float16


def run(
    batch, *, workers=None, rows_per_tile=None, plan=None, tiles=None,
    rescale="multiply", causal=True, partial_dtype=None,
):  # fmt: skip
    """The kernels under the interpreter, on a plan for a few workers so that tiles are split.

    The outputs have guards, and numbers of rows vary over the tests: they are rarely whole tiles.
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
        (  # several row tiles of the transposed kernel, a token's heads in two of them
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
    ("seq_lens", "shape", "workers", "rescale", "lost"),
    [
        (  # a short one and a long one for each pair: both workers come to the long one last
            [60, 400],
            {"heads": 41, "num_queries": 2, "query_lens": [2, 1], "dtype": F16},
            4,
            "exponent_add",
            False,
        ),
        ([400], {"heads": 47}, 2, "multiply", True),  # by one of the two
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
def test_pairs_of_workers_interpreted(races, seq_lens, shape, workers, rescale, lost):
    batch = HopperBatch(np.random.default_rng(1), seq_lens, **shape)
    rows = batch.q.shape[1] * batch.q.shape[2]
    rows_per_tile = rows + -rows % 8 if rows <= 32 else 64
    tiles = config_of_height(rows_per_tile, num_tiles=50)
    assert tiles.in_pairs
    plan = plan_splits(
        batch.seq_lens, num_workers=workers, rows=rows, rows_per_tile=rows_per_tile, overhead=1
    )
    shared = work_list(plan, "in_pairs")[1][:, PARTIAL] < -1
    assert shared.sum() == workers  # all of them share a tile with their peer
    if lost:
        last_page = (seq_lens[0] - 1) // batch.cache.page_size
        # (What is read in its place is no NaN.)
        assert jnp.isfinite(batch.cache.pages[0]).all()
        batch.block_tables = batch.block_tables.at[0, last_page].set(batch.cache.num_pages)
    o, lse = run(batch, plan=plan, tiles=tiles, rescale=rescale)
    if lost:
        batch.seq_lens = batch.seq_lens.at[0].set(-1)
    batch.check(o, lse)
    assert not races.found


@pytest.mark.parametrize("lost", [False, True])
def test_a_tile_in_two_pieces_interpreted(races, lost):
    """The worker of the first adds what the other has left, another cluster, in global memory."""
    races.in_global = False
    shape = {"heads": 33, "num_queries": 2, "query_lens": [2, 1, 0], "dtype": F16}
    batch = HopperBatch(np.random.default_rng(2), [20, 450, 0], **shape)
    plan = plan_splits(batch.seq_lens, num_workers=2, rows=66, rows_per_tile=128, overhead=1)
    assert (work_list(plan, "by_first")[1][:, PARTIAL] < -1).sum() == 1
    if lost:
        batch.block_tables = batch.block_tables.at[1, 450 // batch.cache.page_size].set(-1)
    o, lse = run(batch, plan=plan, partial_dtype="float16")
    if lost:
        batch.seq_lens = batch.seq_lens.at[1].set(-1)
    batch.check(o, lse)
    assert not races.found


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1.2e-38, 6e-8, 1.0, 65535.9, 3.4e38])
def test_units_hold_a_row_as_float16(largest):
    largest = np.float32(largest)
    unit, inverse = map(np.float32, row_scales(jnp.float32(largest)))
    assert unit * inverse == 1
    held = np.float16(largest * inverse)
    assert held <= 2**15
    assert held >= 2**14 or largest < 2.0**-112
    assert abs(np.float32(held) * unit - largest) <= largest / 2**11


@pytest.mark.parametrize(
    ("heads", "rows_per_tile", "seq_lens", "widths", "pieces", "factor"),
    [
        (33, 64, [20, 230], {}, 2, 2.0**60),
        (97, 128, [450], {"kv_lora_rank": 128}, 3, 2.0**-60),
    ],
)
def test_pieces_of_any_size_interpreted(
    races, heads, rows_per_tile, seq_lens, widths, pieces, factor
):
    """float16 ends at 65504 and 6e-8: pieces are held in units of powers of two."""
    races.in_global = pieces > 2 or rows_per_tile == 64  # (else in two pieces, see above)
    batch = HopperBatch(np.random.default_rng(heads), seq_lens, heads=heads, **widths)
    options = {"rows": heads, "rows_per_tile": rows_per_tile, "overhead": 1}
    plan = plan_splits(batch.seq_lens, num_workers=3, **options)
    assert plan.tile_partial_start[-1] == pieces
    o, lse = run(with_latents_times(batch, factor), plan=plan)
    batch.check(o / factor, lse)
    assert not races.found


def test_other_pieces_interpreted(races):
    """Of tiles of 64 rows, in three pieces, which a merge finds in bfloat16."""
    batch = HopperBatch(np.random.default_rng(3), [450], heads=63, kv_lora_rank=128)
    options = {"workers": 3, "rows_per_tile": 64, "partial_dtype": "bfloat16"}
    batch.check(*run(batch, **options))
    assert not races.found


@pytest.mark.parametrize(("heads", "rows_per_tile"), [(15, 16), (55, 64)])
def test_pages_of_16_interpreted(heads, rows_per_tile):
    """(The race detector follows one TMA copy a barrier phase only: not asked here.)"""
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
    """What it does not cover, or would read past the end, is NaN; the rest is right."""
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
def test_merges_tiles_in_two_pieces_and_in_many(races, rows, ctas, width, fixed):
    """One long request among short ones: NaN in slots of no piece, -inf for a piece of no key."""
    rng = np.random.default_rng(rows + ctas)
    lens = jnp.array([64 * 70, 0, 64, 64 * 6, 128], jnp.int32)
    sizes = {"rows": rows * ctas, "rows_per_tile": rows * ctas, "num_workers": 18, "overhead": 1}
    if fixed:
        plan = plan_fixed(lens, split_size=192, max_seq_len=64 * 70, **sizes)
    else:
        plan = plan_splits(lens, **sizes)
    starts = np.asarray(plan.tile_partial_start)
    pieces = np.diff(starts)
    assert pieces.max() > 8
    assert 2 in pieces
    partial_lse = rng.standard_normal((plan.num_partials, ctas * rows)).astype(np.float32) * 3
    partial_lse[0, 3] = -np.inf
    partial_o = rng.standard_normal((plan.num_partials, ctas * rows, width)).astype(np.float32)
    partial_o[0, 3] = 0.0
    partial_lse[starts[-1] :], partial_o[starts[-1] :] = np.nan, np.nan
    left = partial_o
    if rows == 64:  # as decode leaves it: blocks of 64 x 8 in the order of its registers
        left = partial_o.reshape(-1, ctas, 64, width // 8, 8).swapaxes(2, 3)
        left = left.reshape(-1, ctas, width // 8, 512)

    @jax.jit
    def run_merge(o, lse):
        o, lse = jax.new_ref(o), jax.new_ref(lse)
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        partials = jnp.asarray(left), jnp.asarray(partial_lse)
        merge(o, lse, partials, plan, work_list(plan), num_rows=ctas * rows, interpret=interpret)
        return o[...], lse[...]

    shape = (5, ctas * rows, width)
    o, lse = run_merge(jnp.full(shape, 7.0), jnp.full(shape[:2], 7.0))
    for tile, (first, count) in enumerate(zip(starts, pieces, strict=False)):
        if not count:
            assert (o[tile] == 7).all()
            assert (lse[tile] == 7).all()
            continue
        part = partial_lse[first : first + count].astype(np.float64)
        top = part.max(axis=0)
        weights = np.exp(part - top)
        wanted = (weights[..., None] * partial_o[first : first + count]).sum(axis=0)
        wanted /= weights.sum(axis=0)[:, None]
        np.testing.assert_allclose(o[tile], wanted, rtol=2e-5, atol=2e-6)
        wanted_lse = top + np.log(weights.sum(axis=0))
        np.testing.assert_allclose(lse[tile], wanted_lse, rtol=1e-6, atol=1e-6)
    assert not races.found


def test_a_query_of_nan_is_its_own_affair_interpreted():
    batch = HopperBatch(np.random.default_rng(0), [70], heads=40)
    clean = run(batch, workers=1, rows_per_tile=64)
    batch.q = batch.q.at[0, 0, 3, 5].set(jnp.nan)
    for got, wanted in zip(run(batch, workers=1, rows_per_tile=64), clean, strict=True):
        assert np.isnan(np.asarray(got, np.float32)[0, 3]).all()
        np.testing.assert_array_equal(got[0, 4:], wanted[0, 4:])


def test_the_pass_rule_fails_what_is_wrong():
    batch = HopperBatch(np.random.default_rng(0), [100], heads=16)
    o, lse = run(batch, workers=1, rows_per_tile=16)
    for wrong in ((o.at[0, 3, 7].add(0.02), lse), (o, lse.at[0, 0].add(1e-3))):
        with pytest.raises(AssertionError):
            batch.check(*wrong)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "page_size", "dtype", "rescale", "widths"),
    [
        (5, 16, 1, 64, BF16, "multiply", (512, 64)),
        (5, 5, 1, 16, F16, "multiply", (512, 64)),
        (40, 24, 1, 64, BF16, "multiply", (384, 128)),
        (40, 32, 1, 64, BF16, "multiply", (512, 64)),  # in pairs
        (40, 7, 3, 1, F16, "multiply", (512, 64)),  # in pairs
        (5, 64, 1, 64, BF16, "multiply", (512, 64)),
        (5, 64, 1, 16, F16, "exponent_add", (512, 64)),
        (5, 41, 1, 1, BF16, "multiply", (512, 64)),
        (5, 128, 1, 64, F16, "multiply", (512, 64)),
        (5, 43, 3, 16, BF16, "exponent_add", (512, 64)),
        (5, 48, 2, 1, BF16, "multiply", (512, 64)),
    ],
)
def test_compiles_for_sm90a(h200, batch, heads, tokens, page_size, dtype, rescale, widths):
    """Nothing serialised, ignored or spilled, within the chip's shared memory."""
    kv_lora_rank, rope_dim = widths

    def attend(*args):
        return attention.attend(
            *args,
            num_heads=heads,
            kv_lora_rank=kv_lora_rank,
            softmax_scale=SCALE,
            causal=True,
            rescale=rescale,
        )

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    plan_decode = functools.partial(
        planning.plan_decode,
        rows=tokens * heads,
        capacity=5003 * page_size,
        rescale=rescale,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
    )
    reports = aot.compile_sm90a(
        attend,
        jax.ShapeDtypeStruct((batch, tokens * heads, sum(widths)), dtype),
        jax.ShapeDtypeStruct((1000, page_size, sum(widths)), dtype),  # (powers of two are easier)
        ints(batch, 5003),
        ints(batch),
        ints(batch),
        jax.eval_shape(plan_decode, ints(batch)),
    )
    (report,) = reports  # the merge is in the decode launch
    assert not report.serialized, report.messages
    assert not report.ignores_setmaxnreg, report.messages
    assert not report.misuses_setmaxnreg
    # A config's bytes are those that the compiler takes.
    config = choose_config(
        tokens * heads, batch=batch, rescale=rescale, kv_lora_rank=kv_lora_rank, rope_dim=rope_dim
    )
    assert report.shared_memory == config.shared_memory_bytes <= 232_448
    assert report.registers <= 255
    assert report.spill_stores == report.spill_loads == 0, report
    if report.sass is not None:
        assert "HGMMA" in report.sass
        assert overwritten_in_flight(report.sass) == []


@pytest.mark.parametrize(("sms", "launches"), [(0, 2), (114, 2), (132, 1)])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_workers_wait_only_where_all_run_at_once(monkeypatch, heads, sms, launches):
    """Where a card is not known to have an SM for each CTA, the merge is a launch of its own."""
    monkeypatch.setattr(device, "resident_ctas", lambda: sms)
    monkeypatch.setattr(device, "num_sms", lambda: 132)  # when the plan was made
    batch = HopperBatch(np.random.default_rng(0), [300, 70], heads=heads)
    plan = planning.plan_decode(batch.seq_lens, heads)
    assert plan.split.num_workers * plan.tiles.ctas_per_tile == plan.num_sms == 132
    kernel = functools.partial(
        attention.attend.__wrapped__,
        num_heads=heads,
        kv_lora_rank=512,
        softmax_scale=SCALE,
        causal=True,
    )
    traced = jax.make_jaxpr(kernel)(
        batch.q[:, 0], batch.cache.pages, batch.block_tables, batch.seq_lens, None, plan
    )
    assert str(traced).count("mpmd_map[") == launches


def test_without_a_gpu_it_says_so():
    assert "compute capability 9.0" in available_implementations()["hopper"]
    batch = HopperBatch(np.random.default_rng(0), [64], heads=16)
    with pytest.raises(ValueError, match=r"hopper.*compute capability 9\.0"):
        paged_mla_attention(
            batch.q, batch.cache, batch.block_tables, batch.seq_lens,
            softmax_scale=SCALE, implementation="hopper",
        )  # fmt: skip


def test_refusals_name_what_it_takes():
    any_plan = plan_splits(jnp.ones(2, jnp.int32), num_workers=2, rows=8)

    def reason(q_dtype=BF16, rescale="multiply", rows_per_tile=None, page_size=64, **cache):
        plan = rows_per_tile and DecodePlan(
            dataclasses.replace(any_plan, rows_per_tile=rows_per_tile)
        )
        cache = dataclasses.replace(PagedKVCache.create(2, **cache), page_size=page_size)
        return planning.refuses(q_dtype, cache, rescale, plan)

    for good in (
        {}, {"page_size": 16, "rescale": "exponent_add"}, {"q_dtype": F16, "dtype": F16},
        {"page_size": 1}, {"kv_lora_rank": 256}, {"kv_lora_rank": 384, "rope_dim": 128},
        {"rows_per_tile": 128}, {"dtype": "int8"}, {"dtype": "int8", "page_size": 128},
        {"dtype": "int8", "rows_per_tile": 64},
    ):  # fmt: skip
        assert reason(**good) is None
    for bad, words in (
        ({"q_dtype": F16}, "both bfloat16 or both float16, got float16 and bfloat16"),
        ({"layout": "NZ"}, "layout ND, got NZ"),
        ({"page_size": 256}, "sizes 1, 2, 4, 8, 16, 32, 64, 128 of a cache of float, got 256"),
        ({"kv_lora_rank": 320}, "kv_lora_rank = 320, wanted a multiple of 128 up to 512"),
        ({"rope_dim": 32}, "rope_dim = 32, wanted a multiple of 64"),
        ({"rope_dim": 128}, "shared"),
        ({"dtype": "int8", "kv_lora_rank": 256}, "kv_lora_rank = 256, wanted 512"),
        ({"rows_per_tile": 96}, "rows_per_tile 8, 16, 24, 32, 64, 128, got 64 and 96"),
        ({"rows_per_tile": 8, "rescale": "exponent_add"}, "rows_per_tile 64, 128, got 64 and 8"),
        ({"dtype": "int8", "q_dtype": F16}, "over an int8 cache it takes q bfloat16, got float16"),
        ({"dtype": "int8", "scale_granularity": "group"}, "scales per token, got 'group'"),
        ({"dtype": "int8", "scale_granularity": "tensor", "scale": 0.1}, "per token, got 'tensor'"),
        ({"dtype": "int8", "rescale": "exponent_add"}, "rescale 'multiply', got 'exponent_add'"),
        ({"dtype": "int8", "layout": "NZ"}, "layout ND, got NZ"),
        ({"dtype": "int8", "page_size": 16}, "page sizes 64, 128 of a cache of int8, got 16"),
        (
            {"dtype": "int8", "rows_per_tile": 128},
            "rows_per_tile 8, 16, 24, 32, 64, got 64 and 128",
        ),
    ):
        assert words in reason(**bad), bad
