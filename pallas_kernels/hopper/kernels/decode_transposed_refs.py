"""What a CTA of `decode_transposed` has: sizes, references, barriers, and its place in the plan."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import DecodeTransposedConfig
from pallas_kernels.hopper.mosaic.cluster import TransposedOtherCta, cluster_barrier
from pallas_kernels.hopper.mosaic.primitives import WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.transposed import WARPS, TransposedBackend
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.parts.kv_load import arrivals, blocks
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Partials, Results
from pallas_kernels.hopper.work_items import BLOCK, WorkItem, range_of, run_items

COMPUTING, LOADING = 0, 1  # the warpgroups of a CTA
WARPGROUPS = 2


class PerPart(NamedTuple):
    """A value for each part of a cache entry, in the order in which the parts are loaded.

    The rope part is first: only the halves of the latent part are in use again, as V.
    """

    rope: Any
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of a launch."""

    rows: int  # query rows per tile
    latent: int  # kv_lora_rank
    rope: int
    q_stages: int
    kv_stages: PerPart
    in_pairs: bool  # CTAs 2i and 2i + 1 are a cluster, and combine a tile in shared memory

    @staticmethod
    def of(call: DecodeCall[DecodeTransposedConfig]) -> "Sizes":
        left, right, rope = call.config.kv_stages
        return Sizes(
            rows=call.config.rows_per_tile,
            latent=call.kv_lora_rank,
            rope=call.rope_dim,
            q_stages=call.config.q_stages,
            kv_stages=PerPart(rope, left, right),
            in_pairs=call.config.in_pairs,
        )

    @property
    def half(self) -> int:
        """Columns of the left part, and of the right part."""
        return self.latent // 2

    @property
    def first_columns(self) -> PerPart:
        """The first column of each part, in q and in the cache."""
        return PerPart(2 * self.half, 0, self.half)

    @property
    def widths(self) -> PerPart:
        """How many columns each part has."""
        return PerPart(self.rope, self.half, self.half)

    @property
    def output_tile(self) -> tuple[int, int]:
        """The shape of O^T."""
        return self.latent, self.rows

    @property
    def score_tile(self) -> tuple[int, int]:
        """The shape of S^T."""
        return BLOCK, self.rows


class Inputs(NamedTuple):
    """What the kernel reads: arrays outside, references inside."""

    q: QueryParts  # a multiple of rows_per_tile rows
    cache: Any  # [num_pages, page_size, kv_lora_rank + rope_dim]
    requests: Requests
    # [clusters, 2, kv_lora_rank + 2, rows_per_tile] float32. In the interpreter it replaces the
    # shared memory of the other CTA. None on the GPU, and where CTAs are not in pairs.
    exchange: Any | None
    stamps: Any | None  # `DecodeCall.stamps`


class PairScratch(NamedTuple):
    """What a CTA has for a tile that it shares with the other CTA of its cluster.

    Every thread of both computing warpgroups arrives at the barriers, once per shared tile.
    """

    softmax: Any  # [2, rows]: the other CTA's maxima and sums, which the other CTA stores here
    softmax_sent: Any  # Maxima and sums are stored, and q is no longer in use.
    output_sent: Any  # Half of O^T is stored.

    @staticmethod
    def types(g: TransposedBackend, sizes: Sizes) -> "PairScratch":
        return PairScratch(
            softmax=plgpu.SMEM((2, sizes.rows), jnp.float32),
            softmax_sent=cluster_barrier(1, interpreting=g.interpreting),
            output_sent=cluster_barrier(1, interpreting=g.interpreting),
        )


class Scratch(NamedTuple):
    """The shared memory and the barriers of a CTA; the first dimension counts stages.

    A stage of q holds a work item's tile, a stage of kv one part of a block.
    """

    q: PerPart  # [q_stages, rows, width]
    kv: PerPart  # [kv_stages, BLOCK, width]
    p: Any  # [rows, BLOCK]: P of the current block, an operand of V^T P^T
    maxima: Any  # [WARPS, rows]: the warps combine the maxima of a block here
    sums: Any  # [WARPS, rows]: the warps combine the sums of a work item here
    invalid: Any  # [q_stages] int32: 1 where the plan or a page of the work item is invalid
    q_full: Any  # [q_stages]: three copies arrive, one per part
    q_empty: Any  # [q_stages]: the computing warpgroup arrives after the item's last block
    kv_full: PerPart  # [kv_stages]: the copies arrive, or the loader, once per gathered block
    kv_empty: PerPart  # [kv_stages]: the computing warpgroup arrives after its last read
    pair: PairScratch | None  # None: CTAs are not in pairs
    accumulators: tuple  # O^T and S^T in the interpreter, empty on the GPU

    @staticmethod
    def types(g: TransposedBackend, call: DecodeCall, sizes: Sizes) -> "Scratch":
        """Returns what to allocate."""

        def operand(*shape):
            return plgpu.SMEM(shape, call.q.dtype, transforms=WGMMA_OPERAND)

        def barriers(num_arrivals: int, stages: int):
            return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=stages)

        rows, stages, widths = sizes.rows, sizes.kv_stages, sizes.widths
        copies = arrivals(call.page_size)
        return Scratch(
            q=PerPart(*(operand(sizes.q_stages, rows, width) for width in widths)),
            kv=PerPart(
                *(operand(n, BLOCK, width) for n, width in zip(stages, widths, strict=True))
            ),
            p=operand(rows, BLOCK),
            maxima=plgpu.SMEM((WARPS, rows), jnp.float32),
            sums=plgpu.SMEM((WARPS, rows), jnp.float32),
            invalid=plgpu.SMEM((sizes.q_stages,), jnp.int32),
            q_full=barriers(3, sizes.q_stages),
            q_empty=barriers(1, sizes.q_stages),
            kv_full=PerPart(*(barriers(copies, n) for n in stages)),
            kv_empty=PerPart(*(barriers(1, n) for n in stages)),
            pair=PairScratch.types(g, sizes) if sizes.in_pairs else None,
            accumulators=g.accumulator_scratch(1, sizes.output_tile, sizes.score_tile),
        )


