"""`plan_decode`: one plan with the split and the tiles, for any machine."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_batch import SCALE, assert_matches, make_batch

import mla_jax
from mla_jax import DecodePlan, PagedKVCache, paged_mla_attention, plan_decode
from mla_jax.hal import load_profile
from mla_jax.splits.plan import covered_requests
from pallas_kernels.hopper import device, planning

LENS = np.array([300, 0, 4096, 70], np.int32)


def new_cache(**options):
    """Returns an empty cache of NumPy arrays: no program, also where tests are collected."""
    create = functools.partial(PagedKVCache.create, 2, **{"page_size": 64} | options)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(create))


CACHE = new_cache()


def planned(lens=LENS, **options):
    """Returns the plan without the values of its arrays, which costs no compilation."""
    options = {"cache": CACHE, "num_heads": 16} | options
    return jax.eval_shape(functools.partial(plan_decode, **options), lens)


@pytest.mark.parametrize(
    ("options", "tiles", "workers"),
    [
        ({}, 16, 132),
        ({"num_heads": 128}, 128, 66),
        ({"num_heads": 64}, 64, 132),
        ({"num_heads": 16, "num_query_tokens": 4}, 64, 132),
        ({"num_heads": 128, "max_seq_len": 1024}, 16, 132),  # few short requests
        ({"num_heads": 16, "rescale": "exponent_add"}, 64, 132),
        ({"num_heads": 128, "profile": "H20"}, 128, 39),
        ({"num_heads": 128, "profile": load_profile("H100_SXM5")}, 128, 66),
        ({"num_heads": 128, "cache": new_cache(dtype="int8")}, 64, 132),
    ],
)
def test_plans_for_the_profile(options, tiles, workers):
    plan = planned(**options)
    assert (plan.split.rows_per_tile, plan.split.num_workers) == (tiles, workers)
    assert plan.num_sms == plan.split.num_workers * plan.tiles.ctas_per_tile
    assert plan.tiles.rows_per_tile == tiles
    wanted = options.get("profile", "H200_SXM")
    assert plan.profile == getattr(wanted, "name", wanted)


def test_knows_query_tokens():
    tokens = {"num_query_tokens": 3, "query_lens": np.array([3, 0, 1, 2], np.int32)}
    assert planned(num_heads=128, **tokens).split.num_heads == 128
    cache = new_cache(dtype="float32")
    assert planned(num_heads=32, cache=cache, **tokens).split.num_heads == 32


def test_pairs_are_those_of_the_cache_widths():
    """With latents of 128 the other CTA's half of a tile is no whole register: no pairs."""
    lens = np.full(50, 200, np.int32)
    for rank, in_pairs in ((512, True), (128, False)):
        cache = new_cache(kv_lora_rank=rank)
        assert planned(lens, cache=cache, num_heads=8).tiles.in_pairs == in_pairs


def test_a_card_with_other_sms_refuses_by_name(monkeypatch):
    has = "and the GPU that the program is for has"
    reason = planning.refuses_sms(planned(profile="H200_SXM"), 114)
    assert reason == f"the plan is for 132 SMs (profile H200_SXM), {has} 114"
    reason = planning.refuses_sms(planned(profile="H20"), 132)
    assert reason == f"the plan is for 78 SMs (profile H20), {has} 132"
    assert planning.refuses_sms(planned(profile="H100_SXM5"), 132) is None  # as many as an H200
    part = load_profile("H200_SXM").with_values({"core.count": 100})  # the rest is for others
    assert planning.refuses_sms(planned(profile=part), 132) is None
    monkeypatch.setattr(device, "machine_sms", lambda: 114)
    own = planned()
    assert own.num_sms == 114
    assert planning.refuses_sms(own, 114) is None


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_plan_for_another_cache_is_refused_by_name(heads):
    caches = {
        "float": CACHE,
        "int8": new_cache(dtype="int8"),
        "narrow": new_cache(kv_lora_rank=256),
    }
    for made, cache in caches.items():
        plan = planned(cache=cache, num_heads=heads)
        for used, other in caches.items():
            reason = planning.refuses(jnp.bfloat16, other, "multiply", plan)
            if used == made:
                assert reason is None
            else:
                assert reason is not None
                assert "another cache" in reason or "rows_per_tile" in reason


