"""The prefill kernel in the interpreter, compiled for sm_90a, and its work list."""

import functools

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from prefill_batch import BOUNDS, SCALE, PrefillBatch, random_bounds, random_lengths

import mla_jax
from mla_jax.hal import TilePlanError
from pallas_kernels.hopper.prefill import attention
from pallas_kernels.hopper.prefill.config import L2_BYTES, TILE_ROWS, PrefillConfig
from pallas_kernels.hopper.prefill.list_kernel import list_tiles
from pallas_kernels.hopper.prefill.work_items import (
    FEW_HEADS,
    MOST_HEADS_BY_REQUEST,
    TILE_FIELDS,
    Tile,
    WorkList,
    place_of_item,
    work_list,
)
from pallas_kernels.hopper.work_items import LOG2E

ROWS, KEYS, HEADS = 165, 345, 2  # of the arrays that are interpreted


def run(batch, *, joined, detect_races=True):
    o, lse = attention.attend_ragged(
        *batch.arguments(joined=joined),
        softmax_scale=SCALE,
        causal=batch.causal,
        interpret=plgpu.InterpretGPUParams(detect_races=detect_races),
    )
    return np.asarray(o), np.asarray(lse)


def causal_batch(seed, lens):
    return PrefillBatch(np.random.default_rng(seed), lens, rows=ROWS, keys=KEYS, heads=HEADS)


def test_all_keys_visible_interpreted():
    """Without a causal mask there may be more queries than keys, or no keys."""
    lens = [(30, 130), (70, 5), (3, 0), (20, 128)]
    batch = PrefillBatch(
        np.random.default_rng(3),
        lens,
        rows=130,
        keys=270,
        heads=1,
        dtype=jnp.float16,
        widths=(128, 0, 128),
        causal=False,
    )
    batch.poison(batch.cu_kv[2])  # the first key of the last request, whose rows see it
    batch.check(*run(batch, joined=False, detect_races=False), lse_of_spoiled=False)


def test_interpreted(races):
    """A short request, a chunk behind a prefix in two tiles, one query, and one without queries.

    Keys and values that are not finite reach the rows that see them, and no other. From block to
    block some maxima rise by more than O's reference may lag, others by less.
    """
    batch = causal_batch(8, [(5, 9), (140, 300), (1, 1), (0, 7)])
    batch.q[5:145:2] *= 8
    q, k = (x.astype(np.float32) for x in (batch.q[105:125, 0, :128], batch.k[9:265, 0]))
    scores = q @ k.T * SCALE * LOG2E  # of rows of one tile, and its full blocks
    rises = scores[:, :128].max(axis=1) - scores[:, 128:].max(axis=1)
    assert (rises > 8).any()
    assert ((rises > 0.5) & (rises < 7)).any()
    begin = batch.cu_kv[1]
    batch.poison(begin - 1)  # seen by the last row of the first request
    batch.poison(begin + 280, only_v=True)  # seen by rows 120 .. 139 of the chunk
    batch.check(*run(batch, joined=True))
    assert not races.found


def test_wide_interpreted(races):
    """256 columns of K and of V: a tile masks two KV blocks of 64 keys.

    The first warpgroup of a tile sees a part of both, or none of the last one, or there is only
    one. Values that are not finite are in both.
    """
    rng = np.random.default_rng(6)
    lens = [(5, 9), (100, 260), (130, 130), (60, 215)]
    batch = PrefillBatch(rng, lens, rows=300, keys=620, heads=1, widths=(192, 64, 256))
    begin = batch.cu_kv[1]
    batch.poison(begin + 170, only_v=True)  # seen by rows 10 .. 99 of the chunk
    batch.poison(begin + 230)  # in the last block of the same tile
    batch.poison(batch.cu_kv[2] + 128)  # seen by the last two rows
    batch.check(*run(batch, joined=True))
    assert not races.found


def test_invalid_requests_interpreted(races):
    """More queries than keys, an end past the array, and ends that decrease."""
    batch = causal_batch(2, [(20, 40), (20, 10), (30, 60), (10, 50)])
    batch.cu_q[3:] = [50, 5]  # the third request ends before where the last one ends
    batch.lens = [(20, 40), (0, 0), (0, 0), (0, 0)]
    batch.cu_kv[3] = KEYS + 1
    batch.check(*run(batch, joined=True), invalid=[slice(20, 50)])
    assert not races.found


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def check_compiled(report, config):
    """No product is serialized, no register spilled, shared memory is what the config says."""
    assert "mla_prefill" in report.name
    assert report.spill_stores == report.spill_loads == report.stack_frame == 0
    assert not report.messages
    assert not report.misuses_setmaxnreg
    assert report.shared_memory == config.shared_memory_bytes
    assert f"m64n{config.block_keys}k16.f32.bf16.bf16" in report.ptx
    assert f"m64n{config.v_dim}k16.f32.bf16.bf16" in report.ptx


