"""The Hopper kernels over an int8 cache: interpreted, compiled for sm_90a, and on an H200."""

import dataclasses
import functools
from typing import Any

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from even_plan import MOST_WORKERS, even_plan
from hopper_batch import SCALE, SPOILED_LENGTHS, op, set_invalid, spoiled
from int8_batch import Int8Batch
from jax.experimental.pallas import mosaic_gpu as plgpu
from sass import overwritten_in_flight

from mla_jax import plan_fixed
from mla_jax.hal import load_profile
from pallas_kernels.hopper import attention, planning
from pallas_kernels.hopper.config import DecodeInt8Config, DecodeTransposedInt8Config, SmLimits
from pallas_kernels.hopper.tuned import choose_config

LIMITS = SmLimits.of(load_profile("H200_SXM"))


def tiles(**options):
    return DecodeTransposedInt8Config(limits=LIMITS, **options)


def split(batch, workers, rows_per_tile, seq_lens=None):
    seq_lens = batch.seq_lens if seq_lens is None else seq_lens
    rows = batch.q.shape[1] * batch.q.shape[2]
    return even_plan(
        seq_lens, workers=workers, rows=rows, rows_per_tile=rows_per_tile,
        most_workers=max(workers, MOST_WORKERS),
    )  # fmt: skip


def interpreted(batch, workers, rows_per_tile, seq_lens=None, **options):
    """Runs a batch in the interpreter, on a plan for these lengths; None: its own."""
    plan = split(batch, workers, rows_per_tile, seq_lens)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return batch.attend(plan, interpret=interpret, **options)


# Shapes of batches, each of which has a program that several tests run, and the options of
# `interpreted`. The kernel of 16 rows has two warpgroups that compute and two that quantize q.
# A kernel of 24 rows has one of each. It is compiled here, and runs on a GPU.
SIXTEEN = (  # two row tiles
    {"heads": 9, "num_queries": 2, "requests": 4},
    {"rows_per_tile": 16, "partial_dtype": "bfloat16"},
)
SIXTY_FOUR = (
    {"heads": 24, "num_queries": 2, "requests": 6, "page_size": 128},
    {"rows_per_tile": 64, "apart": True},
)


@pytest.mark.parametrize(
    ("seq_lens", "program", "query_lens"),
    [
        ([400, 0, -1, 3], SIXTEEN, None),
        ([270, -1, 0, 0, 0, 20], SIXTY_FOUR, [2, 0, 0, 0, 0, 1]),
    ],
)
def test_interpreted(races, seq_lens, program, query_lens):
    shape, options = program
    rng = np.random.default_rng(seq_lens[0])
    batch = Int8Batch(rng, seq_lens, query_lens=query_lens, **shape)
    batch.check(*interpreted(batch, 2, **options))
    assert not races.found


def rising_batch(rising: float, **shape: Any) -> Int8Batch:
    """Returns three requests. In the second, and for every fifth head, rope keys hardly count."""
    batch = Int8Batch(np.random.default_rng(0), [330, 70, 130], rising=rising, **shape)
    q = np.array(batch.q)
    for calm in (np.s_[1, ..., 512:], np.s_[:, :, ::5, 512:]):
        q[calm] *= np.asarray(2.0**-6, q.dtype)
    batch.q = jnp.asarray(q)
    batch.expected_q = np.asarray(q, np.float64)
    return batch


def rises(batch: Int8Batch, request: int) -> np.ndarray:
    """Returns how far the largest score of each block is above those of all blocks before.

    The result is [blocks - 1, heads] in log2 units, for blocks of 64 tokens from the second on.
    """
    scores = batch.expected_q[request, 0] @ batch.kv[request].T * SCALE / np.log(2)
    tops = np.array([scores[:, i : i + 64].max(axis=1) for i in range(0, scores.shape[1], 64)])
    return tops[1:] - np.maximum.accumulate(tops)[:-1]


