"""Which implementation computes a call: by problem, platform and device, and why others do not."""

import dataclasses
import functools
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_batch import PURE, SCALE, TOLERANCE, assert_matches, make_batch

from mla_jax.attention import paged_mla_attention
from mla_jax.hal import load_profile
from mla_jax.registry import IMPLEMENTATIONS, available_implementations
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.planner import SlowPlanWarning, plan_splits
from pallas_kernels.hopper import device, planning
from pallas_kernels.hopper.tuned import config_of_height

attend = functools.partial(paged_mla_attention, softmax_scale=SCALE)


def i32(*values):
    return np.array(values, np.int32)


def test_blockwise_refuses_large_problems():
    batch = make_batch(np.random.default_rng(0), [40], [1], heads=128, capacity=8208)
    with pytest.raises(ValueError, match=r"'blockwise' can't run this.*at most 1048576 .* 1050624"):
        attend(*batch.args, implementation="blockwise")


def test_implementations_are_asked_about_a_problem_only():
    with pytest.raises(TypeError, match="problem must be an AttentionProblem, got str"):
        available_implementations("x")


def test_int8_cache_goes_to_an_implementation_that_has_it():
    batch = make_batch(np.random.default_rng(14), [40, 7], [1, 1], dtype="int8")
    assert_matches(attend(*batch.args), batch.oracle(), 1e-2, 5e-2)
    for name, reason in available_implementations().items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"implementation '{name}' can't run this: "):
                attend(*batch.args, implementation=name)
    broken = dataclasses.replace(batch.cache, scales=batch.cache.scales[:, :8])
    with pytest.raises(ValueError, match=r"cache.scales must be .* \(token\) or .*, got shape"):
        attend(batch.q, broken, batch.block_tables, batch.seq_lens)


def test_blockwise_says_what_it_lacks_with_an_int8_cache():
    run = functools.partial(attend, implementation="blockwise")
    lens = [40], [1]
    batch = make_batch(np.random.default_rng(15), *lens, dtype="int8", granularity="group")
    with pytest.raises(ValueError, match=r"'blockwise' can't run this: .*token or tensor.* group"):
        run(*batch.args)
    batch = make_batch(np.random.default_rng(15), *lens, dtype="int8")
    with pytest.raises(ValueError, match=r"'blockwise' can't run this: .*rescale multiply.* AMLA"):
        run(*batch.args, rescale="exponent_add")


def test_hopper_says_what_cache_it_lacks(monkeypatch):
    """On a machine that has the GPU: the op refuses by name, and without one goes to xla."""
    monkeypatch.setattr(device, "machine_lacks", lambda: None)
    batch = make_batch(np.random.default_rng(17), [40, 7], [1, 1], page_size=16, dtype="int8")
    reason = "it takes page sizes 64, 128 of a cache of int8, got 16"
    with pytest.raises(ValueError, match=f"implementation 'hopper' can't run this: {reason}"):
        attend(*batch.args, implementation="hopper")
    assert_matches(attend(*batch.args), batch.oracle(), 1e-2, 5e-2)


def test_implementations_say_what_they_can_run():
    available = available_implementations()
    assert tuple(available) == tuple(IMPLEMENTATIONS)
    assert all(available[name] is None for name in PURE)
    batch = make_batch(np.random.default_rng(12), [40], [1])
    for name, reason in available.items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"implementation '{name}' can't run this: "):
                attend(*batch.args, implementation=name)
    if jax.default_backend() == "cpu":
        default, xla = attend(*batch.args), attend(*batch.args, implementation="xla")
        np.testing.assert_array_equal(default[0], xla[0])


@pytest.fixture
def half_batch():
    return make_batch(np.random.default_rng(20), [40, 7], [1, 1], heads=4, dtype="bfloat16")


@pytest.fixture
def marked(monkeypatch):
    """A hopper that takes any problem and whose programs have a cosine in them, as no other's."""

    def run(problem):
        o, lse = IMPLEMENTATIONS["xla"].compute(problem)
        return jnp.cos(o), lse

    fake = dataclasses.replace(IMPLEMENTATIONS["hopper"], run=run, refuses=lambda problem: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "hopper", fake)


def cosines(function, *args, platforms=("cuda",)):
    """How many are in the program; lowered anew, whatever has been lowered before."""
    traced = jax.jit(lambda *args: function(*args)).trace(*args)
    lowered = traced.lower(lowering_platforms=platforms)
    return lowered.as_text().count("stablehlo.cosine")


