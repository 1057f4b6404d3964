"""What the warpgroups of `decode_int8` share: memory, barriers, the work item, where results go."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.merge import Meeting
from pallas_kernels.hopper.mosaic.dequantize import GROUP, INT8_OPERAND, WideningBackend
from pallas_kernels.hopper.mosaic.primitives import WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.rows import Rows
from pallas_kernels.hopper.mosaic.transposed import WARPS
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.work_items import BLOCK, range_of

QUERIES = 64  # query rows per tile: the columns of S^T and of O^T
STEP_TOKENS = 32  # tokens of V^T that are dequantized at a time: what the registers allow
OUTPUT_WARPGROUPS = 2  # warpgroups 0 and 1 compute half of the dimensions of O^T each
SOFTMAX_WARPGROUP = 2
LOADER_WARPGROUP = 3
WARPGROUPS = 4
DISCARDED = 2**31 - 1  # the partial index of a result that nobody stores

TILE = (BLOCK, QUERIES)  # the shape of S^T and P^T of one KV block

# wgmma takes STEP_TOKENS tokens of P^T at a time, so a swizzled line has as many columns.
P_OPERAND = (
    plgpu.TilingTransform((8, STEP_TOKENS)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(STEP_TOKENS * 2),  # type: ignore[abstract]
)


class Int8Cache(NamedTuple):
    """The paged cache."""

    latent: Any  # [N, page_size, kv_lora_rank] int8
    rope: Any  # [N, page_size, rope_dim] bfloat16
    scales: Any  # [N, page_size] float32: a token's latent is its int8 values times its scale


class Inputs(NamedTuple):
    """What the kernel reads."""

    q: Any  # [B, R or more, kv_lora_rank + rope_dim] bfloat16
    cache: Int8Cache
    requests: Requests


class Partials(NamedTuple):
    """The results of work items that are a part of a split tile. The fields are as in `Outputs`."""

    o: Any  # [partials, QUERIES, kv_lora_rank]
    lse: Any  # [partials, QUERIES] float32, natural log


class Descriptor(NamedTuple):
    """The work descriptor: one int32 per field, in shared memory.

    The loader writes all fields but the last, which the softmax warpgroup writes. Only these two
    warpgroups read it.
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
    first_stage: Any  # the stage of the first block
    invalid: Any  # not 0: the cache lacks a page, or the plan is for another length
    items_left: Any  # work items that the CTA still has to do, this one included
    repeats: Any  # 1: the item is computed a second time, with running maxima


FIELD = Descriptor(*range(len(Descriptor._fields)))  # the place of each field


class Destination(NamedTuple):
    """Where the result of a work item goes."""

    request: Any
    row_tile: Any
    partial: Any  # -1: the output; DISCARDED: nowhere
    num_partials: Any  # of the tile

    @staticmethod
    def read(ref: Any) -> "Destination":
        """Returns the destination in a ref of four int32."""
        return Destination(*(ref[i] for i in range(len(Destination._fields))))


