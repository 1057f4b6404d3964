"""The tiles of a device: measured ones on an H200, and the fastest simulated ones elsewhere."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doc_blocks import blocks_of
from guards import run_guarded
from hopper_batch import SCALE, HopperBatch
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax import DecodePlan, PagedKVCache, plan_decode
from mla_jax.hal import PROFILES, Problem, TilePlanError, fastest_tiles, simulate
from mla_jax.hal.choice import MARGIN
from mla_jax.implementations import hopper
from pallas_kernels.hopper import attention, device, planning
from pallas_kernels.hopper.choice import choose_tiles, legal_configs, planned_kernel, tiles_for
from pallas_kernels.hopper.tuned import config_of_height

H200 = PROFILES["H200_SXM"]
KB = 1024
# Rows, requests, capacity, cache and rescale of calls, then what an H200 takes as of version 1: the
# height, CTAs in pairs, stages of KV and q, registers, and the costs of splitting and of merging.
ON_H200 = [
    ((16, 128, 4096), (16, False, (2, 2, 2), 2, None, 2, 8)),
    ((16, 50, 4096), (16, True, (2, 2, 2), 2, None, 2, 8)),
    ((8, 66, None), (8, True, (2, 2, 2), 2, None, 2, 8)),
    ((20, 37, 3072), (24, True, (2, 2, 2), 2, None, 2, 8)),
    ((32, 256, 512), (32, False, (2, 2, 2), 2, None, 2, 8)),
    ((40, 4, 70000), (64, True, None, None, (232, 40), 5, 4)),
    ((64, 32, 1024), (64, True, None, None, (232, 40), 5, 4)),
    ((64, 16, 1024), (32, False, (2, 2, 2), 2, None, 2, 8)),
    ((128, 1, 16384), (128, False, None, None, (240, 24), 5, 0)),
    ((128, 128, 4096), (128, False, None, None, (240, 24), 5, 0)),
    ((128, 8, 1024), (32, False, (2, 2, 2), 2, None, 2, 8)),
    ((16, 4, None, "float", "exponent_add"), (64, True, None, None, (232, 40), 5, 4)),
    ((16, 64, 4096, "int8"), (16, False, 4, None, (232, 40), 2, 0)),
    ((128, 64, 4096, "int8"), (64, False, 3, None, (176, 136, 24), 5, 0)),
]


def changed(**values):
    """Returns an H200 with other numbers: shared in KB, and factors of the rest."""
    fields = {
        "shared": ("buffer.shared", KB),
        "sms": ("core.count", 1),
        "bandwidth": ("memory.hbm_bandwidth", H200["memory.hbm_bandwidth"]),
        "tensor": ("engine.tensor_bf16", H200["engine.tensor_bf16"]),
    }
    return H200.with_values({fields[k][0]: value * fields[k][1] for k, value in values.items()})


@pytest.fixture
def card(monkeypatch):
    """An H200 beside the CPU."""
    own = {"core_count": 132, "shared_memory_per_block_optin": 232448}
    found = SimpleNamespace(
        platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200", **own
    )
    monkeypatch.setattr(device, "card", lambda: found)
    return found


@pytest.mark.parametrize("is_there", [False, True])
def test_plans_on_an_h200_are_the_measured_ones(monkeypatch, request, is_there) -> None:
    """What the planner gets is pinned, and it alone makes the arrays of a plan."""
    if is_there:
        request.getfixturevalue("card")
    got = {}

    def plan_splits(seq_lens, **options):
        got.update(options)
        raise InterruptedError

    monkeypatch.setattr(planning, "plan_splits", plan_splits)
    for call, wanted in ON_H200:
        rows, batch, capacity, *kind = call
        kind = dict(zip(("cache", "rescale"), kind, strict=False))
        sizes = {"batch": batch, "capacity": capacity, "profile": device.profile()}
        tiles, source = tiles_for(rows, **sizes, **kind)
        fields = [getattr(tiles, name, None) for name in ("kv_stages", "q_stages", "registers")]
        if type(tiles).__name__ == "DecodeTransposedInt8Config":
            assert tiles.computing == 2
        costs = tiles.split_overhead, tiles.merge_overhead
        assert (tiles.rows_per_tile, tiles.in_pairs, *fields, *costs) == wanted, call
        assert (tiles.limits.shared_memory, source) == (232448, "measured")
        lens = np.full(batch, 100, np.int32)
        with pytest.raises(InterruptedError):
            planning.plan_decode(lens, rows, capacity=capacity, **kind)
        assert got["num_workers"] == 132 // tiles.ctas_per_tile
        assert (got["rows_per_tile"], got["in_pairs"]) == wanted[:2]
        assert (got["overhead"], got["merge_overhead"]) == wanted[-2:]


def test_numbers_are_those_of_the_card(card) -> None:
    assert device.profile() is H200
    card.core_count, card.shared_memory_per_block_optin = 78, 200 * KB
    own = device.profile()
    assert (own.cores, own["buffer.shared"]) == (78, 200 * KB)
    assert own.numbers["core.count"].source == "read from the device"
    tiles, source = tiles_for(128, batch=128, capacity=4096, profile=own)
    assert source == "simulated"
    assert tiles.limits.shared_memory == 200 * KB
    card.device_kind = "NVIDIA unknown"
    assert device.profile() is None


def test_the_measured_tiles_override_the_simulated_ones() -> None:
    """The table's are taken on an H200 whatever is faster, and elsewhere if nothing is by much."""
    problem = Problem((1024,) * 32, 64)
    measured = choose_tiles(H200, problem)
    assert (measured.source, measured.tiles.rows_per_tile) == ("measured", 64)
    fastest = measured.runners_up[0]
    assert fastest.seconds < measured.seconds / (1 + MARGIN)
    other = choose_tiles(H200.with_values({"memory.hbm_bytes": 1.4e11}), problem)
    assert (other.source, other.tiles) == ("simulated", fastest.tiles)
    close = choose_tiles(H200.with_values({"memory.hbm_bytes": 1.4e11}), Problem((4096,) * 64, 16))
    assert close.seconds <= close.runners_up[0].seconds * (1 + MARGIN)
    kernels = [(t, planned_kernel(t, H200, problem)) for t in (measured.tiles, fastest.tiles)]
    assert fastest_tiles(H200, problem, kernels).tiles == fastest.tiles


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        (changed(sms=78), Problem((1024,) * 16, 128)),
        (changed(shared=164), Problem((9000, 100, 64, 2000) * 9, 32)),
        (PROFILES["H100_SXM5"], Problem((70000,) * 3, 16, s_q=2)),
    ],
)
def test_times_are_those_of_the_simulator(profile, problem) -> None:
    found = choose_tiles(profile, problem)
    for tiles, seconds in ((found.tiles, found.seconds), *found.runners_up[::9]):
        exact = simulate(profile, problem, planned_kernel(tiles, profile, problem)).seconds
        assert seconds == pytest.approx(exact, rel=1e-6), tiles