def test_the_choice_is_of_the_platform_that_is_lowered_for(marked, half_batch):
    args = half_batch.args
    assert cosines(attend, *args) == 1
    assert cosines(lambda: attend(*args)) == 1  # all constants, and traced all the same
    for platforms in (("cpu",), ("tpu",), ("rocm",)):
        assert cosines(attend, *args, platforms=platforms) == 0
    both = jax.jit(attend).trace(*args).lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert both.count("stablehlo.cosine") == 1
    assert "stablehlo.case" in both

    def loop(q, *rest):
        return jax.lax.scan(lambda _, one: (None, attend(one, *rest)), None, jnp.stack([q, q]))[1]

    assert cosines(loop, *args) == 1
    first = functools.partial(attend, implementation=("hopper", "reference"))
    assert cosines(first, *args) == 1
    assert cosines(first, *args, platforms=("cpu",)) == 0
    assert cosines(functools.partial(attend, implementation=["xla", "hopper"]), *args) == 0
    named = functools.partial(attend, implementation="hopper")
    assert cosines(named, *args) == 1
    with pytest.raises(ValueError, match=r"'hopper' can't run this.* 9\.0 .* here is tpu"):
        cosines(named, *args, platforms=("tpu",))


def test_a_plan_that_keeps_the_kernels_away_is_named(half_batch, monkeypatch):
    """The best implementation here does not take its blocks: another one runs, with a warning."""
    monkeypatch.setattr(device, "target_lacks", lambda platform, device: None)
    monkeypatch.setattr(planning, "refuses", lambda *problem: problem[3] and "its blocks are of 16")
    plan = plan_splits(half_batch.seq_lens, num_workers=2, rows=4, block_size=16)
    with pytest.warns(SlowPlanWarning, match=r"'hopper' does not .*'xla' runs: its blocks"):
        got = attend(*half_batch.args, plan=plan)
    assert_matches(got, half_batch.oracle(), TOLERANCE["bfloat16"], 1e-5)


@pytest.fixture
def card(monkeypatch):
    """An NVIDIA GPU beside the CPU."""

    class Card:
        platform, compute_capability, core_count = "gpu", "8.0", 108

    devices = jax.devices
    monkeypatch.setattr(
        jax, "devices", lambda name=None: [Card()] if name == "cuda" else devices(name)
    )
    return Card


def test_the_card_that_is_lowered_for_counts(marked, card, half_batch, monkeypatch):
    """One of another kind beside the CPU: its programs are xla's."""
    assert cosines(attend, *half_batch.args) == 0
    with pytest.raises(ValueError, match=r"here is compute capability 8\.0"):
        cosines(functools.partial(attend, implementation="hopper"), *half_batch.args)
    monkeypatch.setattr(card, "compute_capability", "9.0")
    assert cosines(attend, *half_batch.args) == 1
    assert device.num_sms() == 108
    uncommitted = jax.tree.map(np.asarray, half_batch.args)
    with jax.default_device(jax.devices("cpu")[1]):
        lowered = jax.jit(lambda *args: attend(*args)).lower(*uncommitted)
    assert "stablehlo.cosine" not in lowered.as_text()
    o, _ = attend(*half_batch.args)  # on the CPU still
    assert o.devices() == {jax.devices()[0]}


