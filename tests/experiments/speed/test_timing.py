"""The timing driver on the CPU: what it runs, what it refuses, what its units mean."""

import collections
import contextlib
import gc
import itertools
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.speed import timing


def test_the_slope_cancels_what_the_first_launch_costs(monkeypatch):
    """A machine that needs 1 ms to wake, 0.1 ms to enqueue and 1 ms for each launch of four."""
    clock, pending = 0.0, 0

    def enqueue():
        nonlocal clock, pending
        clock += 1e-4
        pending += 1

    def wait():
        nonlocal clock, pending
        clock += 1e-3 + 4e-3 * pending - 1e-4 * pending
        pending = 0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    burst = timing.Burst(4, enqueue, wait)
    result = timing.measure({"a": burst, "b": burst}, rounds=3, pause=0.0)
    for name in "ab":
        assert result[name].us == pytest.approx(1000)
        assert result[name].low == pytest.approx(result[name].high)
        assert not result[name].host_bound


def test_a_cold_machine_does_not_shorten_the_slope(monkeypatch):
    """A device that takes 0.4 ms longer for its first burst after a pause."""
    clock, pending, cold = 0.0, 0, True

    def sleep(seconds):
        nonlocal clock, cold
        clock += seconds
        cold = True

    def enqueue():
        nonlocal pending
        pending += 1

    def wait():
        nonlocal clock, pending, cold
        clock += 1e-3 * pending + 4e-4 * cold
        pending, cold = 0, False

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(timing.time, "sleep", sleep)
    burst = timing.Burst(48, enqueue, wait)
    timings = timing.measure({"a": burst, "b": burst}, rounds=3)
    for name in "ab":
        assert timings[name].us == pytest.approx(1000 / 48)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_each_comes_after_each_other_equally_often(count):
    rounds = list(itertools.islice(timing.orders(count), 2 * count))
    assert all(sorted(order) == list(range(count)) for order in rounds)
    after = collections.Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert after == dict.fromkeys(itertools.permutations(range(count), 2), 2)
    few = collections.Counter(pair for order in rounds[:7] for pair in itertools.pairwise(order))
    assert max(few.values(), default=0) <= max(2, 7 // count + 1)


@pytest.mark.parametrize("others", ["abc", "abcd", "abcdefgh"])
def test_what_follows_a_heavy_burst_is_not_slower_for_it(others, monkeypatch):
    """A device that is a tenth slower from the pause after a heavy burst to the next pause."""
    clock, pending, slower = 0.0, [], [1.0, 1.0]

    def sleep(seconds):
        slower[:] = slower[1], 1.0

    def burst(name):
        def wait():
            nonlocal clock
            clock += 1e-3 * len(pending) * slower[0]
            pending.clear()
            if name == "heavy":
                slower[1] = 1.1

        return timing.Burst(1, lambda: pending.append(name), wait)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(timing.time, "sleep", sleep)
    timings = timing.measure({name: burst(name) for name in ("heavy", *others)}, rounds=7)
    assert [timings[name].us for name in others] == pytest.approx([1000] * len(others))


@pytest.mark.parametrize(("work", "lost"), [(1e-3, False), (0.0, True)])
def test_noise_larger_than_the_work(work, lost, monkeypatch):
    """3 ms more for a burst alone than for several, which the slope takes for the work's."""
    clock, pending = 0.0, 0

    def enqueue():
        nonlocal clock, pending
        clock += 1e-6
        pending += 1

    def wait():
        nonlocal clock, pending
        clock += work * pending + 3e-3 * (pending == 1)
        pending = 0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    burst = timing.Burst(1, enqueue, wait)
    if lost:
        with pytest.raises(RuntimeError, match="lost in noise, at 512 repeats: a"):
            timing.measure({"a": burst}, rounds=3, pause=0.0)
    else:
        assert 0 < timing.measure({"a": burst}, rounds=3, pause=0.0)["a"].us < 1000


@pytest.mark.parametrize(
    ("separated", "wanted"),
    [(False, [(0, 1), (0, 2), (1, 1), (1, 2)]), (True, [(0, 1), (0, 2), (1, 2), (1, 3)])],
)
def test_a_model_program_ties_its_launches_by_q(separated, wanted):
    """It adds (output is NaN) to q's first element: at the end of a pass, or after each launch.
    Layer 0 gives NaN, so each layer sees how often it ran before."""
    seen = []

    def step(q, layer, shared):
        jax.debug.callback(lambda q, i: seen.append((int(i), int(q))), q[0], layer["number"])
        return jnp.where(layer["number"] == 0, jnp.nan, 1.0) * jnp.ones(2), shared

    arguments = (jnp.ones(3), [{"number": jnp.int32(i)} for i in range(2)], jnp.arange(5))
    program = timing.compile_model(step, *arguments, passes=2, separated=separated)
    assert program.launches == 4
    output, shared = program.last_output(*arguments)
    jax.effects_barrier()
    assert sorted(seen) == wanted
    assert output.tolist() == [1, 1]
    assert shared.tolist() == list(range(5))
    program.burst(*arguments).run(2)
    jax.effects_barrier()
    assert sorted(seen) == sorted(wanted * 3)


@pytest.mark.parametrize(
    ("batch", "kv_len", "heads", "seq_q", "us", "tflops", "gb_per_s"),
    [
        (1, 16384, 128, 1, 38.6, 118.3, 496.0),
        (128, 4096, 128, 2, 491.9, 593.7, 1373.0),
        (64, 1024, 16, 1, 32.0, 71.3, 2430.0),
        (128, 4096, 64, 1, 151.7, 481.3, 4099.0),
    ],
)
def test_rates_are_those_of_the_published_rows(batch, kv_len, heads, seq_q, us, tflops, gb_per_s):
    """Rows of FlashMLA's dense decode on an H200, with the rates published beside the times."""
    rates = timing.decode_rates(us, [kv_len] * batch, heads=heads, seq_q=seq_q)
    assert rates == pytest.approx((tflops, gb_per_s), rel=0.01)


def test_ceilings_are_rates():
    rates = timing.ceilings(gib=2**-9, size=128)
    assert set(rates) == {"copy", "read", "matmul", "matmul_int8"}
    assert all(np.isfinite(rate) for rate in rates.values())


def test_the_profiler_sees_no_gpu_here():
    arguments = (jnp.ones(4), [jnp.ones(4)] * 2, jnp.ones(4))
    program = timing.compile_model(lambda q, layer, shared: q * layer + shared, *arguments)
    assert timing.kernel_times(program.burst(*arguments)) == {}


def test_a_graph_keeps_what_it_reads(monkeypatch, request):
    """Its replays use the memory of whoever was captured, which nobody else may get meanwhile."""
    torch = types.ModuleType("torch")
    torch.cuda = types.SimpleNamespace(
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: None),
        graph=lambda graph: contextlib.nullcontext(),
        synchronize=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)

    class Peer:
        def launch(self, i):
            pass

    gc.freeze()  # what is there already: a collection looks at this test's objects alone
    request.addfinalizer(gc.unfreeze)
    peer = Peer()
    alive = weakref.ref(peer)
    burst = timing.torch_burst(peer.launch, 2, separated=lambda: None)
    del peer
    gc.collect()
    assert alive() is not None
    burst.run(2)
    del burst
    gc.collect()
    assert alive() is None
