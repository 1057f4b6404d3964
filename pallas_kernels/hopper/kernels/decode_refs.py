"""What the warpgroups of the decode kernel share: references, barriers, places in outputs."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.cluster import OtherCta, cluster_barrier
from pallas_kernels.hopper.mosaic.primitives import WGMMA_OPERAND, Backend
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.parts.combine import CombineRefs, OutputRows, TileCounter
from pallas_kernels.hopper.parts.kv_load import arrivals, blocks
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.work_items import BLOCK, range_of

LOADER = 2  # number of the loader warpgroup; 0 and 1 compute
STAGES = 2  # of KV blocks, and of work descriptors


class Descriptor(NamedTuple):
    """The work descriptor of a work item: one int32 per field, in shared memory.

    The loader writes it. `Cta.descriptor` returns the reference, and `FIELD` has the indices.
    """

    request: Any  # the first seven are those of `WorkItem`
    row_tile: Any
    block_start: Any
    block_end: Any
    partial: Any
    first_partial: Any
    num_partials: Any
    kv_len: Any  # -1: the request is invalid
    query_len: Any
    invalid: Any  # 1: the cache lacks a page, or the plan is for another length; results are NaN
    unmasked_pairs: Any  # pairs of KV blocks that need no mask for any row of the tile


FIELD = Descriptor(*range(len(Descriptor._fields)))  # the index of each field


class Inputs(NamedTuple):
    q: QueryParts
    pages: Any  # [num_pages, page_size, D]
    requests: Requests
    exchange: Any  # stands for the other CTA's shared memory in the interpreter; else None
    stamps: Any  # `DecodeCall.stamps`


class Partials(NamedTuple):
    """Results of the work items of split tiles, for `merge` or for the end of the launch."""

    o: Any  # [partials, CTAs per tile, kv_lora_rank / 8, 512]: blocks of 64 rows x 8 columns
    lse: Any  # [partials, rows_per_tile]
    scales: Any  # [partials, 2, rows_per_tile]: power of two per row and half of o; None: no scales


class Scratch(NamedTuple):
    """Shared memory of a CTA. "left" and "right" are halves of the latent columns."""

    # `CurrentItem.opaque_zero` is the index into a leading 1, so that loops compute the descriptors
    # of wgmma where they use them.
    q_left: Any  # [1, 64, half]; at the end also staging of o, or what the other CTA sends of o
    q_right: Any
    q_rope: Any  # [1, 64, rope]
    kv_left: Any  # [stages, 64, half]: keys of S and values of O alike
    kv_right: Any
    kv_rope: Any  # [stages, 64, rope]; after the scores of the block, its P
    row_max: Any  # [stages, 64]: the running maximum that belongs to a block's P
    row_sum: Any  # [2, 64]: sums of both computing warpgroups
    descriptors: Any  # [stages, fields of `Descriptor`] int32
    q_full: Any  # 3 copies arrive
    q_empty: Any  # both computing warpgroups arrive
    full_left: Any  # per barrier set (`Loader.barrier_set`); the copies of a block's part arrive
    full_right: Any
    full_rope: Any
    empty_left: Any  # per stage; computing warpgroup 0 arrives, in every CTA that shares the block
    empty_right: Any  # likewise, computing warpgroup 1
    p_ready: Any  # per barrier set; the warpgroup that made P arrives
    sums_ready: Any  # both computing warpgroups arrive
    # Only where two CTAs with a tile each form a cluster (`config.in_pairs`), else None:
    others_max: Any  # [64]: maxima of the other CTA's part of a shared tile
    others_sum: Any
    stats_sent: Any  # both computing warpgroups of both CTAs arrive
    o_sent: Any  # one warpgroup of each CTA arrives
    accumulators: tuple  # stand for wgmma accumulators in the interpreter; else empty

    @staticmethod
    def types(call: DecodeCall, g: Backend) -> "Scratch":
        """Returns the types of the allocations."""
        half, rope = call.kv_lora_rank // 2, call.rope_dim
        in_pairs = call.config.in_pairs

        def tiles(*shape: int) -> Any:
            return plgpu.SMEM(shape, call.q.dtype, transforms=WGMMA_OPERAND)

        def floats(*shape: int) -> Any:
            return plgpu.SMEM(shape, jnp.float32)

        def block_full() -> Any:
            count = arrivals(call.page_size)
            return plgpu.Barrier(num_arrivals=count, num_barriers=2 * STAGES)

        def block_empty() -> Any:
            if call.config.ctas_per_tile == 1:
                return plgpu.Barrier(num_arrivals=1, num_barriers=STAGES)
            return plgpu.ClusterBarrier(
                collective_axes=("cluster",), num_arrivals=1, num_barriers=STAGES
            )

        def of_both_ctas(warpgroups: int) -> Any:
            return cluster_barrier(warpgroups, interpreting=g.interpreting) if in_pairs else None

        return Scratch(
            q_left=tiles(1, BLOCK, half),
            q_right=tiles(1, BLOCK, half),
            q_rope=tiles(1, BLOCK, rope),
            kv_left=tiles(STAGES, BLOCK, half),
            kv_right=tiles(STAGES, BLOCK, half),
            kv_rope=tiles(STAGES, BLOCK, rope),
            row_max=floats(STAGES, BLOCK),
            row_sum=floats(2, BLOCK),
            descriptors=plgpu.SMEM((STAGES, len(Descriptor._fields)), jnp.int32),
            q_full=plgpu.Barrier(num_arrivals=3),
            q_empty=plgpu.Barrier(num_arrivals=2),
            full_left=block_full(),
            full_right=block_full(),
            full_rope=block_full(),
            empty_left=block_empty(),
            empty_right=block_empty(),
            p_ready=plgpu.Barrier(num_arrivals=1, num_barriers=2 * STAGES),
            sums_ready=plgpu.Barrier(num_arrivals=2),
            others_max=floats(BLOCK) if in_pairs else None,
            others_sum=floats(BLOCK) if in_pairs else None,
            stats_sent=of_both_ctas(2),
            o_sent=of_both_ctas(1),
            accumulators=g.accumulator_scratch(2, *accumulator_shapes(call)),
        )


def accumulator_shapes(call: DecodeCall) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a computing warpgroup's half of O, and of S of a block."""
    return (BLOCK, call.kv_lora_rank // 2), (BLOCK, BLOCK)


class Columns(NamedTuple):
    """Some columns of q and of KV: where they begin, how many, their shared memory, barriers."""

    start: int
    width: int
    q: Any
    kv: Any
    full: Any
    empty: Any | None


@dataclasses.dataclass(frozen=True)
class Cta:
    """One CTA of the launch.

    rank: its number in the cluster. range_ref: its worker's row of the work list's ranges.
    """

    call: DecodeCall
    g: Backend
    inputs: Inputs
    outputs: Outputs
    partials: Partials
    scratch: Scratch
    rank: Any
    range_ref: Any
    other_cta: OtherCta

    @property
    def stamps(self) -> Stamps:
        return Stamps(self.inputs.stamps)

    @property
    def half(self) -> int:
        """Latent columns of each computing warpgroup."""
        return self.call.kv_lora_rank // 2

    @property
    def ctas_per_tile(self) -> int:
        """CTAs that share a tile and its KV blocks, 64 rows each: 1 or 2."""
        return self.call.config.ctas_per_tile

    @property
    def in_pairs(self) -> bool:
        """Whether the CTAs of a cluster have tiles of their own."""
        return self.call.config.in_pairs

    @property
    def scaled_partials(self) -> bool:
        """Whether partial results have a power-of-two scale per row."""
        return self.partials.scales is not None

    @functools.cached_property
    def columns(self) -> tuple[Columns, Columns, Columns]:
        """The left half of the latent, its right half, and the rope columns.

        The rope stage of a block holds its P as well, so it is free when both halves are.
        """
        s, half = self.scratch, self.half
        return (
            Columns(0, half, s.q_left, s.kv_left, s.full_left, s.empty_left),
            Columns(half, half, s.q_right, s.kv_right, s.full_right, s.empty_right),
            Columns(2 * half, self.call.rope_dim, s.q_rope, s.kv_rope, s.full_rope, None),
        )

    @functools.cached_property
    def kv_blocks(self) -> Any:
        table = self.inputs.requests.block_tables
        return blocks(self.g, table, self.inputs.pages, self.ctas_per_tile)

    @property
    def item_range(self) -> tuple[Any, Any]:
        """The worker's items, from and to."""
        return range_of(self.range_ref)

    def part_of_tile(self) -> Any:
        """Returns which 64 rows of its tile this CTA has.

        It is read where it is needed, so that it holds no register.
        """
        return 0 if self.in_pairs else self.g.cta_of_cluster()

    def first_row(self, row_tile: Any) -> Any:
        """Returns this CTA's first row of a tile."""
        return (row_tile * self.ctas_per_tile + self.part_of_tile()) * BLOCK

    def rows_of(self, request: Any, row_tile: Any) -> Rows:
        """Returns this CTA's rows of a tile in the outputs."""
        return self.call.rows_of(request, self.first_row(row_tile), BLOCK)

    def place(self, request: Any, row_tile: Any) -> OutputRows:
        return OutputRows(self.rows_of(request, row_tile), self.part_of_tile())

    def counter_of(self, request: Any, row_tile: Any, items: Any) -> TileCounter:
        """Returns the counter with which `items` work items of a tile wait for each other."""
        tile = self.call.plan.tile_of(request, row_tile)
        counter = tile * self.ctas_per_tile + self.part_of_tile()
        counters = self.inputs.requests.work.counters
        return TileCounter(self.g, counters, counter, writers=2 * items, combiners=2 * items)

    @property
    def combine_refs(self) -> CombineRefs:
        return CombineRefs(
            self.partials.o,
            self.partials.lse,
            self.outputs.o,
            self.outputs.lse,
            self.partials.scales,
        )

    def descriptor(self, n: Any) -> Any:
        """Returns the `Descriptor` in shared memory of the worker's n-th work item."""
        return self.scratch.descriptors.at[n % STAGES]

    def p_of(self, stage: Any) -> Any:
        """Returns where P of a block is: in the place of its rope keys."""
        rope = self.scratch.kv_rope.at[stage]
        return rope if self.call.rope_dim == BLOCK else rope.at[:, pl.ds(0, BLOCK)]
