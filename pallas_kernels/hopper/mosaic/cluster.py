"""Writes to the shared memory of the other CTA of a cluster of two, and signals it.

The interpreter can't reach another CTA's shared memory. There the data goes through GMEM, with the
same barriers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import core as jax_core
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax._src.pallas.mosaic_gpu import core as pallas_core
from jax._src.pallas.mosaic_gpu import lowering
from jax._src.state.primitives import get_ref_and_transforms
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.mosaic.threads import (
    ROWS,
    SCALAR,
    WGMMA_OPERAND,
    array_of,
    own_four,
    place_in_tile,
    scalar_of,
)
from pallas_kernels.hopper.mosaic.transposed import COLUMNS


def cluster_barrier(warpgroups: int, *, interpreting: bool) -> plgpu.ClusterBarrier:
    """Returns the barrier that `OtherCta.arrive` and `OtherCta.wait` use.

    warpgroups: how many of each of the two CTAs arrive.
    """
    arrivals = warpgroups * (1 if interpreting else 128)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=arrivals)


@dataclasses.dataclass(frozen=True)
class OtherCta:
    """Exchanges data with the other CTA. All threads of a warpgroup call its methods together.

    Data that one CTA sends can be received once both have arrived on a barrier.

    rank: the index of this CTA in the cluster, 0 or 1.
    through: float32 GMEM [2, rows, columns], which carries the data in the interpreter. On the GPU
        nothing reads it.
    """

    g: Backend
    rank: Any
    through: Any

    def send_tile(self, refs, column: int, value) -> None:
        """Sends a (64, n) WGMMA tile to SMEM refs of the other CTA, for `received_tile`.

        The tile is stored as float32 in the order of its registers, an equal part to each ref.
        column: the tile's first column in `through`.
        """
        if self.g.interpreting:
            self.through[1 - self.rank, :, column : column + value.shape[1]] = value
            return
        of_ref = plgpu.RefType(WGMMA_OPERAND)

        @plgpu.inline_mgpu(arg_types=(*(of_ref for _ in refs), plgpu.Layout.WGMMA, SCALAR))
        def send(ctx, *args):
            del ctx
            *targets, tile, rank = args
            _store_parts(rank.registers.item(), targets, tile.registers)

        send(*refs, value, 1 - self.rank)

    def received_tile(self, refs, column: int, shape) -> jax.Array:
        """Returns the WGMMA tile that the other CTA has sent to these SMEM refs of this CTA."""
        if self.g.interpreting:
            return self.through[self.rank, : shape[0], column : column + shape[1]]
        of_ref = plgpu.RefType(WGMMA_OPERAND)

        @plgpu.inline_mgpu(
            arg_types=tuple(of_ref for _ in refs),
            return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA),
        )
        def load(ctx, *sources):
            del ctx
            f32 = ir.F32Type.get()
            blocks = shape[0] * shape[1] // 512 // len(sources)
            registers = []
            for source in sources:
                first = mgpu.utils.memref_ptr(source)
                start = mgpu.utils.getelementptr(first, [own_four()], f32)
                for j in range(blocks):
                    place = mgpu.utils.getelementptr(start, [512 * j], f32)
                    four = llvm.load(ir.VectorType.get((4,), f32), place, alignment=16)
                    registers += [vector.shuffle(four, four, pair) for pair in ([0, 1], [2, 3])]
            return array_of(registers, shape, mgpu.WGMMA_LAYOUT)

        return load(*refs)

    def send_rows(self, ref, column: int, value) -> None:
        """Sends one value per row, as ROWS, to a SMEM ref of the other CTA."""
        if self.g.interpreting:
            self.through[1 - self.rank, :, column] = value
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, SCALAR))
        def send(ctx, target, rows, rank):
            del ctx
            row, _ = place_in_tile()
            start = _address_in(rank.registers.item(), target, row, 4)
            for i, one in enumerate(rows.registers.flat):
                _store(f"f32 [$0 + {32 * i}], $1", start, scalar_of(one))

        send(ref, value, 1 - self.rank)

    def received_rows(self, ref, column: int) -> jax.Array:
        """Returns the values, as ROWS, that `send_rows` of the other CTA has sent."""
        if self.g.interpreting:
            return self.through[self.rank, :, column]
        return self.g.load_rows(ref)

    def arrive(self, barrier) -> None:
        """Arrives on this barrier of both CTAs.

        Each thread arrives, because each releases only the data that it has sent itself.
        """
        if self.g.interpreting:
            plgpu.barrier_arrive(barrier)
            return
        ref, transforms = get_ref_and_transforms(barrier, None, "arrive")
        assert not transforms
        _arrive_p.bind(ref)

    def wait(self, barrier) -> None:
        """Waits until all have arrived, and makes the data that they have sent visible."""
        plgpu.barrier_wait(barrier)
        if self.g.interpreting:
            return

        @plgpu.inline_mgpu()
        def fence(ctx):
            # The wait itself acquires from this CTA only.
            del ctx
            _fence()

        fence()


@dataclasses.dataclass(frozen=True)
class TransposedOtherCta(OtherCta):
    """`OtherCta` for the transposed kernels, where queries are the columns of a tile."""

    def send_columns(self, ref, row: int, value) -> None:
        """Sends one value per column, as COLUMNS, to a SMEM ref of the other CTA.

        row: the row of `through` that carries the values.
        """
        if self.g.interpreting:
            self.through[1 - self.rank, row] = value
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), COLUMNS, SCALAR))
        def send(ctx, target, columns, rank):
            del ctx
            row, column = place_in_tile()
            start = _address_in(rank.registers.item(), target, column, 4)
            first = arith.cmpi(arith.CmpIPredicate.eq, row, mgpu.utils.c(0, row.type))
            # All lanes of a column hold the same value, so one of them sends it.
            with mgpu.utils.when(first):
                for j, pair in enumerate(columns.registers.flat):
                    two = [vector.extract(pair, [], [i]) for i in range(2)]
                    _store(f"v2.f32 [$0 + {32 * j}], {{$1, $2}}", start, *two)

        send(ref, value, 1 - self.rank)

    def received_columns(self, ref, row: int) -> jax.Array:
        """Returns the values, as COLUMNS, that `send_columns` of the other CTA has sent."""
        if self.g.interpreting:
            return self.through[self.rank, row]
        return plgpu.load(ref, layout=COLUMNS, optimized=False)

    def send_half(self, refs, value) -> jax.Array:
        """Sends half of a (2 m, n) WGMMA tile to the other CTA and returns the other half.

        CTA 0 keeps the first m rows, CTA 1 the last m rows. The half that is sent is stored to
        SMEM refs of the other CTA, for `received_tile`: as float32 in the order of its registers,
        an equal part to each ref.
        """
        m, n = value.shape[0] // 2, value.shape[1]
        if self.g.interpreting:
            self.through[1 - self.rank, :m] = lax.dynamic_slice_in_dim(
                value, (1 - self.rank) * m, m
            )
            return lax.dynamic_slice_in_dim(value, self.rank * m, m)

        of_ref = plgpu.RefType(WGMMA_OPERAND)

        @plgpu.inline_mgpu(
            arg_types=(*(of_ref for _ in refs), plgpu.Layout.WGMMA, SCALAR),
            return_type=plgpu.ShapeDtypeStruct((m, n), jnp.float32, plgpu.Layout.WGMMA),
        )
        def send(ctx, *args):
            del ctx
            *targets, tile, rank = args
            rank = rank.registers.item()  # of the other CTA
            second = arith.cmpi(arith.CmpIPredicate.ne, rank, mgpu.utils.c(0, rank.type))
            halves = list(zip(*tile.registers.reshape(2, -1), strict=True))
            sent = np.empty(len(halves), dtype=object)
            sent[:] = [arith.select(second, b, a) for a, b in halves]
            _store_parts(rank, targets, sent)
            kept = [arith.select(second, a, b) for a, b in halves]
            return array_of(kept, (m, n), mgpu.WGMMA_LAYOUT)

        return send(*refs, value, 1 - self.rank)


def combine_softmax(m, total, m_other, l_other):
    """Combines the softmax statistics of two parts of the keys.

    Args:
        m: running maxima of the scores (log2) of the first part.
        total: sums of 2^(score - m) of the first part.
        m_other, l_other: maxima and sums of the second part.

    Returns:
        Maxima and sums over both parts, and the factors by which to scale o of the first and of the
        second part.
    """
    is_larger = m >= m_other
    factor = jnp.exp2(-jnp.abs(m - m_other))  # of the part with the smaller maximum
    total = jnp.where(is_larger, total, l_other) + factor * jnp.where(is_larger, l_other, total)
    factors = jnp.where(is_larger, 1.0, factor), jnp.where(is_larger, factor, 1.0)
    return jnp.maximum(m, m_other), total, *factors


def _run_ptx(ptx: str, *args: ir.Value, constraints: str = "") -> None:
    """Runs instructions that return nothing."""
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, args, ptx, constraints, has_side_effects=True)


def _fence() -> None:
    _run_ptx("fence.acq_rel.cluster;")


def _in_cta(rank: ir.Value, address: ir.Value) -> ir.Value:
    """Returns where CTA `rank` (i32) has what this CTA has at a shared memory address (i32)."""
    ptx = "mapa.shared::cluster.u32 $0, $1, $2;"
    return llvm.inline_asm(address.type, [address, rank], ptx, "=r,r,r")


def _address_in(rank: ir.Value, ref: ir.Value, index: ir.Value, itemsize: int) -> ir.Value:
    """Returns the address of a SMEM ref's element `index` in CTA `rank`, for `_store`."""
    mine = llvm.ptrtoint(index.type, mgpu.utils.memref_ptr(ref))
    offset = arith.muli(index, mgpu.utils.c(itemsize, index.type))
    return _in_cta(rank, arith.addi(mine, offset))


