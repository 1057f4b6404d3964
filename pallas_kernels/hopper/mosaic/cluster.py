"""The other CTA of a cluster of two, whose shared memory this one writes.

The interpreter can't reach another CTA's shared memory: there what is sent goes through GMEM, with
the same barriers.
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

from pallas_kernels.hopper.mosaic.primitives import (
    ROWS,
    SCALAR,
    WGMMA_OPERAND,
    Backend,
    array_of,
    own_four,
    place_in_tile,
)
from pallas_kernels.hopper.mosaic.transposed import COLUMNS


def peer_barrier(warpgroups: int, *, interpreting: bool) -> plgpu.ClusterBarrier:
    """For `Peer.arrive` and `wait`: of so many warpgroups in each of the two CTAs."""
    arrivals = warpgroups * (1 if interpreting else 128)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=arrivals)


@dataclasses.dataclass(frozen=True)
class Peer:
    """Called by all threads of a warpgroup. What is sent is there once both have arrived.

    through: where the interpreter has what is sent, float32 [2, rows, columns]; else anything.
    """

    g: Backend
    rank: Any  # of this CTA: 0 or 1
    through: Any

    def send_tile(self, refs, column: int, value) -> None:
        """A (64, n) WGMMA tile, in the order of its registers, to these SMEM refs of the peer.

        float32, an equal part to each ref; for `received_tile`. column: its first in `through`.
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
        """One value a row, as ROWS, to this SMEM ref of the peer; for `received_rows`."""
        if self.g.interpreting:
            self.through[1 - self.rank, :, column] = value
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, SCALAR))
        def send(ctx, target, rows, rank):
            del ctx
            row, _ = place_in_tile()
            start = _address_in(rank.registers.item(), target, row, 4)
            for i, one in enumerate(rows.registers.flat):
                if isinstance(one.type, ir.VectorType):
                    one = vector.extract(one, [], [0])
                _store(f"f32 [$0 + {32 * i}], $1", start, one)

        send(ref, value, 1 - self.rank)

    def received_rows(self, ref, column: int) -> jax.Array:
        if self.g.interpreting:
            return self.through[self.rank, :, column]
        return self.g.load_rows(ref)

    def arrive(self, barrier) -> None:
        """On this barrier of both CTAs: each thread, so that each tells of what it has sent."""
        if self.g.interpreting:
            plgpu.barrier_arrive(barrier)
            return
        ref, transforms = get_ref_and_transforms(barrier, None, "arrive")
        assert not transforms
        _arrive_p.bind(ref)

    def wait(self, barrier) -> None:
        """Until all have arrived; then what they have sent is there."""
        plgpu.barrier_wait(barrier)
        if self.g.interpreting:
            return

        @plgpu.inline_mgpu()
        def fence(ctx):  # (The wait itself acquires from this CTA only.)
            del ctx
            _fence()

        fence()


@dataclasses.dataclass(frozen=True)
class TransposedPeer(Peer):
    """`Peer` where queries are the columns of a tile, as `TransposedBackend` has them."""

    def send_columns(self, ref, row: int, value) -> None:
        """One value a column, as COLUMNS, to this SMEM ref of the peer. row: in `through`."""
        if self.g.interpreting:
            self.through[1 - self.rank, row] = value
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), COLUMNS, SCALAR))
        def send(ctx, target, columns, rank):
            del ctx
            row, column = place_in_tile()
            start = _address_in(rank.registers.item(), target, column, 4)
            first = arith.cmpi(arith.CmpIPredicate.eq, row, mgpu.utils.c(0, row.type))
            with mgpu.utils.when(first):  # (Others have the same values.)
                for j, pair in enumerate(columns.registers.flat):
                    two = [vector.extract(pair, [], [i]) for i in range(2)]
                    _store(f"v2.f32 [$0 + {32 * j}], {{$1, $2}}", start, *two)

        send(ref, value, 1 - self.rank)

    def received_columns(self, ref, row: int) -> jax.Array:
        if self.g.interpreting:
            return self.through[self.rank, row]
        return plgpu.load(ref, layout=COLUMNS, optimized=False)

    def send_half(self, refs, value) -> jax.Array:
        """Of a (2 m, n) WGMMA tile the m rows of the peer's number to these SMEM refs there.

        float32, an equal part to each ref, in the order of registers; for `received_tile`. Returns
        the m rows of this CTA's number.
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
            rank = rank.registers.item()  # of the peer
            second = arith.cmpi(arith.CmpIPredicate.ne, rank, mgpu.utils.c(0, rank.type))
            halves = list(zip(*tile.registers.reshape(2, -1), strict=True))
            given = np.empty(len(halves), dtype=object)
            given[:] = [arith.select(second, b, a) for a, b in halves]
            _store_parts(rank, targets, given)
            kept = [arith.select(second, a, b) for a, b in halves]
            return array_of(kept, (m, n), mgpu.WGMMA_LAYOUT)

        return send(*refs, value, 1 - self.rank)


def joined(m, total, m_other, l_other):
    """Maxima and sums of both, and what a weight of the one and of the other counts (log2)."""
    ahead = m >= m_other
    less = jnp.exp2(-jnp.abs(m - m_other))  # what a weight of the lower maximum counts
    total = jnp.where(ahead, total, l_other) + less * jnp.where(ahead, l_other, total)
    weights = jnp.where(ahead, 1.0, less), jnp.where(ahead, less, 1.0)
    return jnp.maximum(m, m_other), total, *weights


def _no_value(ptx: str, *args: ir.Value, constraints: str = "") -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, args, ptx, constraints, has_side_effects=True)


def _fence() -> None:
    _no_value("fence.acq_rel.cluster;")


def _in_cta(rank: ir.Value, address: ir.Value) -> ir.Value:
    """An address (i32) in shared memory -> the same in CTA `rank` (i32, shared::cluster)."""
    ptx = "mapa.shared::cluster.u32 $0, $1, $2;"
    return llvm.inline_asm(address.type, [address, rank], ptx, "=r,r,r")


def _address_in(rank: ir.Value, ref: ir.Value, index: ir.Value, itemsize: int) -> ir.Value:
    """Of ref's element `index` in CTA `rank`, for `_store`."""
    mine = llvm.ptrtoint(index.type, mgpu.utils.memref_ptr(ref))
    offset = arith.muli(index, mgpu.utils.c(itemsize, index.type))
    return _in_cta(rank, arith.addi(mine, offset))


def _store(what: str, address: ir.Value, *values: ir.Value) -> None:
    constraints = ",".join(["r", *("f" for _ in values)])
    _no_value(f"st.shared::cluster.{what};", address, *values, constraints=constraints)


def _store_parts(rank: ir.Value, targets: list[ir.Value], registers: np.ndarray) -> None:
    """Registers of two values, an equal part to the blocks of 512 of each target in CTA `rank`."""
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
    for rank in (0, 1):
        address = _in_cta(mgpu.utils.c(rank, i32), mine)
        ptx = "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [$0];"
        _no_value(ptx, address, constraints="r")
    return ()