def test_a_plan_for_another_card_is_refused_where_it_is_lowered_for(
    marked, card, half_batch, monkeypatch
):
    """By name, and only there: a CPU's program and one for its own card take it."""
    monkeypatch.setattr(card, "compute_capability", "9.0")
    split = plan_splits(half_batch.seq_lens, num_workers=2, rows=4, rows_per_tile=8)
    tiles = config_of_height(8, profile=load_profile("H20"))
    planned = functools.partial(attend, plan=DecodePlan(split, tiles, 78))
    reason = r"the plan is for 78 SMs \(profile H20\), and the GPU .* is for has 108"
    with pytest.warns(SlowPlanWarning, match=f"'hopper' does not .*'xla' runs: {reason}"):
        assert cosines(planned, *half_batch.args) == 0
    with pytest.raises(ValueError, match=f"'hopper' can't run this: {reason}"):
        cosines(functools.partial(planned, implementation="hopper"), *half_batch.args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosines(planned, *half_batch.args, platforms=("cpu",)) == 0
        monkeypatch.setattr(card, "core_count", 78)
        assert cosines(planned, *half_batch.args) == 1


def test_a_call_over_several_devices_needs_no_shard_map(marked, half_batch):
    """The compiler can partition no kernel: the choice is xla, but in the shards of a shard_map."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, whole = jax.P(None, None, "x"), jax.P()
    specs = (heads, whole, whole, whole)
    shards = jax.shard_map(
        attend, mesh=mesh, in_specs=specs, out_specs=(heads, heads), check_vma=False
    )
    assert cosines(shards, *half_batch.args) == 1
    placed = [
        jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
        for value, spec in zip(half_batch.args, specs, strict=True)
    ]
    assert cosines(attend, *placed) == 0
    with pytest.raises(ValueError, match=r"can't partition it .* inside jax\.shard_map"):
        cosines(functools.partial(attend, implementation="hopper"), *placed)


def test_transforms_of_the_choice_are_those_of_xla(marked, half_batch):
    """Under jvp the results are of the implementation that is chosen, the tangents of xla."""
    q, *rest = half_batch.args
    xla = functools.partial(attend, implementation="xla")

    def derivative(function):
        return lambda q: jax.jvp(lambda q: function(q, *rest)[0], (q,), (q + 1,))[1]

    def mapped(function):
        return jax.vmap(lambda q: function(q, *rest)[0])

    for transform, value, of_hopper in ((derivative, q, 1), (mapped, jnp.stack([q, q + 1]), 0)):
        got = jax.jit(transform(attend))(value)
        chex.assert_trees_all_equal(got, jax.jit(transform(xla))(value))
        assert cosines(transform(attend), value) == of_hopper


def test_an_eager_call_runs_where_its_arrays_are(half_batch):
    here, there = jax.devices()[1:3]
    o, _ = attend(*jax.device_put(half_batch.args, there))
    assert o.devices() == {there}
    with jax.default_device(here):
        o, _ = attend(*half_batch.args[:2], *map(np.asarray, half_batch.args[2:]))
    assert o.devices() == {here}


def test_the_first_of_several_that_can_run():
    batch = make_batch(np.random.default_rng(21), [40, 7], [1, 1])  # float32: not for hopper
    for names in (["hopper", "reference"], ("hopper", "reference", "xla")):
        wanted = attend(*batch.args, implementation="reference")
        chex.assert_trees_all_equal(attend(*batch.args, implementation=names), wanted)
    with pytest.raises(ValueError, match=r"implementation 'hopper' can't run this: .*float32"):
        attend(*batch.args, implementation=["hopper"])
    int8 = make_batch(
        np.random.default_rng(21), [40, 7], [1, 1], dtype="int8", granularity="group", page_size=16
    )
    for run in (attend, jax.jit(attend, static_argnames="implementation")):
        message = r"none of those.*: blockwise: it takes scale_.*got group.*; hopper: .* got "
        with pytest.raises(ValueError, match=message):
            run(*int8.args, implementation=("blockwise", "hopper"))


@pytest.mark.parametrize("kind", ["package", "folder", "module"])
def test_another_pallas_kernels_shadows_only_the_kernels(kind, monkeypatch, tmp_path, half_batch):
    """As for a user whose script has a folder or file of that name beside it."""
    if kind == "module":
        (tmp_path / "pallas_kernels.py").touch()
    else:
        for name in ("pallas_kernels", "experiments"):
            (tmp_path / name).mkdir()
            if kind == "package":
                (tmp_path / name / "__init__.py").touch()
    ours = [str(path) for path in map(Path, sys.path) if (path / "pallas_kernels").is_dir()]
    if kind == "folder":  # of less weight than a package, wherever that is: ours is found otherwise
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ours])
    monkeypatch.syspath_prepend(tmp_path)
    for name in [*sys.modules]:
        if name.split(".")[0] in ("pallas_kernels", "experiments"):
            monkeypatch.delitem(sys.modules, name)
    reasons = available_implementations()
    for name in ("blockwise", "hopper"):
        shadow = tmp_path / ("pallas_kernels.py" if kind == "module" else "pallas_kernels")
        assert f"pallas_kernels is shadowed by {shadow}, " in reasons[name]
        with pytest.raises(ValueError, match=f"{name}' can't run this.* is shadowed by "):
            attend(*half_batch.args, implementation=name)
    assert [name for name, reason in reasons.items() if reason is None] == [*PURE]
    chex.assert_trees_all_equal(
        attend(*half_batch.args), attend(*half_batch.args, implementation="xla")
    )
