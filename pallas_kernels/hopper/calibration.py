"""Small kernels that each repeat one operation between two time stamps.

A stamp is the SM's clock and the device's timer. How often a kernel repeats is a number that it
reads, so that the compiler can't know it. Rows alternate between `count` and `2 * count`
repetitions: the difference of their times has no fixed cost.

Every function takes `params`, int32 [3], and returns (result, stamps). The stamps are int32
[CTAs, warpgroups, 1, rows, 2, 2]: start and end, each as (clock, timer in ns), modulo 2^32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.cluster import OtherCta, cluster_barrier
from pallas_kernels.hopper.mosaic.control import stamp_clock
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, Backend
from pallas_kernels.hopper.mosaic.threads import THREADS
from pallas_kernels.hopper.mosaic.wgmma import operand

ROWS = 16  # of `count` and `2 * count` repetitions in turns
TILE = (64, 128)  # int32, 32 KiB: what a CTA copies at once
SLOTS = 6  # tiles in flight per CTA
PRODUCT_K = 256  # of a product that `matrix_products` repeats
PER_WARPGROUP = (64, 32)  # float32 of `exponentials` and `conversions`
_G = Backend(interpreting=False)
# Pallas places barriers before copies that reuse shared memory.
_SAFE = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def _repeat(stamps: Any, count: Any, step: Callable, carry: Any, rows: int = ROWS) -> Any:
    """Runs step(i, carry) `count` or `2 * count` times per row, between stamps."""

    def row(r: Any, carry: Any) -> Any:
        stamp_clock(stamps, (0, r), 0, rows=rows, timer=True)
        carry = lax.fori_loop(0, count * (1 + (r & 1)), step, carry)
        stamp_clock(stamps, (0, r), 1, rows=rows, timer=True)
        return carry

    return lax.fori_loop(0, rows, row, carry)


def _launch(
    body: Callable,
    inputs: Sequence[Any],
    out: jax.ShapeDtypeStruct,
    scratch: Sequence[Any],
    *,
    ctas: int,
    warpgroups: int = 1,
    rows: int = ROWS,
    cluster: bool = False,
    parameters: plgpu.CompilerParams = OWN_BARRIERS,
) -> tuple[jax.Array, jax.Array]:
    """Runs body(*inputs, stamps, out, *scratch) in every warpgroup."""
    stamps = jax.new_ref(jnp.zeros((ctas, warpgroups, 1, rows, 2, 2), jnp.int32))
    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=list(scratch),
        grid=(ctas // 2 if cluster else ctas,),
        grid_names=("cta",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=parameters,
        cluster=(2,) if cluster else (),
        cluster_names=("cluster",) if cluster else (),
    )
    result = kernel(*inputs, stamps)
    return result, stamps[...]


def reads(params: jax.Array, source: jax.Array, *, ctas: int) -> tuple[jax.Array, jax.Array]:
    """Reads tiles by TMA through a ring of buffers; returns the sum of each CTA's first rows.

    params: (tiles per CTA, CTAs that read, tiles of the source that they share). CTA c's tile i is
    (i * CTAs + c) modulo tiles. source: int32 [tiles or more, *TILE]. The result is int32
    [ctas, 128]. Stamps have one row, around everything.
    """

    def body(params, source, stamps, out, slots, full):
        cta = lax.axis_index("cta")
        active, tiles = params[1], params[2]
        count = jnp.where(cta < active, params[0], 0)

        def start(i, slot):
            tile = lax.rem(i * active + cta, tiles)
            plgpu.copy_gmem_to_smem(source.at[tile], slots.at[slot], full.at[slot])

        def step(i, total):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(full.at[slot])
            total += plgpu.load(slots.at[slot, 0], layout=THREADS, optimized=False)
            pl.when(i + SLOTS < count)(lambda: start(i + SLOTS, slot))
            return total

        stamp_clock(stamps, (0, 0), 0, rows=1, timer=True)
        for slot in range(SLOTS):
            pl.when(slot < count)(functools.partial(start, jnp.int32(slot), slot))
        zeros = plgpu.layout_cast(jnp.zeros((128,), jnp.int32), THREADS)
        total = lax.fori_loop(0, count, step, zeros)
        stamp_clock(stamps, (0, 0), 1, rows=1, timer=True)
        out[cta] = total

    scratch = (plgpu.SMEM((SLOTS, *TILE), jnp.int32), plgpu.Barrier(num_barriers=SLOTS))
    out = jax.ShapeDtypeStruct((ctas, 128), jnp.int32)
    return _launch(body, (params, source), out, scratch, ctas=ctas, rows=1, parameters=_SAFE)


def writes(
    params: jax.Array, tile: jax.Array, *, ctas: int, tiles: int
) -> tuple[jax.Array, jax.Array]:
    """Writes a tile by TMA to many places; returns int32 [tiles, *TILE].

    params: as in `reads`, where the last number is at most `tiles`. Tiles that no CTA writes are
    not initialized. Stamps have one row, around everything.
    """

    def body(params, source, stamps, out, slot, full):
        cta = lax.axis_index("cta")
        active, places = params[1], params[2]
        count = jnp.where(cta < active, params[0], 0)
        plgpu.copy_gmem_to_smem(source, slot, full)
        plgpu.barrier_wait(full)

        def step(i, _):
            plgpu.copy_smem_to_gmem(slot, out.at[lax.rem(i * active + cta, places)])
            plgpu.wait_smem_to_gmem(SLOTS)

        stamp_clock(stamps, (0, 0), 0, rows=1, timer=True)
        lax.fori_loop(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)
        stamp_clock(stamps, (0, 0), 1, rows=1, timer=True)

    scratch = (plgpu.SMEM(TILE, jnp.int32), plgpu.Barrier())
    out = jax.ShapeDtypeStruct((tiles, *TILE), jnp.int32)
    return _launch(body, (params, tile), out, scratch, ctas=ctas, rows=1, parameters=_SAFE)


def copy_latency(params: jax.Array, source: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One CTA copies 512 bytes by TMA and waits, again and again; returns their sum, int32 [128].

    params: (copies, tiles to step over, tiles of the source). Copy i is the first row of tile
    i * step modulo tiles, where i goes on from row to row. A step of 0 finds the row in L2.
    source: int32 [tiles or more, *TILE].
    """

    def body(params, source, stamps, out, slot, full):
        stride, tiles = params[1], params[2]

        def step(_, carry):
            tile, total = carry
            plgpu.copy_gmem_to_smem(source.at[tile, pl.ds(0, 1)], slot, full)
            plgpu.barrier_wait(full)
            total += plgpu.load(slot.at[0], layout=THREADS, optimized=False)
            return lax.rem(tile + stride, tiles), total

        zeros = plgpu.layout_cast(jnp.zeros((128,), jnp.int32), THREADS)
        _, total = _repeat(stamps, params[0], step, (jnp.int32(0), zeros))
        out[...] = total

    scratch = (plgpu.SMEM((1, 128), jnp.int32), plgpu.Barrier())
    out = jax.ShapeDtypeStruct((128,), jnp.int32)
    return _launch(body, (params, source), out, scratch, ctas=1, parameters=_SAFE)