def test_the_op_compiles_for_sm90a(h200):
    """`ragged_mla_attention` takes the kernel on a GPU. One other kernel makes its work list."""
    heads, rows, bounds = 16, 4096, struct(5, dtype=jnp.int32)
    making_list, report = aot.compile_sm90a(
        functools.partial(mla_jax.ragged_mla_attention, softmax_scale=SCALE),
        struct(rows, heads, 192),
        struct(rows, heads, 128),
        struct(rows, 64),
        struct(rows, heads, 128),
        bounds,
        bounds,
    )
    if "work_list" in report.name:
        making_list, report = report, making_list
    assert "mla_prefill_work_list" in making_list.name
    assert making_list.spill_stores == making_list.spill_loads == making_list.stack_frame == 0
    check_compiled(report, PrefillConfig())


@pytest.mark.parametrize(
    "widths",
    [
        # The op's kernel above is the case of small machines.
        *map(
            aot.on_gpu_machines,
            [
                (192, 64, 256),  # which leave the fewest registers
                (128, 0, 128),
                (192, 0, 128),
                (192, 64, 128),
                (128, 0, 256),
                (128, 64, 256),
                (192, 0, 256),
            ],
        ),
    ],
)
def test_other_widths_compile_for_sm90a(h200, widths):
    nope, rope, v_dim = widths
    heads, rows, bounds = 16, 4096, struct(5, dtype=jnp.int32)
    (report,) = aot.compile_sm90a(
        functools.partial(attention.attend_ragged, softmax_scale=SCALE, causal=True),
        struct(rows, heads, nope + rope),
        struct(rows, heads, nope + v_dim),
        struct(rows, rope) if rope else None,
        None,
        bounds,
        bounds,
        WorkList(struct(60, TILE_FIELDS, dtype=jnp.int32), struct(2, dtype=jnp.int32)),
    )
    check_compiled(report, PrefillConfig.of_widths(*widths))


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_cover_every_row_once(causal):
    sizes = {"num_queries": 1000, "num_keys": 3000, "num_heads": 5, "bytes_per_key": 512}
    make = jax.jit(functools.partial(work_list, causal=causal, **sizes))
    rng = np.random.default_rng(5)
    for _ in range(8):
        lens = random_lengths(rng, 6, 1000, 3000, causal=causal)
        cu_q, cu_kv = (
            np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in np.array(lens).T
        )
        tiles, (count, _) = map(np.asarray, make(cu_q, cu_kv))
        assert (tiles[count:] == 0).all()
        blocks = tiles[:count, 3]
        assert (np.diff(blocks) <= 0).all()
        covered = np.zeros(1000, int)
        for tile in map(Tile._make, tiles[:count]):
            rows = np.arange(tile.q_row, tile.q_row + tile.num_rows)
            assert 0 < len(rows) <= TILE_ROWS
            covered[rows] += 1
            b = np.searchsorted(cu_q[1:], tile.q_row, side="right")
            n, m = lens[b] if b < len(lens) else (0, 0)
            assert not tile.invalid
            assert tile.num_blocks == 0 or tile.kv_row == cu_kv[b]
            if m == 0:
                assert tile.num_blocks == tile.blocks_of(64, causal) == 0
                continue
            last = m - n + rows - cu_q[b] if causal else np.full(len(rows), m - 1)
            assert tile.limit == last[0]
            assert tile.num_blocks == last[-1] // TILE_ROWS + 1
            assert tile.blocks_of(64, causal) == last[-1] // 64 + 1
            if causal:  # all rows see all keys of all blocks but the last
                assert last[0] // TILE_ROWS == last[-1] // TILE_ROWS
        assert (covered == 1).all()