def test_the_simulated_favourite_is_near_the_measured_one() -> None:
    """Three heights were timed on an H200 when no tiles of few rows were in pairs.

    The times are those of benchmarks/history.md, in microseconds, of 64 or 128, 16 and 32 rows.
    """
    timed = {
        (64, 16, 1024): (17.9, 22.8, 14.8), (64, 4, 4096): (17.7, 16.4, 15.4),
        (64, 1, 16384): (22.2, 16.4, 16.8), (64, 1, 8192): (16.2, 11.8, 12.5),
        (64, 8, 1024): (14.0, 11.1, 12.3), (128, 8, 1024): (16.3, 23.2, 14.9),
        (128, 1, 8192): (17.5, 16.7, 16.0), (128, 2, 4096): (16.4, 16.3, 14.7),
        (128, 4, 1024): (14.1, 11.6, 11.9), (64, 32, 1024): (24.5, 24.5, 30.3),
        (64, 64, 1024): (34.9, 46.2, 34.0),
    }  # fmt: skip
    slower = []
    for (heads, batch, length), us in timed.items():
        problem = Problem((length,) * batch, heads)
        kernels = [
            (i, planned_kernel(config_of_height(height), H200, problem))
            for i, height in enumerate((heads, 16, 32))
        ]
        slower.append(us[fastest_tiles(H200, problem, kernels).tiles] / min(us) - 1)
    assert sum(each <= 0.03 for each in slower) == 9
    assert max(slower) == pytest.approx(0.108, abs=1e-3)