def matrix_products(
    params: jax.Array, a: jax.Array, b: jax.Array, *, ctas: int, warpgroups: int
) -> tuple[jax.Array, jax.Array]:
    """Each warpgroup adds a @ b.T to its accumulator, again and again, by wgmma.

    params: (products, unused, unused). a: [64, PRODUCT_K], b: [n, PRODUCT_K], of bfloat16,
    float8_e4m3fn or int8. Returns [ctas * warpgroups, 64, n] of float32, or of int32 for int8.
    """
    n = b.shape[0]
    dtype = jnp.int32 if a.dtype == jnp.int8 else jnp.float32

    def body(params, a, b, stamps, out, a_slot, b_slot, full):
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(a, a_slot, full)
            plgpu.copy_gmem_to_smem(b, b_slot, full)

        plgpu.barrier_wait(full)

        def products(acc):
            def step(_, carry):
                _G.mma_t(acc, a_slot, b_slot)
                plgpu.wgmma_wait(1)
                return carry

            _repeat(stamps, params[0], step, jnp.int32(0))
            out[cta * warpgroups + wg] = plgpu.wgmma_accumulator_load(acc, wait_n=0)

        pl.run_scoped(products, plgpu.ACC((64, n), dtype))

    tiled = operand(a.dtype.itemsize)
    scratch = (
        plgpu.SMEM(a.shape, a.dtype, transforms=tiled),
        plgpu.SMEM(b.shape, b.dtype, transforms=tiled),
        plgpu.Barrier(num_arrivals=2),
    )
    out = jax.ShapeDtypeStruct((ctas * warpgroups, 64, n), dtype)
    return _launch(body, (params, a, b), out, scratch, ctas=ctas, warpgroups=warpgroups)


