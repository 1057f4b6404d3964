"""The microbenchmarks of `calibrate`: each runs a kernel, checks its output, returns constants."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import timing
from experiments.speed.calibrate.constants import (
    NS,
    TIMER,
    Constant,
    clock_rate,
    rates,
    scaled,
    slopes,
    span,
)
from mla_jax.hal import HardwareProfile
from pallas_kernels.hopper import calibration as kernels

TILE_BYTES = 4 * kernels.TILE[0] * kernels.TILE[1]
TILES = 1 << 15  # 1 GiB, far more than L2
L2_TILES = 512  # 16 MiB, which L2 has room for
ALONE = 4000  # tiles of one SM: 125 MiB, so that the next run does not find them in L2
REPEATS = 7
SLACK = 1.05  # a measured number may be so much above a datasheet's peak
SM_BYTES_PER_CYCLE = 128  # that the shared memory of an SM takes or gives at most
SHORT, LONG = 1e-9, 1e-4  # seconds, between which every latency is


class WrongOutputError(RuntimeError):
    """Raised if a kernel has computed something else than it should."""


def _require(right: Any, what: str) -> None:
    if not bool(right):
        raise WrongOutputError(f"wrong output: {what}")


def _ints(*numbers: int) -> jax.Array:
    return jnp.asarray((*numbers, 0, 0)[:3], jnp.int32)


@functools.cache
def _source() -> jax.Array:
    """Tiles to read; the sum of any of their first rows tells which ones they were."""
    tile = jnp.arange(TILES, dtype=jnp.int32)[:, None, None]
    lane = jnp.arange(kernels.TILE[1], dtype=jnp.int32)
    return jnp.broadcast_to(tile * 3 + lane, (TILES, *kernels.TILE)) + jnp.int32(1)


@functools.cache
def _products(ctas: int, warpgroups: int) -> Any:
    return jax.jit(functools.partial(kernels.matrix_products, ctas=ctas, warpgroups=warpgroups))


def _first_rows(tiles: np.ndarray) -> np.ndarray:
    """Returns the first row (int64) of each tile of `_source`."""
    return tiles[..., None] * 3 + np.arange(kernels.TILE[1]) + 1


def _wrapped(total: np.ndarray) -> np.ndarray:
    return total.astype(np.uint64).astype(np.uint32).view(np.int32)


@dataclass(frozen=True)
class Bench:
    """The device to measure and its profile. Each method with a name in BENCHES is a benchmark."""

    profile: HardwareProfile
    sms: int

    @property
    def _sm_peak(self) -> float:
        """B/s between the shared memory of an SM and L2."""
        return SM_BYTES_PER_CYCLE * self.profile["core.clock"] * SLACK

    def _spans(self, run: Callable, count: int, active: int, tiles: int) -> list[float]:
        """Returns seconds of `count` tiles per CTA: twice as many take so much longer."""
        seconds = []
        for _ in range(REPEATS + 1):
            short, long = (span(np.asarray(run(_ints(n * count, active, tiles))[1])[:active])
                           for n in (1, 2))  # fmt: skip
            seconds.append(long - short)
        return seconds[1:]

    def read(self) -> Iterator[Constant]:
        source = _source()
        run = jax.jit(functools.partial(kernels.reads, ctas=self.sms))

        def read(params: jax.Array) -> Any:
            return run(params, source)

        for name, count, active, tiles in (
            ("HBM read", 120, self.sms, TILES),
            ("HBM read of one SM", ALONE, 1, TILES),
            ("L2 read", 400, self.sms, L2_TILES),
        ):
            places = np.arange(count)[:, None] * active + np.arange(active)
            wanted = _wrapped(_first_rows(places % tiles).sum(0))
            got = np.asarray(read(_ints(count, active, tiles))[0])
            _require((got[:active] == wanted).all(), f"the sums of {name}")
            seconds = self._spans(read, count, active, tiles)
            how = f"TMA reads of {TILE_BYTES >> 10} KiB tiles, {active} SMs, {name.split()[0]}"
            found = rates(seconds, count * active * TILE_BYTES)
            peak = self.profile["memory.hbm_bandwidth"]
            if name == "L2 read":
                most = self.sms * self._sm_peak  # a profile's L2 is at least as fast as its HBM
                yield Constant(name, found, "B/s", how, peak, most, "memory.l2_bandwidth")
            elif active == 1:
                yield Constant(name, found, "B/s", how, 1e9, self._sm_peak, "engine.copy")
            else:
                yield Constant(name, found, "B/s", how, peak / 4, peak * SLACK)
                share = scaled(found, 1 / peak)
                yield Constant("HBM read over its peak", share, "1", how, 0.25, 1.0,
                               "memory.hbm_efficiency")  # fmt: skip

    def write(self) -> Iterator[Constant]:
        tile = jnp.arange(kernels.TILE[0] * kernels.TILE[1], dtype=jnp.int32).reshape(kernels.TILE)
        run = jax.jit(functools.partial(kernels.writes, ctas=self.sms, tiles=TILES))

        def write(params: jax.Array) -> Any:
            return run(params, tile)

        peak = self.profile["memory.hbm_bandwidth"]
        for name, count, active, most, field in (
            ("HBM write", 120, self.sms, peak * SLACK, ""),
            ("HBM write of one SM", ALONE, 1, self._sm_peak, "engine.store"),
        ):
            got = write(_ints(count, active, TILES))[0]
            _require((got[: count * active] == tile).all(), f"the tiles of {name}")
            del got
            seconds = self._spans(write, count, active, TILES)
            how = f"TMA writes of {TILE_BYTES >> 10} KiB tiles, {active} SMs"
            found = rates(seconds, count * active * TILE_BYTES)
            yield Constant(name, found, "B/s", how, 1e9, most, field)

    def launch(self) -> Iterator[Constant]:
        x = jnp.arange(128, dtype=jnp.int32)
        _require((jax.jit(kernels.nothing)(x) == x).all(), "the copy of an empty launch")
        q = jnp.zeros(1)
        layers = [x + i for i in range(32)]  # XLA would make one launch of equal ones
        program = timing.compile_model(lambda _, x, __: kernels.nothing(x), q, layers, q)
        burst = program.burst(q, layers, q)
        taken = timing.measure({"launch": burst}, rounds=9, seconds=0.003, pause=0.01)["launch"]
        samples = tuple(us * 1e-6 for us in (taken.low, taken.us, taken.high))
        yield Constant("launch after another", samples, "s",
                       "empty kernels back to back in one program, quartiles", 1e-7, LONG,
                       "latency.second_launch")  # fmt: skip

    def wgmma(self) -> Iterator[Constant]:
        peaks = {jnp.bfloat16: self.profile["engine.tensor_bf16"]}
        peaks |= dict.fromkeys((jnp.int8, jnp.float8_e4m3fn), self.profile["engine.tensor_int8"])
        cases = [(jnp.bfloat16, n, wgs) for n in (64, 128, 256) for wgs in (1, 2)]
        cases += [(dtype, 256, 2) for dtype in (jnp.float8_e4m3fn, jnp.int8)]
        for dtype, n, warpgroups in cases:
            name = f"wgmma {jnp.dtype(dtype).name} 64x{n}, {warpgroups} warpgroups"
            cycles = self._products(name, dtype, n, warpgroups)
            work = 2 * 64 * n * kernels.PRODUCT_K * warpgroups
            unit = "op/cycle" if dtype == jnp.int8 else "flop/cycle"
            field = "engine.tensor_int8" if dtype == jnp.int8 else ""
            yield Constant(name, rates(cycles, work), unit, "products of K 256 per SM, all SMs",
                           peaks[dtype] / 16, peaks[dtype] * 1.01, field)  # fmt: skip

    def _operands(self, dtype: Any, n: int) -> tuple[jax.Array, jax.Array]:
        """Whole numbers so small that sums are exact."""
        draw = np.random.default_rng(n)
        return tuple(
            jnp.asarray(draw.integers(-4, 5, (m, kernels.PRODUCT_K)), jnp.float32).astype(dtype)
            for m in (64, n)
        )  # type: ignore[return-value]

    def _products(self, name: str, dtype: Any, n: int, warpgroups: int) -> list[float]:
        a, b = self._operands(dtype, n)
        run = _products(self.sms, warpgroups)
        # The tensor core keeps about 14 bits of a sum of fp8 products, so few of them are checked.
        is_fp8 = dtype == jnp.float8_e4m3fn
        count = 64
        times = 1 if is_fp8 else count
        got = np.asarray(run(_ints(times), a, b)[0], np.float64)
        wanted = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
        wanted *= times * kernels.ROWS * 3 // 2
        bound = (5e-2 if is_fp8 else 1e-5) * np.abs(wanted).max()
        _require(np.abs(got - wanted).max() <= bound, f"products of {name}")
        return slopes(np.asarray(run(_ints(count), a, b)[1]), count)

    def sustained(self) -> Iterator[Constant]:
        draw = np.random.default_rng(0)
        a, b = (jnp.asarray(draw.normal(size=(m, kernels.PRODUCT_K)), jnp.bfloat16)
                for m in (64, 256))  # fmt: skip
        run = _products(self.sms, 2)
        # About 2 * 4096 cycles per product: 24 * 2000 of them take 0.2 s. Clocks settle first.
        found = [run(_ints(2000), a, b) for _ in range(8)]
        _require(jnp.isfinite(found[-1][0]).all(), "the sustained products")
        clocks = [c for _, stamps in found[4:] for c in clock_rate(np.asarray(stamps))]
        boost = self.profile["core.clock"]
        how = "64x256 bf16 products of normal values on all SMs for a second"
        yield Constant("sustained clock", tuple(clocks), "Hz", how, boost / 4, boost * 1.02)
        ns = [t for _, stamps in found[4:] for t in slopes(np.asarray(stamps), 2000, TIMER)]
        share = 2 * 2 * 64 * 256 * kernels.PRODUCT_K / self.profile["engine.tensor_bf16"] / boost
        yield Constant("sustained bf16 products over the peak at boost clock",
                       rates(scaled(ns, NS), share), "1", how, 0.1, 1.0,
                       "engine.tensor_efficiency")  # fmt: skip

    def elementwise(self) -> Iterator[Constant]:
        draw = np.random.default_rng(1)
        x = jnp.asarray(draw.normal(size=(4, *kernels.PER_WARPGROUP)), jnp.float32)
        count = 200
        got, stamps = jax.jit(kernels.exponentials)(_ints(count), x)
        # Of x = 2^-x, which every start reaches.
        _require(jnp.abs(got - 0.641185744504986).max() < 1e-3, "the exponentials")
        found = rates(slopes(np.asarray(stamps), count), x.size)
        peak = self.profile["engine.sfu"]
        yield Constant("exp2", found, "element/cycle", "2^-x by four warpgroups of one SM",
                       peak / 8, peak * 1.02, "engine.sfu")  # fmt: skip
        got, stamps = jax.jit(kernels.conversions)(_ints(count), x)
        # An even number of steps returns to a number of bfloat16 near x.
        _require(jnp.abs(got - x).max() < 0.1, "the conversions")
        found = rates(slopes(np.asarray(stamps), count), x.size)
        yield Constant("float32 to bfloat16 and back, and a subtraction", found, "element/cycle",
                       "by four warpgroups of one SM", 1, 128)  # fmt: skip

    def _meetings(self, name: str, run: Callable, count: int) -> list[float]:
        """Returns ns per meeting, of a kernel that counts its meetings."""
        samples: list[float] = []
        for _ in range(REPEATS):
            got, stamps = run(_ints(count))
            _require((got == count * kernels.ROWS * 3 // 2).all(), f"the meetings of {name}")
            samples += slopes(np.asarray(stamps), count, TIMER)
        return samples

    def warpgroups(self) -> Iterator[Constant]:
        name = "mbarrier between two warpgroups"
        ns = self._meetings(name, jax.jit(kernels.barrier_exchanges), 5000)
        yield Constant(name, scaled(ns, NS / 2), "s", "half a round trip", SHORT, LONG,
                       "latency.barrier")  # fmt: skip

    def cluster(self) -> Iterator[Constant]:
        name = "cluster barrier"
        ns = self._meetings(name, jax.jit(kernels.cluster_exchanges), 2000)
        yield Constant(name, scaled(ns, NS), "s", "two CTAs, each thread arrives", SHORT, LONG)

    def grid(self) -> Iterator[Constant]:
        name = "grid barrier"
        run = jax.jit(functools.partial(kernels.grid_barriers, ctas=self.sms))
        yield Constant(name, scaled(self._meetings(name, run, 200), NS), "s",
                       f"a counter in L2, {self.sms} CTAs", SHORT, LONG,
                       "latency.grid_sync")  # fmt: skip

    def latency(self) -> Iterator[Constant]:
        run, source = jax.jit(kernels.copy_latency), _source()
        count, step = 1000, 37  # 24000 copies are of different tiles, until they come round
        for name, stride, field in (
            ("TMA copy from L2", 0, ""),
            ("TMA copy from HBM", step, "latency.memory"),
        ):
            got, stamps = run(_ints(count, stride, TILES), source)
            places = np.arange(count * kernels.ROWS * 3 // 2) * stride % TILES
            wanted = _wrapped(_first_rows(places).sum(0))
            _require((np.asarray(got) == wanted).all(), f"the sum of {name}")
            seconds = scaled(slopes(np.asarray(stamps), count, TIMER), NS)
            yield Constant(name, seconds, "s", "512 bytes, one after the other, one CTA",
                           1e-8, 1e-5, field)  # fmt: skip


# In the order of their worth: a run that ends early has the first ones.
BENCHES = (
    "read", "write", "launch", "wgmma", "elementwise", "warpgroups", "cluster", "latency", "grid",
    "sustained",
)  # fmt: skip