def test_tiles_follow_the_profile() -> None:
    """One number of an H200 changes at a time."""
    long, few_rows, few = (
        Problem((4096,) * 128, 128), Problem((4096,) * 64, 16), Problem((512,) * 16, 128),
    )  # fmt: skip

    def stages(tiles):
        return (*tiles.kv_stages, tiles.q_stages)

    # 64 rows and two KV blocks take 221 KB. With less, tiles are lower, and with still less they
    # have fewer stages.
    assert choose_tiles(H200, long).tiles.rows_per_tile == 128
    at_200, at_164 = (choose_tiles(changed(shared=kb), long) for kb in (200, 164))
    for found, kb in ((at_200, 200), (at_164, 164)):
        assert found.tiles.rows_per_tile <= 32
        assert max(t.shared_memory_bytes for t, _ in found.runners_up) <= kb * KB
    assert sum(stages(at_164.tiles)) < sum(stages(at_200.tiles))
    assert at_164.seconds > 1.2 * at_200.seconds > 1.2 * choose_tiles(H200, long).seconds

    # 16 requests are few tiles of 128 rows for 132 SMs, and enough for 78.
    fastest = min((choose_tiles(H200, few), *choose_tiles(H200, few).runners_up[:1]),
                  key=lambda each: each.seconds)  # fmt: skip
    at_78 = choose_tiles(changed(sms=78), few)
    assert fastest.tiles.rows_per_tile < at_78.tiles.rows_per_tile == 128
    assert at_78.tiles.num_workers(78) == 39

    # A block from half the bandwidth takes twice as long, so that a work item costs fewer blocks.
    slow, usual = choose_tiles(changed(bandwidth=0.5), few_rows), choose_tiles(H200, few_rows)
    assert slow.tiles.split_overhead < usual.tiles.split_overhead
    assert slow.tiles.merge_overhead < usual.tiles.merge_overhead
    assert slow.seconds > 1.8 * usual.seconds

    # A block by twice the tensor rate takes less where that is the bound, so that it costs more.
    fast, usual = choose_tiles(changed(tensor=2), long), choose_tiles(H200, long)
    assert fast.tiles.split_overhead > usual.tiles.split_overhead
    assert fast.seconds < 0.95 * usual.seconds
    bound_by_memory = choose_tiles(changed(tensor=2), few_rows)
    assert bound_by_memory.seconds == pytest.approx(choose_tiles(H200, few_rows).seconds)


@pytest.mark.parametrize(
    ("profile", "rescale", "message"),
    [
        (changed(shared=60), "multiply", "H200_SXM: shared holds 61440 bytes, the plan needs 8"),
        (changed(shared=200), "exponent_add", "H200_SXM: shared holds 204800 bytes"),
        (H200.with_values({"buffer.registers": 32768}), "multiply", "registers holds 32768"),
        (PROFILES["L40"], "multiply", r"L40: core\.compute_capability = 8\.9, wanted at least 9"),
    ],
)
def test_a_device_without_a_legal_config_is_refused(profile, rescale, message) -> None:
    with pytest.raises(TilePlanError, match=message) as raised:
        legal_configs(profile, rescale=rescale)
    assert "\n" not in str(raised.value)
    cache = PagedKVCache(np.zeros((2, 64, 576), jnp.bfloat16), 512, 64, 64, "ND")
    options = {"profile": profile, "rescale": rescale, "implementation": "hopper"}
    make = functools.partial(plan_decode, cache=cache, num_heads=64, **options)
    with pytest.raises(ValueError, match=f"hopper: .*{message}"):
        jax.eval_shape(make, np.full(4, 100, np.int32))


