"""What the warpgroups of `decode_int8` share: references, shared memory, barriers, results."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.int8 import INT8_OPERAND, DequantizingBackend
from pallas_kernels.hopper.mosaic.primitives import WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.transposed import WARPS
from pallas_kernels.hopper.mosaic.values import opaque_zero
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Partials, Results, Write
from pallas_kernels.hopper.work_items import BLOCK, range_of

QUERIES = 64  # query rows per tile: the columns of S^T and of O^T
STEP_TOKENS = 32  # tokens of V^T that are dequantized at a time: what the registers allow
OUTPUT_WARPGROUPS = 2  # warpgroups 0 and 1 compute half of the dimensions of O^T each
SOFTMAX_WARPGROUP = 2
LOADER_WARPGROUP = 3
WARPGROUPS = 4
COMBINE_REGISTERS = 32  # per thread, for partial o in flight: what is left beside the rest
DISCARDED = 2**31 - 1  # the partial index of a result that is not stored

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

    q: QueryParts  # bfloat16
    cache: Int8Cache
    requests: Requests
    stamps: Any | None  # `DecodeCall.stamps`


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
    """Shared memory and barriers of a CTA.

    A stage holds one KV block with its P^T. S: stages; D: kv_lora_rank; E: rope_dim; n: QUERIES.
    """

    # The queries of the current work item. The softmax warpgroup writes and reads all four.
    q_latent: Any  # [1, 2 n, D] int8: the high parts of all queries, then the low parts
    q_rope: Any  # [1, n, E] bfloat16
    q_steps: Any  # [1, n] float32: a score of one step of q, in log2 units
    visible_keys: Any  # [1, n] int32: a query attends to this many keys, from key 0 on

    # The stages. The loader writes the keys and their scales, the softmax warpgroup writes P^T.
    latent: Any  # [S, BLOCK, D] int8
    rope: Any  # [S, BLOCK, E] bfloat16
    p: Any  # [S, BLOCK, n] bfloat16
    token_scales: Any  # [S, BLOCK] float32

    # Softmax. The softmax warpgroup writes all four, the output warpgroups read the last two.
    maxima: Any  # [2, n] float32: maxima in log2 units; 1.0 where no score has set one yet
    per_warp: Any  # [WARPS, n] float32, for reductions over the tokens of a block
    factors: Any  # [S, n] float32: O is multiplied by them before the block is added
    rescales: Any  # [S] int32: 0 where all factors of the stage are 1

    # The end of a work item. The softmax warpgroup writes both, the output warpgroups read them.
    inverse_sums: Any  # [1, n] float32: O is multiplied by them at the end
    destination: Any  # a `Destination`

    descriptor: Any  # a `Descriptor`

    # Barriers. Methods of `Role` name the single barriers of the last two arrays.
    full: Any  # [S]: three copies arrive (latent, rope keys, scales)
    by_outputs: Any  # [S + 1]: each of the two output warpgroups arrives
    by_one: Any  # [S + 4]: one warpgroup arrives

    accumulators: tuple[Any, ...]  # O^T in the interpreter; empty on a GPU, which has registers

    @staticmethod
    def types(call: DecodeCall, g: DequantizingBackend) -> "Scratch":
        """Returns shapes and layouts for a call."""
        stages, latent = call.config.kv_stages, call.kv_lora_rank

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
            per_warp=floats(WARPS, QUERIES),
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


@dataclasses.dataclass(frozen=True, eq=False)
class Role:
    """What the warpgroups of a CTA have in common. Each role is a subclass with a method `run`.

    Methods read a value from memory where they use it. A value that is read once and kept would
    take a register through all loops in between, and there are few.

    stamps: of the work item in hand; outside of items, of the first one.
    """

    call: DecodeCall
    g: DequantizingBackend
    inputs: Inputs
    outputs: Outputs
    partials: Partials
    scratch: Scratch
    stamps: Stamps

    @property
    def stages(self) -> int:
        return self.call.config.kv_stages

    def stage_after(self, stage: Any) -> Any:
        """Returns the next stage. A comparison is cheaper than a remainder."""
        return jnp.where(stage == self.stages - 1, 0, stage + 1)

    # -- barriers -------------------------------------------------------------------------------
    # Barriers with equally many arrivals share an array, because the address and the phases of an
    # array take registers. An argument i is any number that `opaque_zero` takes.
    def stage_free(self, stage: Any) -> Any:
        """The output warpgroups have read the stage. The loader waits."""
        return self.scratch.by_outputs.at[stage]

    def sums_taken(self, i: Any) -> Any:
        """The output warpgroups have read sums and destination. The softmax warpgroup waits."""
        return self.scratch.by_outputs.at[self.stages + opaque_zero(i)]

    def p_ready(self, stage: Any) -> Any:
        """The softmax warpgroup has written P^T and factors. The output warpgroups wait."""
        return self.scratch.by_one.at[stage]

    def item_ready(self, i: Any) -> Any:
        """The loader has written the work descriptor. The softmax warpgroup waits."""
        return self.scratch.by_one.at[self.stages + opaque_zero(i)]

    def item_done(self, i: Any) -> Any:
        """The softmax warpgroup has read the descriptor and set `repeats`. The loader waits."""
        return self.scratch.by_one.at[self.stages + 1 + opaque_zero(i)]

    def sums_ready(self, i: Any) -> Any:
        """The softmax warpgroup has written sums and destination. The output warpgroups wait."""
        return self.scratch.by_one.at[self.stages + 2 + opaque_zero(i)]

    def q_ready(self, i: Any) -> Any:
        """The softmax warpgroup has loaded q. The loader waits."""
        return self.scratch.by_one.at[self.stages + 3 + opaque_zero(i)]

    # -- the work list --------------------------------------------------------------------------
    def work_range(self) -> Any:
        """Returns the CTA's row of `WorkList.ranges`."""
        return self.inputs.requests.work.ranges.at[lax.axis_index("worker")]

    def item_range(self) -> tuple[Any, Any]:
        """Returns the CTA's work items, from and to."""
        return range_of(self.work_range())

    def listed_item(self, index: Any) -> Any:
        """Returns a ref of an item of the work list; of the last one for an index past the end."""
        items = self.inputs.requests.work.items
        return items.at[jnp.minimum(index, items.shape[0] - 1)]

    # -- results --------------------------------------------------------------------------------
    @property
    def results(self) -> Results:
        """Where results go.

        Three warpgroups store a partial result: two its o, and one its lse. The two output
        warpgroups combine.
        """
        return Results(
            self.g,
            self.call,
            self.inputs.requests,
            self.outputs,
            self.partials,
            writers=OUTPUT_WARPGROUPS + 1,
            combining=OUTPUT_WARPGROUPS,
            in_flight=COMBINE_REGISTERS,
        )

    def store(self, to: Destination, write: Write) -> None:
        """Stores a result with write(rows, arrays) where its destination says, if anywhere."""
        pl.when(to.partial < 0)(lambda: self.results.store_output(to, write))
        is_stored = (to.partial >= 0) & (to.partial < DISCARDED)
        pl.when(is_stored)(lambda: self.results.store_partial(to, write))