def test_falls_back_to_plain_jax():
    cache = new_cache(dtype="float32")
    plan = planned(cache=cache)
    assert plan.tiles is None
    assert plan.num_sms == 0
    with pytest.raises(ValueError, match="hopper: it takes q and cache both bfloat16"):
        planned(cache=cache, implementation="hopper")
    with pytest.raises(ValueError, match="xla: it takes no plan"):
        planned(implementation="xla")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache": None}, TypeError, "cache must be a PagedKVCache, got NoneType"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": 1.5}, TypeError, "num_heads"),
        ({"num_query_tokens": 0}, ValueError, "num_query_tokens"),
        ({"num_heads": 2**31}, ValueError, "num_heads must be at most 67108864, got 2147483648"),
        (
            {"num_heads": 2**16, "num_query_tokens": 2**16},
            ValueError,
            r"num_heads \* num_query_tokens must be at most 67108864, got 65536 \* 65536",
        ),
        ({"max_seq_len": 0}, ValueError, "max_seq_len"),
        ({"max_seq_len": 2**40}, ValueError, "max_seq_len must be at most 2147483647, got 10995"),
        ({"query_lens": LENS}, ValueError, r"query_lens\[0\] must be in 0 .. 1, got 300"),
        ({"query_lens": LENS[:2]}, ValueError, r"query_lens must be \[B\]"),
        ({"rescale": "add"}, ValueError, "rescale must be one of"),
        ({"rescale": 1}, TypeError, "rescale must be one of"),
        ({"profile": "H999"}, ValueError, "H999"),
        ({"profile": 9}, TypeError, "profile must be a HardwareProfile or a name, got int"),
        ({"implementation": "fast"}, ValueError, "implementation"),
        ({"profile": "L40", "implementation": "hopper"}, ValueError, "hopper: L40"),
        (
            {"profile": "Ascend910B1", "implementation": "hopper"},
            ValueError,
            "hopper: Ascend910B1: family = 'ascend', wanted 'nvidia'",
        ),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        planned(**options)


def test_the_op_takes_it_and_traces_once():
    batch = make_batch(np.random.default_rng(0), [40, 7, 0], [1, 1, 0], dtype="float32")
    traces = []

    @jax.jit
    def step(q, cache, tables, seq_lens, query_lens):
        traces.append(1)
        plan = plan_decode(seq_lens, cache=cache, num_heads=q.shape[2], num_query_tokens=q.shape[1])
        assert isinstance(plan, DecodePlan)
        return paged_mla_attention(
            q, cache, tables, seq_lens, query_lens=query_lens, plan=plan,
            softmax_scale=SCALE, implementation="split_kv",
        )  # fmt: skip

    args = *batch.args, batch.query_lens
    assert_matches(step(*args), batch.oracle(), 1e-5, 1e-5)
    step(*args)
    assert len(traces) == 1


def test_is_a_pytree():
    plan = plan_decode(jnp.asarray(LENS), cache=CACHE, num_heads=16)
    again = jax.tree.unflatten(jax.tree.structure(plan), jax.tree.leaves(plan))
    assert (again.tiles, again.num_sms) == (plan.tiles, plan.num_sms)
    chex.assert_trees_all_equal(again.split.arrays(), plan.split.arrays())
    assert "plan_decode" in mla_jax.__all__


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": None}, TypeError, r"plan\.split must be a SplitPlan, got NoneType"),
        ({"tiles": "x"}, TypeError, r"plan\.tiles must be the config of a Hopper .* got str"),
        ({"num_sms": -3}, ValueError, r"plan\.num_sms must be at least 0, got -3"),
        ({"finish": 3}, TypeError, r"plan\.finish must be a str, got int"),
    ],
)
def test_the_op_refuses_bad_fields_of_a_plan(change, error, message):
    batch = make_batch(np.random.default_rng(0), [40, 7], [1, 1], dtype="float32")
    plan = plan_decode(batch.seq_lens, cache=batch.cache, num_heads=batch.q.shape[2])
    with pytest.raises(error, match=message):
        paged_mla_attention(
            *batch.args, softmax_scale=SCALE, plan=dataclasses.replace(plan, **change)
        )


def test_a_work_list_of_another_split_is_refused():
    lens = np.array([700, 90], np.int32)
    plan_of = jax.jit(functools.partial(plan_decode, cache=CACHE, num_heads=16))
    plan, other = plan_of(lens), plan_of(lens[::-1])
    plan.check()
    mixed = dataclasses.replace(plan, work=other.work)
    with pytest.raises(ValueError, match=r"plan\.work must be that of plan.split"):
        mixed.check()
    assert covered_requests(plan.split_of_work, lens).all()
    assert not covered_requests(mixed.split_of_work, lens).any()
    ranges, items, counters = plan.work
    for work in (plan.work[:2], list(plan.work), (ranges, items.astype(jnp.float32), counters)):
        with pytest.raises(TypeError, match=r"plan\.work"):
            dataclasses.replace(plan, work=work).check()
    with pytest.raises(ValueError, match=r"plan.work \(items\) must be \[P, 7\]"):
        dataclasses.replace(plan, work=(ranges, items[1:], counters)).check()
