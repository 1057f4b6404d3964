"""The Hopper kernels' configs: what fits, what is refused, the table, and how it is made."""

import functools
import json
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.speed import tune_hopper
from experiments.speed.decode.inputs import Inputs
from mla_jax import PagedKVCache, paged_mla_attention
from mla_jax.hal import PROFILES, Problem, TilePlanError, plan_tiles
from mla_jax.splits.planner import SlowPlanWarning, plan_fixed, plan_splits
from pallas_kernels.hopper import attention, device, planning
from pallas_kernels.hopper.config import (
    DecodeConfig,
    DecodeInt8Config,
    DecodeTransposedConfig,
    DecodeTransposedInt8Config,
    SmLimits,
)
from pallas_kernels.hopper.kernels.decode_refs import STAGES
from pallas_kernels.hopper.tuned import (
    choose_config,
    config_of,
    config_of_height,
    few_tokens,
    tuned,
)
from pallas_kernels.hopper.work_items import BLOCK

H200 = PROFILES["H200_SXM"]


def on(profile, make):
    return functools.partial(make, limits=SmLimits.of(profile))


decode, int8, transposed, transposed_int8 = (
    on(H200, make)
    for make in (DecodeConfig, DecodeInt8Config, DecodeTransposedConfig, DecodeTransposedInt8Config)
)


@pytest.mark.parametrize("rescale", ["multiply", "exponent_add"])
@given(rows=st.integers(1, 600))
def test_every_problem_has_a_plan_that_fits(rescale: str, rows: int) -> None:
    plan = choose_config(rows, rescale=rescale)
    assert plan.shared_memory_bytes <= plan.limits.shared_memory == 232448
    assert 128 * sum(plan.warpgroup_registers) <= plan.limits.registers == 65536
    assert plan.num_ctas(plan.num_workers(H200.cores)) <= H200.cores
    if rows <= 32 and rescale == "multiply":
        assert rows <= plan.rows_per_tile < rows + 8
    else:
        assert plan.rows_per_tile == (64 if rows <= 64 else 128)
    assert config_of_height(plan.rows_per_tile) == plan