@pytest.mark.parametrize("rising", [3.0, 40.0])
def test_maxima_that_rise_interpreted(races, rising):
    """The maxima of some rows rise in several blocks of a work item.

    With the larger factor they rise so far that the kernel of 64 rows repeats some work items.
    """
    shape, options = SIXTY_FOUR
    batch = rising_batch(rising, **shape)
    often = (rises(batch, 0) > 8).sum(axis=0)
    assert often.min() == 0
    assert often.max() > 1
    above_first = np.cumsum(rises(batch, 0).clip(0), axis=0)
    assert (above_first > 128).any() == (rising > 3)  # float32 does not hold 2^128
    assert (rises(batch, 1) < 8).all()
    batch.check(*interpreted(batch, 2, **options))
    assert not races.found


def test_any_q_interpreted(races):
    shape, options = SIXTY_FOUR
    batch = Int8Batch(np.random.default_rng(64), [1, 70], exact=False, **shape)
    batch.check(*interpreted(batch, 2, **options))
    assert not races.found


@pytest.mark.parametrize("program", [SIXTEEN, SIXTY_FOUR])
def test_a_plan_for_other_lengths_interpreted(races, program):
    """Tiles that the plan does not cover, or for which it reads past the end, are NaN."""
    shape, options = program
    batch = Int8Batch(np.random.default_rng(16), [200, 130, 64, 0], **shape)
    planned = [200, 64, 65, 1] + [0] * (shape["requests"] - 4)
    o, lse = interpreted(batch, 2, seq_lens=planned, **options)
    set_invalid(batch, slice(1, 4))
    batch.check(o, lse)
    assert not races.found


def invalid_requests(heads, **shape):
    rng = np.random.default_rng(heads)
    return spoiled(Int8Batch(rng, SPOILED_LENGTHS, **{"heads": heads, "num_queries": 2} | shape))


def test_finds_invalid_requests_interpreted(races):
    shape, options = SIXTY_FOUR
    batch, expected = invalid_requests(**shape)
    expected.check(*interpreted(batch, 3, **options))
    assert not races.found


@pytest.mark.parametrize(("program", "bad"), [(SIXTEEN, np.inf), (SIXTY_FOUR, np.nan)])
def test_a_query_that_is_not_finite_changes_no_other_row_interpreted(program, bad):
    """One row of a token has a NaN, and padding may hold anything."""
    shape, options = program
    batch = Int8Batch(np.random.default_rng(0), [70], query_lens=[1], **shape)
    q = np.array(batch.q)
    q[0, 1] = bad
    q[0, 0, 3, 5] = np.nan
    batch.q = q
    o, lse = map(np.array, interpreted(batch, 1, **options))
    assert np.isnan(o[0, 3].astype(np.float32)).all()
    assert np.isnan(lse[0, 3])
    right = batch.reference(0, causal=True)
    o[0, 3], lse[0, 3] = (x[0, 3] for x in right)
    batch.check(o, lse)