def test_large_batches_are_listed_by_request():
    """Requests with the most blocks first, and the longest tiles of each first."""
    lens = [(300, 300), (5, 900), (200, 330), (700, 700), (40, 0), (130, 900)]
    cu_q, cu_kv = (np.cumsum([0, *x]).astype(np.int32) for x in zip(*lens, strict=True))
    sizes = {"num_queries": int(cu_q[-1]) + 9, "num_keys": int(cu_kv[-1]), "num_heads": 20}

    def make(bytes_per_key, causal):
        work = work_list(cu_q, cu_kv, **sizes, bytes_per_key=bytes_per_key, causal=causal)
        tiles = Tile._make(np.asarray(work.tiles)[: work.counts[0]].T)
        return np.searchsorted(cu_q[1:], tiles.q_row, side="right"), tiles, int(work.counts[1])

    keys = int(cu_kv[-1])
    most = L2_BYTES // FEW_HEADS // (keys // 16 * 16)  # bytes per key with room for so many heads
    for causal in (False, True):
        requests, tiles, heads = make(most + 50, causal)
        # Equal ones keep their order; the rows behind the last request see no key.
        assert list(dict.fromkeys(requests)) == [1, 5, 3, 0, 2, 4, 6]
        for b in range(len(lens)):
            (own,) = np.nonzero(requests == b)
            assert (np.diff(own) == 1).all()
            assert (np.diff(tiles.num_blocks[own]) <= 0).all()
            assert (np.diff(tiles.q_row[own]) < 0).all() or not causal or lens[b][1] == 0
        assert heads == MOST_HEADS_BY_REQUEST
        requests, tiles, heads = make(most - 50, causal)
        assert (np.diff(tiles.num_blocks) <= 0).all()
        assert heads == 5  # of 20, in four groups
    # L2 has room for three heads of the longest request: 20 heads are in six groups of up to four.
    assert make(L2_BYTES // 900 // 3, True)[2] == 4


@pytest.mark.parametrize(
    ("requests", "rows", "keys", "causal", "bytes_per_key", "heads_at_once"),
    [
        (5, 400, 3000, True, 2_560, None),  # longest first, and two groups of heads
        (4, 1500, 3000, True, 51_200, 3),  # by request, with several tiles each
        (200, 5, 60_000, False, 5_120, None),  # by request, and heads by the longest one
    ],
)
def test_one_kernel_makes_the_same_list_interpreted(
    requests, rows, keys, causal, bytes_per_key, heads_at_once
):
    """The kernel's list equals that of `work_list`, also for bounds that can't be."""
    options = {
        "num_queries": rows,
        "num_keys": keys,
        "causal": causal,
        "num_heads": 13,
        "bytes_per_key": bytes_per_key,
        "heads_at_once": heads_at_once,
    }
    interpret = plgpu.InterpretGPUParams()
    made = jax.jit(functools.partial(list_tiles, **options, interpret=interpret))
    specified = jax.jit(functools.partial(work_list, **options))
    rng = np.random.default_rng(rows)
    for kind in (*BOUNDS, "valid"):
        bounds = random_bounds(rng, requests, rows, keys, kind)
        for got, wanted in zip(made(*bounds), specified(*bounds), strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("requests", "interpret", "kernels"),
    [(8, None, 1), (9, None, 0), (8, plgpu.InterpretGPUParams(), 0)],
)
def test_plan_takes_the_kernel_where_it_can(monkeypatch, requests, interpret, kernels):
    """A program for a CPU has no kernel, but its trace has all platforms."""
    monkeypatch.setattr(attention, "MOST_REQUESTS", 8)
    bounds = jax.ShapeDtypeStruct((requests + 1,), jnp.int32)
    options = {"causal": True, "interpret": interpret}
    make = functools.partial(attention.plan, **options)
    traced = jax.make_jaxpr(make, static_argnums=(2, 3, 4, 5))
    text = str(traced(bounds, bounds, 1000, 2000, 16, PrefillConfig()))
    assert text.count("mpmd_map[") == kernels


def test_items_cover_every_tile_of_every_head_once():
    places = [place_of_item(np.int32(i), 3, 7, np.int32(4)) for i in range(21)]
    places = [(int(tile), int(head)) for tile, head in places]
    assert sorted(places) == [(tile, head) for tile in range(3) for head in range(7)]
    assert {head for _, head in places[:12]} == {0, 1, 2, 3}
    assert [tile for tile, _ in places[:12]] == sorted(tile for tile, _ in places[:12])


def test_refusals_name_the_reason():
    widths = {"nope_dim": 128, "rope_dim": 64, "v_dim": 128}
    assert attention.refusal(jnp.bfloat16, **widths) is None
    assert "float32" in attention.refusal(jnp.float32, **widths)
    assert "rope_dim = 32" in attention.refusal(jnp.float16, **widths | {"rope_dim": 32})
    assert "v_dim = 192, wanted 128 or 256" in attention.refusal(
        jnp.float16, **widths | {"v_dim": 192}
    )
    for options, reason in [
        ({"stages": 5}, "stages = 5"),
        ({"registers": (232, 48)}, r"registers = \(232, 48\), wanted at most 504"),
        ({"block_keys": 96}, "block_keys = 96, wanted 128 or 64"),
        ({"nope_dim": 192}, "shared holds 232448 bytes"),
        ({"v_dim": 256}, "registers = .*to keep O, S and P"),
    ]:
        with pytest.raises(TilePlanError, match=reason):
            PrefillConfig(**options)
    batch = causal_batch(0, [(5, 9)])
    q, k, rope, _, *cu = batch.arguments(joined=True)
    with pytest.raises(ValueError, match=r"k_rope must be bfloat16\[345, 64\], got"):
        attention.attend_ragged(q, k, rope[1:], None, *cu, softmax_scale=SCALE, causal=True)
    with pytest.raises(ValueError, match=r"softmax_scale must be above 0, got -0\.1"):
        attention.attend_ragged(q, k, rope, None, *cu, softmax_scale=-0.1, causal=True)
