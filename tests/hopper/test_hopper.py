"""The Hopper kernels over a float cache in the interpreter. test_hopper_gpu.py runs them.

To trace, lower and compile an interpreted program takes most of a test's time. So tests share
programs, whose shapes and static options are named here.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from even_plan import even_plan, kept_items
from guards import run_guarded
from hopper_batch import SCALE, HopperBatch, invalid_requests, set_invalid, with_latents_times
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import plan_fixed
from pallas_kernels.hopper import attention
from pallas_kernels.hopper.kernels.merge import merge
from pallas_kernels.hopper.parts.combine import row_scales
from pallas_kernels.hopper.tuned import config_of_height
from pallas_kernels.hopper.work_items import work_list

F16 = jnp.float16
# The shape of a batch, then the options of the kernel. Most numbers of rows are not whole tiles.
TRANSPOSED = (  # two row tiles, which share a token's heads
    {"heads": 9, "num_queries": 2, "requests": 6, "kv_lora_rank": 384, "rope_dim": 128},
    {"rows_per_tile": 16, "partial_dtype": "float16"},
)
GATHERED = (
    {"heads": 24, "num_queries": 2, "requests": 6, "page_size": 8, "kv_lora_rank": 128},
    {"rows_per_tile": 64, "apart": True},
)
TRANSPOSED_GATHERED_IN_PAIRS = (
    {"heads": 11, "num_queries": 2, "dtype": F16, "requests": 4, "page_size": 1},
    {"rows_per_tile": 24, "tiles": config_of_height(24, num_tiles=50), "apart": True},
)
EXPONENT_ADD = (  # row tiles of tokens 0 .. 2, 2 .. 4 and 4, partials of float32
    {"heads": 31, "num_queries": 5, "dtype": F16, "kv_lora_rank": 128},
    {"rows_per_tile": 64, "rescale": "exponent_add"},
)
TWO_CTAS = {"heads": 33, "num_queries": 2, "requests": 3}, {"rows_per_tile": 128}
# The second tile has two rows, fewer than one warpgroup.
TWO_ROWS_LEFT = {"heads": 65, "num_queries": 2, "requests": 2}, {"rows_per_tile": 128}


def drawn(seed, seq_lens, program, **options):
    """Returns a random batch for a program, and the options of `run`."""
    shape, static = program
    queries = options.pop("query_lens", None)
    batch = HopperBatch(np.random.default_rng(seed), seq_lens, query_lens=queries, **shape)
    return batch, static | options


def plan_for(batch, *, workers, rows_per_tile, seq_lens=None, hides=False, **_):
    """Returns a plan for few workers, so that tiles are split. seq_lens: None, the batch's.

    hides: whether it leaves out hidden blocks.
    """
    seq_lens = batch.seq_lens if seq_lens is None else jnp.asarray(seq_lens, jnp.int32)
    rows = batch.q.shape[1] * batch.q.shape[2]
    hidden = {"query_lens": np.asarray(batch.query_lens), "num_heads": batch.q.shape[2]}
    sizes = {"rows": rows, "rows_per_tile": rows_per_tile} | (hidden if hides else {})
    return even_plan(seq_lens, workers=workers, **sizes)


def run(batch, *, tiles=None, rescale="multiply", partial_dtype=None, apart=False, **planned):
    """Runs the kernels in the interpreter, on `plan_for(batch, **planned)`; outputs have guards.

    apart: whether the latent part and the rope part of q are arrays of their own.
    """
    requests, tokens, heads, width = batch.q.shape
    q, rank = np.asarray(batch.q).reshape(requests, tokens * heads, width), batch.cache.kv_lora_rank
    return run_guarded(
        attention.attend,
        (q[..., :rank], q[..., rank:]) if apart else q,
        batch.cache.pages,
        batch.block_tables,
        batch.seq_lens,
        batch.query_lens,
        plan_for(batch, **planned),
        num_heads=heads,
        kv_lora_rank=batch.cache.kv_lora_rank,
        softmax_scale=SCALE,
        causal=True,
        rescale=rescale,
        partial_dtype=partial_dtype,
        tiles=tiles,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )


@pytest.mark.parametrize(
    ("seq_lens", "program", "options"),
    [
        ([70, 0, 200, -1, 65, 1], TRANSPOSED, {"workers": 3, "query_lens": [2, 0, 1, 0, 2, 1]}),
        ([330, -1, 0, 20], GATHERED, {"workers": 2}),
        ([20, 260], TWO_ROWS_LEFT, {"workers": 3}),  # split, and whole
    ],
)
def test_interpreted(races, seq_lens, program, options):
    """From block to block, maxima of every other head rise by more than they may lag."""
    batch, options = drawn(seq_lens[0], seq_lens, program, **options)
    batch.q = np.array(batch.q)
    batch.q[:, :, ::2] *= 8
    batch.check(*run(batch, **options))
    assert not races.found


@pytest.mark.parametrize(
    ("seq_lens", "query_lens", "program", "workers", "invalid_page"),
    [
        # A short and a long request per pair, whose workers both run the long one last.
        ([60, 400, 60, 400], [2, 1, 0, 2], GATHERED, 4, False),
        ([60, 400, 60, 400], [2, 1, 0, 2], TRANSPOSED_GATHERED_IN_PAIRS, 4, False),
        # One of the two workers has the invalid page.
        ([200], None, TRANSPOSED_GATHERED_IN_PAIRS, 2, True),
        ([330], None, GATHERED, 2, True),
    ],
)
def test_pairs_of_workers_interpreted(races, seq_lens, query_lens, program, workers, invalid_page):
    batch, options = drawn(1, seq_lens, program, workers=workers, query_lens=query_lens)
    tiles = options.get("tiles") or config_of_height(options["rows_per_tile"])
    assert tiles.in_pairs
    # Each worker shares a tile with the other CTA.
    assert kept_items(plan_for(batch, **options), "in_pairs") == workers
    if invalid_page:
        # Page 0 is read in its place. It has no NaN, so that nothing but the page's id is wrong.
        pages = np.array(batch.cache.pages)
        pages[0] = np.nan_to_num(pages[0].astype(np.float32))
        batch.cache = dataclasses.replace(batch.cache, pages=jnp.asarray(pages))
        set_page(batch, 0, (seq_lens[0] - 1) // batch.cache.page_size, batch.cache.num_pages)
    o, lse = run(batch, **options)
    if invalid_page:
        set_invalid(batch, slice(0, 1))
    batch.check(o, lse)
    assert not races.found


def test_tiles_without_hidden_blocks_interpreted(races):
    """Tiles of a request have 1, 2 and 2 blocks, or none if all their tokens are padding.

    O is rescaled by integer adds, for every other head often: from block to block its maximum
    rises by more than it may lag.
    """
    lens, queries = [66, 200, 3, 130], [5, 2, 0, 5]
    batch, options = drawn(66, lens, EXPONENT_ADD, query_lens=queries, workers=4, hides=True)
    batch.q = np.array(batch.q)
    batch.q[:, :, ::2] *= 8
    plan = plan_for(batch, **options)
    blocks = np.zeros((3, 4), np.int32)
    np.add.at(blocks, (plan.row_tile, plan.request), plan.block_end - plan.block_start)
    np.testing.assert_array_equal(blocks, [[1, 4, 0, 2], [2, 0, 0, 3], [2, 0, 0, 3]])
    assert plan.tile_partial_start[-1] > 0
    assert kept_items(plan, "in_pairs") > 0
    batch.check(*run(batch, **options))

    # A request is invalid as a whole. The first tile of request 0 does not read its invalid page,
    # and the first tile of request 3 has as many blocks as the plan for 127 keys gives it.
    invalid = copy.copy(batch)
    set_page(invalid, 0, 1, batch.cache.num_pages)
    o, lse = run(invalid, **options | {"seq_lens": [66, 200, 3, 127]})
    for request in (0, 3):
        set_invalid(invalid, slice(request, request + 1))
    invalid.check(o, lse)
    assert not races.found


def set_page(batch, request, place, page):
    tables = np.array(batch.block_tables)
    tables[request, place] = page
    batch.block_tables = jnp.asarray(tables)


@pytest.mark.parametrize("invalid_page", [False, True])
def test_a_tile_in_two_work_items_interpreted(races, invalid_page):
    """The cluster of the first item adds the partial that another cluster has stored."""
    races.in_global = False
    batch, options = drawn(2, [20, 260, 0], TWO_CTAS, workers=2, query_lens=[2, 1, 0])
    assert kept_items(plan_for(batch, **options), "by_first") == 1
    if invalid_page:
        set_page(batch, 1, 260 // batch.cache.page_size, -1)
    o, lse = run(batch, **options)
    if invalid_page:
        set_invalid(batch, slice(1, 2))
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
    ("seq_lens", "program", "workers", "partials", "factor"),
    [
        ([120, 230], GATHERED, 4, 2, 2.0**60),  # not by the workers of one pair
        ([260], TWO_CTAS, 3, 3, 2.0**-60),
    ],
)
def test_partials_of_any_size_interpreted(races, seq_lens, program, workers, partials, factor):
    """float16 ends at 65504 and 6e-8, so partials have a power-of-two scale per row."""
    batch, options = drawn(33, seq_lens, program, workers=workers)
    plan = plan_for(batch, **options)
    assert plan.tile_partial_start[-1] == partials
    finish = "in_pairs" if options["rows_per_tile"] == 64 else "by_first"
    assert kept_items(plan, finish) == 0
    o, lse = run(with_latents_times(batch, factor), **options)
    batch.check(np.asarray(o, np.float64) / factor, lse)
    assert not races.found


@pytest.mark.parametrize("program", [TRANSPOSED, GATHERED])
def test_a_plan_for_other_lengths_interpreted(races, program):
    """Tiles that the plan does not cover, or for which it reads past the end, are NaN."""
    batch, options = drawn(16, [200, 130, 64, 0], program, workers=2)
    o, lse = run(batch, seq_lens=[200, 64, 65, 1, 0, 0], **options)
    set_invalid(batch, slice(1, 4))
    batch.check(o, lse)
    assert not races.found


def test_finds_invalid_requests_interpreted(races):
    shape, options = GATHERED
    batch, expected = invalid_requests(**shape)
    o, lse = run(batch, workers=3, **options)
    expected.check(o, lse)
    assert not races.found


@pytest.mark.parametrize(
    ("rows", "ctas", "width", "fixed"), [(16, 1, 128, False), (64, 2, 64, True)]
)
def test_merges_tiles_of_two_partials_and_of_many(races, rows, ctas, width, fixed):
    """Unused partials are NaN, and one partial has a row that sees no key."""
    rng = np.random.default_rng(rows + ctas)
    lens = np.array([64 * 40, 0, 64, 64 * 6, 128], np.int32)
    sizes = {"rows": rows * ctas, "rows_per_tile": rows * ctas}
    if fixed:
        sizes |= {"split_size": 192, "max_seq_len": 64 * 40}
        plan = plan_fixed(lens, num_workers=18, overhead=1, **sizes)
    else:
        plan = even_plan(lens, workers=12, most_workers=12, **sizes)
    plan = jax.tree.map(jnp.asarray, plan)
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
    outputs = np.full(shape, 7.0, np.float32), np.full(shape[:2], 7.0, np.float32)
    o, lse = map(np.asarray, run_merge(*outputs))
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
    batch, options = drawn(0, [70], GATHERED, workers=1)
    clean = batch.q
    batch.q = np.array(clean)
    batch.q[0, 0, 3, 5] = np.nan
    o, lse = map(np.array, run(batch, **options))
    assert np.isnan(o[0, 3].astype(np.float32)).all()
    assert np.isnan(lse[0, 3])
    batch.q = clean
    o[0, 3], lse[0, 3] = (x[0, 0, 3] for x in batch.reference())
    batch.check(o, lse)


@pytest.mark.parametrize("program", [TRANSPOSED, GATHERED])
def test_a_nan_reaches_only_the_rows_that_may_see_it_interpreted(program):
    """The last key of two requests is NaN. Only the last of two query tokens may see it."""
    lengths, heads = [70, 200], program[0]["heads"]
    batch, options = drawn(1, lengths, program, workers=2)
    clean, pages = batch.cache, np.array(batch.cache.pages)
    for table, length in zip(np.asarray(batch.block_tables), lengths, strict=False):
        pages[table[(length - 1) // clean.page_size], (length - 1) % clean.page_size] = np.nan
    batch.cache = dataclasses.replace(clean, pages=jnp.asarray(pages))
    o, lse = map(np.array, run(batch, **options))
    batch.cache = clean
    for found, expected in zip((o, lse), batch.reference(), strict=True):
        assert np.isnan(found[:2, heads:].astype(np.float32)).all()
        found[:2, heads:] = expected[:2, 1]
    batch.check(o, lse)


def test_the_pass_rule_fails_what_is_wrong():
    batch, options = drawn(0, [100], TRANSPOSED, workers=1)
    o, lse = run(batch, **options)
    batch.check(o, lse)
    for array, where, error in ((o, (0, 3, 7), 0.02), (lse, (0, 0), 1e-3)):
        wrong = array.copy()
        wrong[where] += error
        with pytest.raises(AssertionError):
            batch.check(*(wrong if x is array else x for x in (o, lse)))