@pytest.mark.parametrize("program", [SIXTEEN, SIXTY_FOUR])
def test_a_nan_reaches_only_the_rows_that_may_see_it_interpreted(program):
    """The scale of the last key is NaN. Only the last of two query tokens may see it."""
    (shape, options), length = program, 70
    batch = Int8Batch(np.random.default_rng(1), [length], **shape)
    scales, size = np.array(batch.cache.scales), batch.cache.page_size
    page = np.asarray(batch.block_tables)[0, (length - 1) // size]
    scales[page, (length - 1) % size] = np.nan
    batch.cache = dataclasses.replace(batch.cache, scales=jnp.asarray(scales))
    o, lse = map(np.array, interpreted(batch, 1, **options))
    for found, expected in zip((o, lse), batch.reference(0, causal=True), strict=True):
        assert np.isnan(found[0, batch.heads :].astype(np.float32)).all()
        found[0, batch.heads :] = expected[1]
    batch.check(o, lse)


def test_blocks_whose_scores_are_all_minus_infinity_interpreted(races):
    """No key of the first block counts. Later scores are far below 0, which is no maximum."""
    shape, options = SIXTY_FOUR
    batch = Int8Batch(np.random.default_rng(0), [200, 150], **shape)
    q, rope = np.array(batch.q), np.array(batch.cache.rope_pages)
    q[..., 515] = 10
    batch.q, batch.expected_q = jnp.asarray(q), np.asarray(q, np.float64)
    size = batch.cache.page_size
    for table, keys in zip(np.asarray(batch.block_tables), batch.kv, strict=True):
        for t in range(len(keys)):
            low = -np.inf if t < 64 else -200.0
            keys[t, 515] = rope[table[t // size], t % size, 3] = low
    batch.cache = dataclasses.replace(batch.cache, rope_pages=jnp.asarray(rope))
    batch.check(*interpreted(batch, 2, **options))
    assert not races.found


def test_the_check_fails_what_is_wrong():
    shape, options = SIXTEEN
    batch = Int8Batch(np.random.default_rng(0), [65], **shape)
    o, lse = interpreted(batch, 1, **options)
    batch.check(o, lse)
    for array, where, error in ((o, (0, 3, 7), 0.02), (lse, (0, 0), 1e-3)):
        wrong = array.copy()
        wrong[where] += error
        with pytest.raises(AssertionError):
            batch.check(*(wrong if x is array else x for x in (o, lse)))


# ----------------------------------------------------------------------- compiled for sm_90a


def test_overwritten_registers_are_found():
    code = """
    -:-:-:Y:03   /*00*/   HGMMA.64x16x16.F32.BF16 R96, R124, gdesc[UR20], R96, gsb0
    -:-:-:Y:03   /*10*/   HGMMA.64x16x16.F32.BF16 R88, R36, gdesc[UR20], R88, gsb0
    -:-:-:-:02   /*20*/   WARPGROUP.DEPBAR.LE gsb0, 0x1
    -:-:1:Y:01   /*30*/   {}
    """
    for writes in ("LDSM.16.MT88.4 R33, [R4+UR17]", "@!P1 LOP3.LUT R39, R24, 0xff, RZ, 0xc0, !PT"):
        assert len(overwritten_in_flight(code.format(writes))) == 1
    for fine in ("LDSM.16.MT88.4 R32, [R36+UR17]", "SHFL.BFLY PT, R124, R36, 0x4, 0x1f"):
        assert overwritten_in_flight(code.format(fine)) == []


@pytest.mark.parametrize(
    ("heads", "tokens", "requests"),
    [
        (16, 2, 4), (128, 1, 1),  # a kernel each
        *(aot.on_gpu_machines(*case) for case in ((15, 1, 4), (32, 2, 4), (64, 1, 4), (75, 1, 4))),
    ],
)  # fmt: skip
def test_compiles_for_sm90a(h200, heads, tokens, requests):
    """No product is serialized, no register spilled, and operand A stays in its registers.

    With fewer tiles, more partials of a tile are merged at once, which takes registers too.
    """

    def attend(*args):
        return attention.attend_int8(*args, num_heads=heads, softmax_scale=SCALE, causal=True)

    def struct(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    plan_decode = functools.partial(
        planning.plan_decode, rows=tokens * heads, capacity=4096 // requests * 64, cache="int8",
        num_heads=heads,
    )  # fmt: skip
    decode = aot.compile_sm90a(
        attend,
        struct((requests, tokens * heads, 576), jnp.bfloat16),
        struct((64, 64, 512), jnp.int8),
        struct((64, 64, 64), jnp.bfloat16),
        struct((64, 64), jnp.float32),
        struct((requests, 4096 // requests)),
        struct((requests,)),
        struct((requests,)),
        jax.eval_shape(plan_decode, struct((requests,)), query_lens=struct((requests,))),
    )[0]
    assert not decode.serialized, decode.messages
    assert not decode.ignores_setmaxnreg, decode.messages
    assert not decode.misuses_setmaxnreg
    # A config's bytes are those that the compiler takes.
    config = choose_config(tokens * heads, cache="int8")
    assert decode.shared_memory == config.shared_memory_bytes <= 232_448
    assert decode.registers <= 255
    assert decode.spill_stores == decode.spill_loads == 0
    if decode.sass is not None:
        assert "IGMMA" in decode.sass
        assert overwritten_in_flight(decode.sass) == []


# -------------------------------------------------------------------- GPU tests

LENGTHS = [1, 63, 64, 65, 20, 140, 0, -1, 4096, 777]


@pytest.mark.gpu
@pytest.mark.parametrize("seq_lens", [[0], [4100], [70, 0, -1, 300]])
def test_few_tokens_on_the_gpu(seq_lens):
    batch = Int8Batch(np.random.default_rng(0), seq_lens, heads=64)
    batch.check(*op(batch, few_tokens=True))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 5, 8, 16, 24, 32, 40, 64, 80, 128])
@pytest.mark.parametrize("page_size", [64, 128])
def test_heads_on_the_gpu(heads, page_size):
    batch = Int8Batch(np.random.default_rng(heads), LENGTHS, heads=heads, page_size=page_size)
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("rising", [3.0, 40.0])
@pytest.mark.parametrize("heads", [16, 64])
def test_maxima_that_rise_on_the_gpu(heads, rising):
    batch = rising_batch(rising, heads=heads)
    for workers in (1, 4):  # several work items in turn, and split tiles
        batch.check(*batch.attend(split(batch, workers, heads)))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 64, 128])
def test_any_q_on_the_gpu(heads):
    batch = Int8Batch(np.random.default_rng(heads), LENGTHS, heads=heads, exact=False)
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "num_queries"), [(16, 2), (8, 2), (16, 4), (64, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_several_tokens_on_the_gpu(heads, num_queries, causal):
    rng = np.random.default_rng(num_queries)
    lens = [length if length > 4 else 0 for length in LENGTHS]
    queries = [min(length, int(rng.integers(1, num_queries + 1))) for length in lens]
    batch = Int8Batch(rng, lens, heads=heads, num_queries=num_queries, query_lens=queries)
    batch.check(*op(batch, causal=causal), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_chunks_on_the_gpu(heads):
    """Most tiles have fewer blocks than their request, and those of padding have none."""
    rng = np.random.default_rng(heads)
    queries = [130, 5, 70, 0]
    batch = Int8Batch(rng, [700, 130, 70, 64], heads=heads, num_queries=130, query_lens=queries)
    batch.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plan",
    [  # (made where tests are collected, so that one that does not fit fails on any machine)
        tiles(rows_per_tile=16, computing=1),
        tiles(rows_per_tile=16, computing=1, kv_stages=3),
        tiles(rows_per_tile=16, computing=2, kv_stages=2),
    ],
)
def test_sizes_on_the_gpu(plan):
    batch = Int8Batch(np.random.default_rng(0), LENGTHS, heads=16)
    batch.check(*batch.attend(tiles=plan, partial_dtype="bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plan",
    [DecodeInt8Config(limits=LIMITS, rows_per_tile=64, kv_stages=2)],
)
def test_sizes_of_64_rows_on_the_gpu(plan):
    batch = Int8Batch(np.random.default_rng(0), LENGTHS, heads=64)
    batch.check(*batch.attend(tiles=plan, partial_dtype="bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [8, 24, 64])
def test_finds_invalid_requests_on_the_gpu(heads):
    batch, expected = invalid_requests(heads)
    expected.check(*op(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64])
def test_more_workers_than_sms_on_the_gpu(heads):
    """The workers can't wait for each other, so the merge is a launch of its own."""
    batch = Int8Batch(np.random.default_rng(heads), LENGTHS, heads=heads)
    batch.check(*op(batch, plan=split(batch, 300, heads)))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32, 128])
def test_long_and_repeated_on_the_gpu(heads):
    """300 repeats give the same bits. A result that changes would show a race."""
    batch = Int8Batch(np.random.default_rng(heads), [65536, 4096, 3, 1000], heads=heads)
    step = batch.jitted()
    first = step()
    batch.check(*first)
    for _ in range(300):
        for again, once in zip(step(), first, strict=True):
            assert jnp.array_equal(again, once)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [132, 3])
@pytest.mark.parametrize("heads", [16, 64])
def test_batch_invariant_on_the_gpu(heads, workers):
    """With a fixed split, a request's rows have the same bits alone and in a batch.

    With 3 workers a worker has several items, so another warpgroup may compute the even blocks.
    """
    batch = Int8Batch(np.random.default_rng(0), [3000, 100, 4096, 1025], heads=heads)

    def attend(requests):
        plan = plan_fixed(
            batch.seq_lens[requests], split_size=512, max_seq_len=4096, rows=heads,
            rows_per_tile=heads, num_workers=workers,
        )  # fmt: skip
        return batch.attend(plan, requests=requests)

    together = attend(slice(None))
    batch.check(*together)
    for i in range(4):
        for alone, all_rows in zip(attend(slice(i, i + 1)), together, strict=True):
            assert jnp.array_equal(alone[0], all_rows[i])