class Scratch(NamedTuple):
    """Shared memory and barriers. A stage holds one KV block, its P^T and what belongs to both."""

    # Of the work item in hand. The softmax warpgroup writes and reads all five.
    q_latent: Any  # int8: the high parts of all queries, then the low parts
    q_rope: Any
    q_steps: Any  # float32 per query: what a step of q is worth, times the softmax scale
    visible_keys: Any  # int32 per query: it attends to keys 0 .. n - 1
    # Per stage. The loader writes the keys and their scales, the softmax warpgroup writes P^T.
    latent: Any
    rope: Any
    p: Any  # P^T
    token_scales: Any
    # Of the softmax warpgroup, except for the factors, which the output warpgroups read.
    maxima: Any  # row 0: the maximum per query, log2 units; row 1: 1.0 where no score has set it
    of_warps: Any  # a row per warp, for reductions over the tokens of a block
    factors: Any  # per stage: what O is multiplied by before the block is added
    rescales: Any  # int32 per stage: 0 where all of these factors are 1
    # The result's. The softmax warpgroup writes both, the output warpgroups read them.
    inverse_sums: Any
    destination: Any  # a `Destination`
    descriptor: Any  # a `Descriptor`
    # Barriers. `Kernel` names the single barriers of the last two arrays.
    full: Any  # per stage; the copies of latent, rope keys and scales arrive
    by_outputs: Any  # each output warpgroup arrives once
    by_one: Any  # one warpgroup arrives once
    accumulators: tuple[Any, ...]  # the interpreter's O^T; nothing on a GPU

    @staticmethod
    def types(call: DecodeCall, g: WideningBackend) -> "Scratch":
        """Returns shapes and layouts for a call."""
        stages, latent = call.tiles.kv_stages, call.kv_lora_rank

        def operand(*shape: int) -> Any:
            return plgpu.SMEM(shape, call.q.dtype, transforms=WGMMA_OPERAND)

        def int8_operand(*shape: int) -> Any:
            return plgpu.SMEM(shape, jnp.int8, transforms=INT8_OPERAND)

        def floats(*shape: int) -> Any:
            return plgpu.SMEM(shape, jnp.float32)

        def integers(*shape: int) -> Any:
            return plgpu.SMEM(shape, jnp.int32)

        return Scratch(
            q_latent=int8_operand(1, 2 * QUERIES, latent),
            q_rope=operand(1, QUERIES, call.rope_dim),
            q_steps=floats(1, QUERIES),
            visible_keys=integers(1, QUERIES),
            latent=int8_operand(stages, BLOCK, latent),
            rope=operand(stages, BLOCK, call.rope_dim),
            p=plgpu.SMEM((stages, *TILE), call.q.dtype, transforms=P_OPERAND),
            token_scales=floats(stages, BLOCK),
            maxima=floats(2, QUERIES),
            of_warps=floats(WARPS, QUERIES),
            factors=floats(stages, QUERIES),
            rescales=integers(stages),
            inverse_sums=floats(1, QUERIES),
            destination=integers(len(Destination._fields)),
            descriptor=integers(len(Descriptor._fields)),
            full=plgpu.Barrier(num_arrivals=len(Int8Cache._fields), num_barriers=stages),
            by_outputs=plgpu.Barrier(num_arrivals=OUTPUT_WARPGROUPS, num_barriers=stages + 1),
            by_one=plgpu.Barrier(num_arrivals=1, num_barriers=stages + 4),
            accumulators=g.accumulator_scratch(
                OUTPUT_WARPGROUPS, (latent // OUTPUT_WARPGROUPS, QUERIES)
            ),
        )


def opaque_zero(i: Any) -> Any:
    """Returns 0, computed from a number in 0 .. 2^30 - 1 so that the compiler does not know it.

    An address with this 0 in it is computed where it is used, and takes no register before.
    """
    return i >> 30


def per_token(values: Any) -> Any:
    """Spreads a value per token over a tile."""
    return lax.broadcast_in_dim(values, TILE, [0])


def per_query(values: Any, shape: tuple[int, int] = TILE) -> Any:
    """Spreads a value per query over a tile, or over another shape with a column per query."""
    return lax.broadcast_in_dim(values, shape, [1])


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """The call and its references. Each role of a warpgroup is a subclass with a method `run`.

    Methods read a value from memory where it is used, because registers are short: a value that is
    read once and kept takes one through all loops in between.
    """

    call: DecodeCall
    g: WideningBackend
    inputs: Inputs
    outputs: Outputs
    partials: Partials
    scratch: Scratch

    @property
    def stages(self) -> int:
        return self.call.tiles.kv_stages

    @property
    def half(self) -> int:
        """Dimensions of O^T per output warpgroup."""
        return self.call.kv_lora_rank // OUTPUT_WARPGROUPS

    @property
    def groups(self) -> int:
        """wgmma tiles per half of O^T."""
        return self.half // GROUP

    def stage_after(self, stage: Any) -> Any:
        """Returns the next stage. A comparison is cheaper than a remainder."""
        return jnp.where(stage == self.stages - 1, 0, stage + 1)

    # -- barriers -------------------------------------------------------------------------------
    # Barriers with equally many arrivals share an array, because the address and the phases of an
    # array take registers. The arguments i are for `opaque_zero`.
    def stage_free(self, stage: Any) -> Any:
        """Both output warpgroups have read the stage; the loader may overwrite it."""
        return self.scratch.by_outputs.at[stage]

    def sums_taken(self, i: Any) -> Any:
        """Both output warpgroups have read the sums and the destination of the last item."""
        return self.scratch.by_outputs.at[self.stages + opaque_zero(i)]

    def p_ready(self, stage: Any) -> Any:
        """The softmax warpgroup has written P^T, factors and flag of the stage."""
        return self.scratch.by_one.at[stage]

    def item_ready(self, i: Any) -> Any:
        """The loader has written the work descriptor."""
        return self.scratch.by_one.at[self.stages + opaque_zero(i)]

    def item_done(self, i: Any) -> Any:
        """The softmax warpgroup has read the descriptor, and decided whether the item repeats."""
        return self.scratch.by_one.at[self.stages + 1 + opaque_zero(i)]

    def sums_ready(self, i: Any) -> Any:
        """The softmax warpgroup has written the sums and the destination of an item."""
        return self.scratch.by_one.at[self.stages + 2 + opaque_zero(i)]

    def q_ready(self, i: Any) -> Any:
        """The softmax warpgroup has loaded q. It signals this to the loader."""
        return self.scratch.by_one.at[self.stages + 3 + opaque_zero(i)]

    # -- the work list --------------------------------------------------------------------------
    def work_range(self) -> Any:
        """Returns the CTA's row of `WorkList.ranges`."""
        return self.inputs.requests.work.ranges.at[lax.axis_index("worker")]

    def item_range(self) -> tuple[Any, Any]:
        """Returns the CTA's work items, from and to."""
        return range_of(self.work_range())

    def listed(self, p: Any) -> Any:
        """Returns item p of the work list as a ref, or the last item where p is past the end."""
        items = self.inputs.requests.work.items
        return items.at[jnp.minimum(p, items.shape[0] - 1)]

    # -- results --------------------------------------------------------------------------------
    def rows_of(self, request: Any, row_tile: Any) -> Rows:
        """Returns a tile's rows in the outputs."""
        return self.call.rows_of(request, row_tile * QUERIES, QUERIES)

    def meeting(self, request: Any, row_tile: Any, num_partials: Any) -> Meeting:
        """Returns the counter of a split tile.

        Three warpgroups signal each partial: two have written its O, and one its lse. The two
        output warpgroups of each CTA combine.
        """
        counter = self.call.plan.tile_of(request, row_tile)
        return Meeting(
            self.g,
            self.inputs.requests.counters,
            counter,
            (OUTPUT_WARPGROUPS + 1) * num_partials,
            OUTPUT_WARPGROUPS * num_partials,
        )

    def store(self, to: Destination, store: Callable[[Rows, Outputs | Partials], None]) -> None:
        """Calls store(rows, arrays) with the rows and the arrays of a destination, if it is one.

        Where the launch combines split tiles, this warpgroup then signals its part of the partial.
        """

        @pl.when(to.partial < 0)
        def _store_output() -> None:
            store(self.rows_of(to.request, to.row_tile), self.outputs)

        @pl.when((to.partial >= 0) & (to.partial < DISCARDED))
        def _store_partial() -> None:
            store(Rows.of_partial((to.partial,), 0, QUERIES), self.partials)
            if self.call.combines:
                self.meeting(to.request, to.row_tile, to.num_partials).leave()
