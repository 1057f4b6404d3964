"""What a CTA of `decode_transposed_int8` has: sizes, references and barriers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import DecodeTransposedInt8Config
from pallas_kernels.hopper.mosaic.int8 import INT8_OPERAND, DequantizingBackend
from pallas_kernels.hopper.mosaic.primitives import WGMMA_OPERAND
from pallas_kernels.hopper.mosaic.transposed import WARPS
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.parts.quantize_q import ROW_GROUP
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.parts.stamps import Stamps
from pallas_kernels.hopper.parts.transposed import Partials, Results
from pallas_kernels.hopper.work_items import BLOCK, WorkItem, range_of, run_items

ITEM_STAGES = 2  # The loader checks a work item while the one before it is computed.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of a launch."""

    rows: int  # query rows per tile
    latent: int  # kv_lora_rank
    rope: int
    stages: int  # of the KV ring
    computing: int  # warpgroups that compute: 1 or 2; the loader is the one after them
    registers: tuple[int, ...]  # per thread, of each warpgroup

    @staticmethod
    def of(call: DecodeCall[DecodeTransposedInt8Config]) -> "Sizes":
        config = call.config
        return Sizes(
            rows=config.rows_per_tile,
            latent=call.kv_lora_rank,
            rope=call.rope_dim,
            stages=config.kv_stages,
            computing=config.computing,
            registers=config.warpgroup_registers,
        )

    @property
    def half(self) -> int:
        """Dimensions of O^T in each of its two accumulators."""
        return self.latent // 2

    @property
    def output_halves(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of the left and the right half of O^T."""
        return (self.half, self.rows), (self.half, self.rows)

    @property
    def score_tile(self) -> tuple[int, int]:
        """The shape of S^T."""
        return BLOCK, self.rows

    @property
    def quantizing(self) -> int:
        """How many warpgroups quantize q: all that compute, if they can have equal shares."""
        return self.computing if self.rows % (self.computing * ROW_GROUP) == 0 else 1

    @property
    def uneven(self) -> bool:
        """Whether warpgroups have different numbers of registers."""
        return len(set(self.registers)) > 1


class Int8Cache(NamedTuple):
    """The paged cache."""

    latent: Any  # [num_pages, page_size, kv_lora_rank] int8
    rope: Any  # [num_pages, page_size, rope_dim] bfloat16
    scales: Any  # [num_pages, page_size] float32: what 1 of a token's latent is worth


class Inputs(NamedTuple):
    """What the kernel reads: arrays outside, references inside."""

    q: QueryParts  # bfloat16, a multiple of rows_per_tile rows
    cache: Int8Cache
    requests: Requests
    stamps: Any | None  # `DecodeCall.stamps`


class QScratch(NamedTuple):
    """The quantized queries of a tile: q = (128 high + low, rope) * step.

    Each has one stage: an index that the compiler does not know to be 0 selects it.
    """

    halves: Any  # [1, 2 * rows, latent] int8: high of all rows, then low
    rope: Any  # [1, rows, rope], in steps
    step: Any  # [1, rows] float32: the row's step times the scale of scores in log2 units


class KvScratch(NamedTuple):
    """The ring of KV blocks. A stage holds a block, counted over all work items of the CTA."""

    latent: Any  # [stages, BLOCK, latent] int8
    rope: Any  # [stages, BLOCK, rope]
    scales: Any  # [stages, BLOCK] float32


class Scratch(NamedTuple):
    """The shared memory and the barriers of a CTA.

    Where the first dimension is `computing`, each computing warpgroup has one of its own.
    """

    q: QScratch
    kv: KvScratch
    p: Any  # [computing, rows, BLOCK]: P of the current block, an operand of V^T P^T
    maxima: Any  # [computing, WARPS, rows]: the warps combine the maxima of a block here
    sums: Any  # [computing, WARPS, rows]: the warps combine the sums of a work item here
    # What a warpgroup gives to the other one when both have computed their blocks of a work item:
    given_o: Any  # [computing, rows, half]: the half of its O^T that the other finishes
    given_softmax: Any  # [computing, 2, rows]: its maxima and sums
    invalid: Any  # [ITEM_STAGES] int32: 1 where the plan or a page of the work item is invalid
    # [3]: all computing warpgroups arrive, for each work item: when q is quantized; when they have
    # given their results; when they have taken the other's. These barriers are in one array, since
    # the address and the phases of each array take registers.
    all_computing: Any
    item_checked: Any  # [ITEM_STAGES]: the loader arrives when `invalid` holds what the plan says
    item_done: Any  # [ITEM_STAGES]: all computing warpgroups arrive when they have read `invalid`
    full: Any  # [stages]: the three copies of a block arrive
    empty: Any  # [stages]: the one warpgroup that reads the block arrives
    accumulators: tuple  # both halves of O^T in the interpreter, empty on the GPU

    @staticmethod
    def types(g: DequantizingBackend, call: DecodeCall, sizes: Sizes) -> "Scratch":
        """Returns what to allocate."""

        def wide(*shape):
            return plgpu.SMEM(shape, call.q.dtype, transforms=WGMMA_OPERAND)

        def int8(*shape):
            return plgpu.SMEM(shape, jnp.int8, transforms=INT8_OPERAND)

        def floats(*shape):
            return plgpu.SMEM(shape, jnp.float32)

        def barriers(num_arrivals: int, stages: int):
            return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=stages)

        rows, latent, rope = sizes.rows, sizes.latent, sizes.rope
        stages, computing = sizes.stages, sizes.computing
        return Scratch(
            q=QScratch(int8(1, 2 * rows, latent), wide(1, rows, rope), floats(1, rows)),
            kv=KvScratch(
                int8(stages, BLOCK, latent), wide(stages, BLOCK, rope), floats(stages, BLOCK)
            ),
            p=wide(computing, rows, BLOCK),
            maxima=floats(computing, WARPS, rows),
            sums=floats(computing, WARPS, rows),
            given_o=floats(computing, rows if computing == 2 else 1, sizes.half),
            given_softmax=floats(computing, 2, rows),
            invalid=plgpu.SMEM((ITEM_STAGES,), jnp.int32),
            all_computing=barriers(computing, 3),
            item_checked=barriers(1, ITEM_STAGES),
            item_done=barriers(computing, ITEM_STAGES),
            full=barriers(3, stages),
            empty=barriers(1, stages),
            accumulators=g.accumulator_scratch(computing, *sizes.output_halves),
        )

    @property
    def given(self) -> Any:
        """The barrier at which the computing warpgroups have given their results."""
        return self.all_computing.at[1]

    @property
    def taken(self) -> Any:
        """The barrier at which the computing warpgroups have taken the other's results."""
        return self.all_computing.at[2]


@dataclasses.dataclass(frozen=True)
class Cta:
    """A CTA of the launch: what all of its warpgroups have."""

    g: DequantizingBackend
    call: DecodeCall
    sizes: Sizes
    inputs: Inputs
    outputs: Outputs
    partials: Partials
    scratch: Scratch

    @property
    def range(self) -> Any:
        """The CTA's row of `WorkList.ranges`, found anew at each use to save registers."""
        return self.inputs.requests.work.ranges.at[lax.axis_index("worker")]

    @property
    def items(self) -> tuple[Any, Any]:
        """The CTA's range of work items, from and to, read anew at each use likewise."""
        return range_of(self.range)

    @property
    def results(self) -> Results:
        """Where results go. All warpgroups that compute store and combine partial results."""
        refs = self.inputs.requests, self.outputs, self.partials
        count = self.sizes.computing
        return Results(self.g, self.call, *refs, writers=count, combining=count)

    @property
    def stamps(self) -> Stamps:
        return Stamps(self.inputs.stamps)

    def stamps_of(self, number: Any) -> Stamps:
        """Returns the stamps of an item of the work list with this number."""
        return self.stamps.of_counted_item(lambda: number - self.items[0])

    def lengths(self, item: WorkItem) -> tuple[Any, Any]:
        """Returns (kv length, query length) of an item's request; a kv length of -1: invalid."""
        return self.call.lengths(self.inputs.requests, item.request)

    def run_items(self, run: Callable[[Any, Any, WorkItem], None]) -> None:
        """Calls run(number, KV blocks of the items before, item) for each of the CTA's items."""
        run_items(self.items, self.range, self.inputs.requests.work.items, run)

    def take_registers(self, warpgroup: int) -> None:
        """Gives the calling warpgroup its share of the registers."""
        if self.sizes.uneven:
            self.g.take_registers(self.sizes.registers, warpgroup)