def _store(operands: str, address: ir.Value, *values: ir.Value) -> None:
    """Stores float32 values to an address of `_address_in`, which is $0 in `operands`."""
    constraints = ",".join(["r", *("f" for _ in values)])
    _run_ptx(f"st.shared::cluster.{operands};", address, *values, constraints=constraints)


def _store_parts(rank: ir.Value, targets: list[ir.Value], registers: np.ndarray) -> None:
    """Stores registers of two values each, an equal part to each SMEM ref of CTA `rank`.

    Each ref gets blocks of 512 values, four neighbouring ones per thread.
    """
    parts = np.split(registers.reshape(-1, 2), len(targets))
    for target, part in zip(targets, parts, strict=True):
        start = _address_in(rank, target, own_four(), 4)
        for j, pairs in enumerate(part):
            four = [vector.extract(pair, [], [i]) for pair in pairs for i in range(2)]
            _store(f"v4.f32 [$0 + {2048 * j}], {{$1, $2, $3, $4}}", start, *four)


# `inline_mgpu` takes no barriers, so this is a primitive of Pallas.
_arrive_p = jax_core.Primitive("arrive_from_each_thread")
_arrive_p.multiple_results = True


@_arrive_p.def_effectful_abstract_eval
def _arrive_abstract_eval(barrier):
    del barrier
    return (), {pallas_core._memory_effect}


@lowering.register_lowering_rule(_arrive_p, mgpu.LoweringSemantics.Lane)
def _arrive_lowering(ctx, barrier):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    mine = llvm.ptrtoint(i32, barrier.barrier.get_ptr())
    _fence()
    # The fence releases what this thread has sent, so the arrivals themselves can be relaxed.
    for rank in (0, 1):
        address = _in_cta(mgpu.utils.c(rank, i32), mine)
        ptx = "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [$0];"
        _run_ptx(ptx, address, constraints="r")
    return ()