def test_tiles_for_more_shared_memory_are_refused_on_a_gpu_with_less(card) -> None:
    """Where the program is lowered for that GPU, in the place where plans for other SMs are."""
    tiles = choose_tiles(changed(shared=300), Problem((64,) * 4, 32)).tiles
    tall = max(legal_configs(changed(shared=300)), key=lambda each: each.shared_memory_bytes)
    assert tall.shared_memory_bytes > 232448 >= tiles.shared_memory_bytes
    split = SimpleNamespace(num_workers=132)
    for config, refused in ((tiles, False), (tall, True)):
        plan = DecodePlan(split, config, 132)
        problem = SimpleNamespace(plan=plan)
        reason = hopper._refuses_plan(problem, SimpleNamespace(device=card))
        assert (reason is not None) == refused
        assert planning.refuses_shared_memory(plan, None) is None
    assert "shared memory, and the GPU that the program is for has 232448" in reason


def test_stages_are_the_tables_and_the_most_that_fit() -> None:
    for profile, rows, wanted in (
        (H200, 16, {(2, 2, 2, 2), (3, 2, 3, 2)}),
        (H200, 32, {(2, 2, 2, 2), (2, 2, 3, 1)}),
        (changed(shared=300), 8, {(2, 2, 2, 2), (3, 3, 3, 2)}),
        (changed(shared=164), 32, {(2, 1, 2, 1), (1, 1, 1, 2)}),
    ):
        configs = [t for t in legal_configs(profile) if t.rows_per_tile == rows]
        assert {(*tiles.kv_stages, tiles.q_stages) for tiles in configs} == wanted
        assert {tiles.in_pairs for tiles in configs} == {False, True}


def test_one_sm_runs_no_pairs() -> None:
    assert not any(tiles.in_pairs for tiles in legal_configs(changed(sms=1)))
    with pytest.raises(TilePlanError, match=r"core\.count = 1, wanted at least 2"):
        legal_configs(changed(sms=1), rescale="exponent_add")


def test_what_has_no_model_gets_the_table() -> None:
    for options in ({"cache": "int8"}, {"kv_lora_rank": 256}):
        assert tiles_for(16, batch=4, profile=changed(sms=78), **options)[1] == "table"
    with pytest.raises(ValueError, match=r"problem\.kv_dtype must be one of bf16, fp16"):
        choose_tiles(H200, Problem((64,), 16, kv_dtype="int8"))


def test_a_kernel_with_few_stages_runs_right_in_the_interpreter(races) -> None:
    """One stage of q and of the right half of V, from a plan for 164 KB and four SMs."""
    profile = changed(shared=164, sms=4)
    lens = [300, 0, 70, 129]
    batch = HopperBatch(np.random.default_rng(), lens, heads=40)
    plan = planning.plan_decode(batch.seq_lens, 40, capacity=768, profile=profile)
    assert (plan.num_sms, plan.split.num_workers) == (4, 4)
    assert (plan.tiles.rows_per_tile, plan.tiles.q_stages) == (24, 1)
    assert 1 in plan.tiles.kv_stages
    assert planning.refuses(jnp.bfloat16, batch.cache, "multiply", plan) is None
    got = run_guarded(
        attention.attend,
        np.asarray(batch.q).reshape(len(lens), 40, -1),
        batch.cache.pages,
        batch.block_tables,
        batch.seq_lens,
        batch.query_lens,
        plan,
        num_heads=40,
        kv_lora_rank=batch.cache.kv_lora_rank,
        softmax_scale=SCALE,
        causal=True,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    batch.check(*got)
    assert not races.found


def test_the_example_of_the_page_runs(capsys) -> None:
    (code,) = (code for _, code in blocks_of("hal.md") if "choose_tiles" in code)
    exec(compile(code, "docs/hal.md", "exec"), {})
    assert json.loads(capsys.readouterr().out.splitlines()[-1].replace("'", '"')) == [
        "measured", "simulated",
    ]  # fmt: skip