@given(rows=st.integers(1, 600))
def test_every_int8_problem_has_a_plan_that_fits(rows: int) -> None:
    plan = choose_config(rows, cache="int8")
    assert plan.shared_memory_bytes <= plan.limits.shared_memory
    assert 128 * sum(plan.warpgroup_registers) <= plan.limits.registers
    assert plan.rows_per_tile == (-(-rows // 8) * 8 if rows <= 32 else 64)
    assert config_of_height(plan.rows_per_tile, cache="int8") == plan


@given(rows=st.integers(1, 600), batch=st.integers(1, 200), capacity=st.integers(1, 4000))
@pytest.mark.parametrize(
    ("cache", "most"), [("float", {16: 32768, 32: 32768}), ("int8", {16: 131072})]
)
def test_few_tokens_get_low_tiles(
    cache: str, most: dict[int, int], rows: int, batch: int, capacity: int
) -> None:
    plan = choose_config(rows, batch=batch, capacity=capacity, cache=cache)
    num_tiles = batch * -(-rows // plan.rows_per_tile)
    assert config_of_height(plan.rows_per_tile, num_tiles=num_tiles, cache=cache) == plan
    fitting = [height for height in most if -(-rows // height) * batch * capacity <= most[height]]
    if rows > 32 and fitting:
        assert plan.rows_per_tile == min(fitting)
    else:
        assert plan == choose_config(rows, batch=batch, cache=cache)


@pytest.mark.parametrize("rows", [8, 16, 24, 32])
def test_few_rows_are_in_pairs_with_a_tile_for_most_of_them(rows: int) -> None:
    for batch in (1, 33, 34, 66, 67, 200):
        tiles = choose_config(rows, batch=batch)
        assert tiles.in_pairs == (batch in (34, 66))
        assert tiles.shared_memory_bytes <= tiles.limits.shared_memory
    assert choose_config(rows, batch=50, kv_lora_rank=384).in_pairs == (rows in (16, 32))


def test_another_cache_is_named() -> None:
    with pytest.raises(ValueError, match="cache must be one of float, int8, got 'fp8'"):
        choose_config(64, batch=1, capacity=64, cache="fp8")


def test_amla_has_its_own_tiles_for_few_tokens_too() -> None:
    amla = choose_config(128, batch=1, capacity=64, rescale="exponent_add")
    assert amla == choose_config(128, rescale="exponent_add")


def test_the_config_of_64_rows_is_the_plan_that_the_profile_arrives_at() -> None:
    general = plan_tiles(H200, Problem((4096,), heads=128))
    config = decode(rows_per_tile=64)
    assert (config.rows_per_tile, BLOCK, STAGES, config.num_workers(H200.cores)) == (
        general.block_q, general.block_kv, general.kv_stages, general.num_workers,
    )  # fmt: skip
    assert [decode(rows_per_tile=rows).num_workers(113) for rows in (64, 128)] == [112, 56]
    assert [decode(rows_per_tile=rows).num_ctas(55) for rows in (64, 128)] == [56, 110]


def test_configs_are_static() -> None:
    """Equal ones are one key of a cache, so that a decode loop traces once."""
    one, same, other = (transposed(rows_per_tile=8, q_stages=n) for n in (2, 2, 1))
    assert len({one, same, other, transposed_int8(rows_per_tile=8)}) == 3
    assert one.shared_memory_bytes - other.shared_memory_bytes == 8 * 576 * 2 + 2 * 8
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transposed(rows_per_tile=16, kv_stages=(3, 3, 2)),
         r"H200_SXM: shared holds 232448 bytes.*22688 too many.*kv left 3 x 32768"),
        (lambda: on(PROFILES["A100_SXM4_80GB"], DecodeTransposedConfig)(rows_per_tile=8),
         "A100_SXM4_80GB: shared holds 166912"),
        (lambda: transposed(rows_per_tile=40), "rows_per_tile = 40, wanted a multiple"),
        (lambda: transposed(rows_per_tile=24, kv_lora_rank=128, in_pairs=True),
         "in_pairs = True, wanted False for 24 rows and kv_lora_rank 128"),
        (lambda: transposed(rows_per_tile=8, kv_stages=(2, 0, 2)),
         r"kv_stages = \(2, 0, 2\), wanted 3"),
        (lambda: transposed(rows_per_tile=8, q_stages=0), "q_stages = 0"),
        (lambda: transposed(rows_per_tile=8, rope_dim=48), "rope_dim = 48"),
        (lambda: decode(rows_per_tile=96), "rows_per_tile = 96, wanted 64, or 128"),
        (lambda: decode(rows_per_tile=64, registers=(240, 40)),
         r"registers holds 65536.*1024 too many"),
        (lambda: decode(rows_per_tile=64, registers=(236, 24)),
         r"registers = \(236, 24\), wanted 2 multiples of 8"),
        (lambda: decode(rows_per_tile=64, registers=(160, 24)),
         r"registers = \(160, 24\), wanted >= 192"),
        (lambda: decode(rows_per_tile=64, kv_lora_rank=640), "kv_lora_rank = 640"),
        (lambda: transposed_int8(rows_per_tile=24), "rows_per_tile = 24.* up to 16"),
        (lambda: transposed_int8(rows_per_tile=40, computing=1), "8 up to 32"),
        (lambda: transposed_int8(rows_per_tile=8, computing=3), "computing = 3"),
        (lambda: transposed_int8(rows_per_tile=8, kv_stages=3), "kv_stages = 3, wanted a mul"),
        (lambda: transposed_int8(rows_per_tile=8, kv_stages=6), "shared holds 232448"),
        (lambda: int8(rows_per_tile=128), "rows_per_tile = 128, wanted 64"),
        (lambda: int8(rows_per_tile=64, rope_dim=128), "rope_dim = 128, wa"),
        (lambda: int8(rows_per_tile=64, kv_stages=4), "shared holds 232448"),
        (lambda: int8(rows_per_tile=64, kv_stages=1), "kv_stages = 1, wanted .*>= 2"),
        (lambda: int8(rows_per_tile=64, registers=(176, 136, 20)), "setmaxnreg"),
        (lambda: int8(rows_per_tile=64, registers=(176, 128, 24)), ">= 136"),
        (lambda: int8(rows_per_tile=64, registers=(176, 144, 24)), "too many"),
        (lambda: choose_config(16, cache="int8", rescale="exponent_add"), "int8 cache, rescale"),
        (lambda: decode(rows_per_tile=64, registers=[232, 40]), r"registers = \[232, 40\]"),
        (lambda: decode(rows_per_tile=64, split_overhead=-1), "split_overhead = -1, wanted an"),
        (lambda: decode(rows_per_tile=64, kv_lora_rank=0), "kv_lora_rank = 0, wanted an integer"),
        (lambda: transposed(rows_per_tile=16, in_pairs=1), "in_pairs = 1, wanted False or True"),
        (lambda: SmLimits.of(PROFILES["Ascend910B1"]), "910B1: family = 'ascend', wanted 'nvidia'"),
        (lambda: config_of(dict(tuned()[0], kernel="both")), "kernel = 'both'"),
        (lambda: config_of_height(40), "rows_per_tile must be one of 8, 16"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_by_name(make, message: str) -> None:
    with pytest.raises((TilePlanError, ValueError), match=message):
        make()


def test_candidates_fit_and_differ() -> None:
    for entry in tuned():
        found = [*tune_hopper.sizes(entry), *list(tune_hopper.overheads(entry))[1:]]
        assert found[0] == entry
        assert len(found) == len({json.dumps(candidate) for candidate in found}) > 2
        for candidate in found:
            config_of(candidate)


def test_tuning_takes_the_fastest_and_nothing_for_noise(tmp_path) -> None:
    """With a stopwatch of its own: three stages of the left half are 10 % faster."""

    def stopwatch(entries, rows):
        assert rows == 16
        factors = [
            1.0 - 0.1 * (entry["kv_stages"][0] == 3) - 0.005 * (entry["split_overhead"] == 1)
            for entry in entries
        ]
        return [[4.0 * f, 10.0 * f, 12.0 * f, 100.0 * f, 120.0 * f, 7.0 * f] for f in factors]

    path = tmp_path / "tuned.json"
    tune_hopper.main(["16"], stopwatch, path)
    table = json.loads(path.read_text())
    assert table["device"]
    assert table["few_tokens"] == few_tokens()
    changed = table["classes"][1]
    assert changed["kv_stages"][0] == 3
    assert changed["split_overhead"] == tuned()[1]["split_overhead"]
    assert changed["timed"] == {
        "16 x 1024": 3.6, "64 x 1024": 9.0, "64 x ~1024": 10.8, "128 x 4096": 90.0,
        "128 x ~4096": 108.0, "4 x 16384": 6.3,
    }  # fmt: skip
    assert [c for i, c in enumerate(table["classes"]) if i != 1] == [
        c for i, c in enumerate(tuned()) if i != 1
    ]
    with pytest.raises(SystemExit, match=r"class '17', wanted 8, .*, any, int8-8, int8-16"):
        tune_hopper.main(["17"], stopwatch, path)
    with pytest.raises(SystemExit, match=r"Hopper kernels: it needs .* 9\.0 .*, here is cpu"):
        tune_hopper.main(["16"], None, path)


def test_the_stopwatch_checks_what_it_times(monkeypatch) -> None:
    """With a kernel that runs anywhere. Its results are wrong for a reference that is 10 % off."""

    def attend(q, pages, tables, seq_lens, query_lens, plan, **options):
        assert options["tiles"].rows_per_tile == plan.rows_per_tile == 16
        cache = PagedKVCache(pages, options["kv_lora_rank"], 64, 64, "ND")
        o, lse = paged_mla_attention(
            q[:, None], cache, tables, seq_lens, softmax_scale=options["softmax_scale"]
        )
        return o[:, 0], lse[:, 0]

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(device, "num_sms", lambda: 132)
    monkeypatch.setattr(tune_hopper, "WORKLOADS", ((2, 100, "uniform"), (2, 100, "varlen")))
    entries = list(tune_hopper.overheads(tuned()[1]))[:2]
    stopwatch = tune_hopper.GpuStopwatch()
    times = stopwatch(entries, 16)
    assert np.shape(times) == (2, 2)
    assert np.min(times) > 0

    right = Inputs.oracle

    def off(self, layer):
        return {request: (1.1 * o, lse) for request, (o, lse) in right(self, layer).items()}

    monkeypatch.setattr(Inputs, "oracle", off)
    with pytest.raises(RuntimeError, match=r"16 heads, .* 2 x 100, .*: wrong with .*split"):
        stopwatch(entries[:1], 16)


def shapes(make, lens, **options):
    """Returns the plan without its values, which is what is known when a kernel is traced."""
    return jax.eval_shape(functools.partial(make, **options), lens)


class TestPlansOfOthers:
    """A plan with other tiles or workers than the kernel is tuned for is said, and only that."""

    LENS = np.full(8, 4096, np.int32)

    @pytest.mark.parametrize(("rows", "cache"), [(16, "float"), (128, "float"), (128, "int8")])
    def test_the_right_plan_is_silent(self, rows, cache):
        plan = shapes(planning.plan_decode, self.LENS, rows=rows, capacity=8192, cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            planning.warn_if_slow(plan.split, rows, capacity=8192, cache=cache)

    @pytest.mark.parametrize("cache", ["float", "int8"])
    def test_another_plan_is_said(self, cache, monkeypatch):
        """Also by the function that runs it, once it knows the shapes."""
        height = 64 if cache == "float" else 16
        plan = shapes(plan_splits, self.LENS, num_workers=132, rows=128, rows_per_tile=height)
        message = f"plan has rows_per_tile {height} and 132 workers, .* for 8 requests of 128 rows"
        with pytest.warns(SlowPlanWarning, match=message):
            planning.warn_if_slow(plan, 128, capacity=8192, cache=cache)

        monkeypatch.setattr(attention, "launch", lambda *_, **__: "launched")
        options = {"num_heads": 128, "softmax_scale": 1.0, "causal": True}
        tables, pages = jnp.zeros((8, 128), jnp.int32), np.zeros((1, 64, 512), np.int8)
        work = tables, self.LENS, None, plan
        q = jnp.zeros((8, 128, 576), jnp.bfloat16)
        attend = functools.partial(attention.attend.__wrapped__, q, q[:1, :64], kv_lora_rank=512)
        if cache == "int8":
            attend = functools.partial(
                attention.attend_int8.__wrapped__, q, pages, q[:1, :64, :64], None
            )
        with pytest.warns(SlowPlanWarning, match=message):
            assert attend(*work, **options) == "launched"

    def test_tiles_of_another_kernel_are_refused(self):
        plan = shapes(plan_splits, self.LENS, num_workers=132, rows=128, rows_per_tile=64)
        q = jnp.zeros((8, 128, 576), jnp.bfloat16)
        options = {"num_heads": 128, "softmax_scale": 1.0, "causal": True, "kv_lora_rank": 512}
        args = q, q[:1, :64], jnp.zeros((8, 128), jnp.int32), self.LENS, None, plan
        for tiles, message in (
            (int8(rows_per_tile=64), "DecodeConfig or Dec.* cache of float, got DecodeInt8Config"),
            (decode(rows_per_tile=128), "tiles must have the plan's rows_per_tile 64, got 128"),
        ):
            with pytest.raises(ValueError, match=message):
                attention.attend.__wrapped__(*args, tiles=tiles, **options)

    def test_workers_count_too(self):
        plan = shapes(plan_splits, self.LENS, num_workers=6, rows=128, rows_per_tile=128)
        with pytest.warns(
            SlowPlanWarning, match="6 workers.* tuned for rows_per_tile 128 and 66 w"
        ):
            planning.warn_if_slow(plan, 128, capacity=8192)

    def test_a_fixed_plan_may_have_the_tiles_of_any_batch(self):
        lens, options = np.full(1, 64, np.int32), {"split_size": 64, "max_seq_len": 64}
        assert choose_config(128, batch=1, capacity=64).rows_per_tile < 128
        plan = shapes(plan_fixed, lens, num_workers=66, rows=128, rows_per_tile=128, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            planning.warn_if_slow(plan, 128, capacity=64)
        plan = shapes(plan_splits, lens, num_workers=66, rows=128, rows_per_tile=128)
        with pytest.warns(SlowPlanWarning, match="for 1 requests of 128 rows and up to 64 keys"):
            planning.warn_if_slow(plan, 128, capacity=64)