class Part(NamedTuple):
    """One part of a cache entry: its columns, its stages and their barriers."""

    column: int
    width: int
    num_stages: int
    q: Any
    kv: Any
    full: Any
    empty: Any

    def stage_of(self, block: Any) -> Any:
        """Returns the stage of a block, which is counted over all work items of the CTA."""
        return lax.rem(block, self.num_stages)

    def release(self, stage: Any) -> None:
        """Signals that the computing warpgroup no longer reads a stage."""
        plgpu.barrier_arrive(self.empty.at[stage])


class Pair(NamedTuple):
    """The cluster of two CTAs that this CTA belongs to."""

    rank: Any  # of this CTA: 0 or 1
    other: TransposedOtherCta  # the other CTA
    scratch: PairScratch


@dataclasses.dataclass(frozen=True)
class Cta:
    """A CTA of the launch: what both of its warpgroups have."""

    g: TransposedBackend
    call: DecodeCall
    sizes: Sizes
    inputs: Inputs
    outputs: Outputs
    partials: Partials
    scratch: Scratch
    range: Any  # the CTA's row of `WorkList.ranges`
    items: tuple[Any, Any]  # the CTA's range of work items, from and to
    pair: Pair | None  # None: CTAs are not in pairs

    @staticmethod
    def of_grid(
        g: TransposedBackend,
        call: DecodeCall,
        sizes: Sizes,
        inputs: Inputs,
        outputs: Outputs,
        partials: Partials,
        scratch: Scratch,
    ) -> "Cta":
        """Returns the CTA that runs this code."""
        number = group = lax.axis_index("group")  # A group is a CTA, or a cluster of two.
        pair = None
        if scratch.pair is not None:
            rank = lax.axis_index("cluster")
            number = 2 * group + rank
            exchange = None if inputs.exchange is None else inputs.exchange.at[group]
            pair = Pair(rank, TransposedOtherCta(g, rank, exchange), scratch.pair)
        row = inputs.requests.work.ranges.at[number]
        refs = inputs, outputs, partials, scratch
        return Cta(g, call, sizes, *refs, row, range_of(row), pair)

    @property
    def parts(self) -> PerPart:
        """A `Part` for each part of a cache entry."""
        sizes, scratch = self.sizes, self.scratch
        columns = sizes.first_columns, sizes.widths, sizes.kv_stages
        refs = scratch.q, scratch.kv, scratch.kv_full, scratch.kv_empty
        return PerPart(*(Part(*part) for part in zip(*columns, *refs, strict=True)))

    @property
    def kv_blocks(self) -> Any:
        """How blocks are loaded: copied by TMA, or gathered where pages are small."""
        return blocks(self.g, self.inputs.requests.block_tables, self.inputs.cache)

    @property
    def stamps(self) -> Stamps:
        return Stamps(self.inputs.stamps)

    @property
    def results(self) -> Results:
        """Where results go. One warpgroup stores partial results, both combine them."""
        refs = self.inputs.requests, self.outputs, self.partials
        return Results(self.g, self.call, *refs, writers=1, combining=WARPGROUPS)

    def lengths(self, item: WorkItem) -> tuple[Any, Any]:
        """Returns (kv length, query length) of an item's request; a kv length of -1: invalid."""
        return self.call.lengths(self.inputs.requests, item.request)

    def run_items(self, run: Callable[[Any, Any, WorkItem], None]) -> None:
        """Calls run(number, KV blocks of the items before, item) for each of the CTA's items."""
        items = self.inputs.requests.work.items
        run_items(self.items, self.range, items, run, in_pairs=self.sizes.in_pairs)

    def kv_stages(self) -> Iterator[tuple[Part, int]]:
        """Yields each part with each of its stages."""
        for part in self.parts:
            for stage in range(part.num_stages):
                yield part, stage