def _elementwise(params: jax.Array, x: jax.Array, step: Callable) -> tuple[jax.Array, jax.Array]:
    """Four warpgroups of one SM apply step again and again to x, float32 [4, *PER_WARPGROUP]."""

    def body(params, x, stamps, out):
        wg = lax.axis_index("wg")
        value = plgpu.load(x.at[wg], layout=plgpu.Layout.WGMMA, optimized=False)
        out[wg] = _repeat(stamps, params[0], lambda _, value: step(value), value)

    return _launch(body, (params, x), jax.ShapeDtypeStruct(x.shape, x.dtype), (), ctas=1,
                   warpgroups=4)  # fmt: skip


def exponentials(params: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Repeats x = 2^(-x); params: (repetitions, unused, unused)."""
    return _elementwise(params, x, lambda value: jnp.exp2(-value))


def conversions(params: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Repeats x = -(x rounded to bfloat16) - 1; params: (repetitions, unused, unused)."""
    return _elementwise(
        params, x, lambda value: -1.0 - value.astype(jnp.bfloat16).astype(jnp.float32)
    )


def barrier_exchanges(params: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two warpgroups of one CTA wait for each other in turns, by two mbarriers.

    params: (round trips, unused, unused). Returns int32 [2, 128]: round trips of each warpgroup.
    """

    def body(params, stamps, out, there, back):
        wg = lax.axis_index("wg")

        def first(_, count):
            plgpu.barrier_arrive(there)
            plgpu.barrier_wait(back)
            return count + 1

        def second(_, count):
            plgpu.barrier_wait(there)
            plgpu.barrier_arrive(back)
            return count + 1

        for number, step in enumerate((first, second)):

            @pl.when(wg == number)
            def _(number=number, step=step):
                count = _repeat(stamps, params[0], step, jnp.int32(0))
                out[number] = jnp.broadcast_to(count, (128,))

    scratch = (plgpu.Barrier(), plgpu.Barrier())
    out = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    return _launch(body, (params,), out, scratch, ctas=1, warpgroups=2)


def cluster_exchanges(params: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two CTAs of a cluster meet again and again; params: (meetings, unused, unused).

    Returns int32 [2, 128]: meetings of each CTA.
    """

    def body(params, stamps, out, barrier):
        rank = lax.axis_index("cluster")
        other = OtherCta(_G, rank, None)

        def step(_, count):
            other.arrive(barrier)
            other.wait(barrier)
            return count + 1

        count = _repeat(stamps, params[0], step, jnp.int32(0))
        out[rank] = jnp.broadcast_to(count, (128,))

    scratch = (cluster_barrier(1, interpreting=False),)
    out = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    return _launch(body, (params,), out, scratch, ctas=2, cluster=True)


def grid_barriers(params: jax.Array, *, ctas: int) -> tuple[jax.Array, jax.Array]:
    """All CTAs meet again and again through a counter in GMEM, as the decode kernels do.

    params: (meetings, unused, unused). All CTAs must be resident. Returns int32 [ctas, 128].
    """
    counter = jax.new_ref(jnp.zeros((1,), jnp.int32))

    def body(params, counter, stamps, out):
        cta = lax.axis_index("cta")

        def step(_, count):
            _G.count_up(counter, jnp.int32(0), jnp.int32(2**30), publishes=True)
            _G.wait_for(counter, jnp.int32(0), (count + 1) * ctas)
            return count + 1

        count = _repeat(stamps, params[0], step, jnp.int32(0))
        out[cta] = jnp.broadcast_to(count, (128,))

    out = jax.ShapeDtypeStruct((ctas, 128), jnp.int32)
    return _launch(body, (params, counter), out, (), ctas=ctas)


def nothing(x: jax.Array) -> jax.Array:
    """A kernel of one CTA that copies int32 [128]."""

    def body(x, out):
        out[...] = plgpu.load(x, layout=THREADS, optimized=False)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((128,), jnp.int32), compiler_params=OWN_BARRIERS
    )(x)
