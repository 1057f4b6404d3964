"""Makes the work list of a prefill launch in one kernel, as `prefill.work_items.work_list` does.

Each warp of the launch lists one tile. No CTA waits for another one. Each CTA reads the bounds of
all requests and computes for every request its tiles and the number of tiles before them. Then a
warp looks up the request that its tile belongs to, and counts the tiles that come before it in the
list. A tile's place follows from numbers per request, so that no tiles are sorted:

    causal: a request has one tile of `blocks` KV blocks, one of `blocks` - 1, and so on. For any c,
    the number of its tiles with more than c blocks is `blocks` - c, clipped to 0 .. `tiles`.
    otherwise, or without keys: all tiles of a request see `blocks` KV blocks.
    by request: all tiles of a request come before those of a request with fewer `blocks`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.per_thread import LANES, WARPS
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, Backend
from pallas_kernels.hopper.prefill.work_items import (
    TILE_FIELDS,
    Request,
    WorkList,
    heads_in_work,
    is_by_request,
    most_tiles,
    tiles_in,
)

THREADS = WARPS * LANES  # of a CTA
MOST_REQUESTS = 2047  # each CTA keeps all requests in shared memory and registers
LEAST_INT = -(2**31)


class Table(NamedTuple):
    """The values per request in shared memory: [requests] int32 each.

    One more entry holds the query rows after the last request. Those after it are padding without
    tiles.
    """

    first: Any  # as in `Request`
    queries: Any
    kv_first: Any
    keys: Any
    invalid: Any
    blocks: Any  # the most KV blocks that one of its tiles sees
    tiles: Any  # how many tiles it has
    tile_end: Any  # how many tiles it and the requests before it have


class Scratch(NamedTuple):
    table: Any  # [fields of `Table` * requests with padding]
    maxima: Any  # [2 * 128] for `PerThread.scan`
    sums: Any  # [2 * 128] likewise
    longest: Any  # [128] likewise


class Inputs(NamedTuple):
    cu_q_lens: Any  # [B + 1] int32
    cu_kv_lens: Any  # [B + 1] int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListCall:
    """One launch. The fields are the arguments of `work_items.work_list`."""

    num_requests: int
    num_queries: int
    num_keys: int
    causal: bool
    num_heads: int
    bytes_per_key: int
    heads_at_once: int | None
    interpret: Any

    @property
    def per_thread(self) -> int:
        """Requests per thread, with the rows behind the last one as a request of their own."""
        return -(-(self.num_requests + 1) // THREADS)

    @property
    def most_tiles(self) -> int:
        return most_tiles(self.num_queries, self.num_requests)


def list_tiles(
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    num_heads: int,
    bytes_per_key: int,
    heads_at_once: int | None = None,
    interpret: Any = None,
) -> WorkList:
    """Returns what `work_items.work_list` does, to the bit, for up to `MOST_REQUESTS` requests.

    interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU. The other
        arguments are those of `work_list`.
    """
    call = ListCall(
        num_requests=len(cu_q_lens) - 1,
        num_queries=num_queries,
        num_keys=num_keys,
        causal=causal,
        num_heads=num_heads,
        bytes_per_key=bytes_per_key,
        heads_at_once=heads_at_once,
        interpret=interpret,
    )
    assert call.num_requests <= MOST_REQUESTS

    def body(inputs: Inputs, outputs: WorkList, scratch: Scratch) -> None:
        Lister(call, inputs, outputs, scratch).run()

    entries = call.per_thread * THREADS
    list_kernel = plgpu.kernel(
        body,
        out_type=(
            WorkList(
                jax.ShapeDtypeStruct((call.most_tiles, TILE_FIELDS), jnp.int32),
                jax.ShapeDtypeStruct((1, 2), jnp.int32),
            ),
        ),
        scratch_types=(
            Scratch(
                table=plgpu.SMEM((len(Table._fields) * entries,), jnp.int32),
                maxima=plgpu.SMEM((2 * THREADS,), jnp.int32),
                sums=plgpu.SMEM((2 * THREADS,), jnp.int32),
                longest=plgpu.SMEM((THREADS,), jnp.int32),
            ),
        ),
        grid=(-(-call.most_tiles // WARPS),),
        grid_names=("cta",),
        interpret=interpret,
        kernel_name="mla_prefill_work_list",
        compiler_params=OWN_BARRIERS,
    )
    (work,) = list_kernel(Inputs(cu_q_lens, cu_kv_lens))
    return WorkList(work.tiles, work.counts[0])


@dataclasses.dataclass(frozen=True)
class Lister:
    """One CTA of the launch. Arrays have one int32 per thread."""

    call: ListCall
    inputs: Inputs
    outputs: WorkList
    scratch: Scratch

    @property
    def g(self) -> Backend:
        return Backend(interpreting=self.call.interpret is not None)

    def run(self) -> None:
        """Lists the tiles of this CTA's warps."""
        self.g.wait_for_previous_kernel()
        self.g.let_next_kernel_start()
        cta = lax.axis_index("cta")
        num_tiles, num_keys, longest = self.fill_table()
        pl.when(cta == 0)(lambda: self.store_counts(num_tiles, num_keys, longest))
        # The index of the warp's tile, in the order of requests.
        index = cta * WARPS + self.g.thread_index() // LANES
        self.list_tile(index, index < num_tiles, is_by_request(num_keys, self.call.bytes_per_key))

    def fill_table(self) -> tuple[Any, Any, Any]:
        """Writes `Table`, and returns the tiles and keys of all requests, and the most keys."""
        g, call = self.g, self.call
        own = range(call.per_thread)
        first_request = g.thread_index() * call.per_thread
        indices = [first_request + i for i in range(call.per_thread + 1)]
        bounds = [jnp.minimum(index, call.num_requests) for index in indices]
        cu_q, cu_kv = ([g.load_indexed(cu, bound) for bound in bounds] for cu in self.inputs)

        def local(cu: list) -> Any:
            top = cu[0]
            for i in own[1:]:
                top = jnp.maximum(top, cu[i])
            return top

        # The largest bounds before the thread's own.
        tops, _ = g.scan([local(cu_q), local(cu_kv)], jnp.maximum, LEAST_INT, self.scratch.maxima)
        requests = []
        for i in own:
            begins, ends = (cu_q[i], cu_kv[i]), (cu_q[i + 1], cu_kv[i + 1])
            tops = [jnp.maximum(*x) for x in zip(tops, begins, strict=True)]
            requests.append(self.request(indices[i], begins, ends, tops))
        tiles = [request.num_tiles(call.causal) for request in requests]
        keys = [request.keys for request in requests]
        (end, _), (num_tiles, num_keys) = g.scan(
            [sum(tiles[1:], tiles[0]), sum(keys[1:], keys[0])], jnp.add, 0, self.scratch.sums
        )
        most = functools.reduce(jnp.maximum, keys)
        _, (longest,) = g.scan([most], jnp.maximum, 0, self.scratch.longest)
        for index, request, own_tiles in zip(indices[:-1], requests, tiles, strict=True):
            end = end + own_tiles
            entry = Table(*request, blocks=tiles_in(request.keys), tiles=own_tiles, tile_end=end)
            for field, value in zip(Table._fields, entry, strict=True):
                g.store_indexed(self.scratch.table, self.table_index(field, index), value)
        g.wait_for_warpgroup()
        return num_tiles, num_keys, longest

    def request(self, index: Any, begins: Any, ends: Any, tops: Any) -> Request:
        """Returns the request with this index, or one without tiles for padding.

        begins, ends: its bounds among queries and keys. tops: the largest bounds of all requests up
            to this one's begin.
        """
        call = self.call
        valid = index < call.num_requests
        for begin, end, top, total in zip(
            begins, ends, tops, (call.num_queries, call.num_keys), strict=True
        ):
            in_order = (begin == top) & (begin >= 0) & (begin <= end) & (end <= total)
            valid &= in_order & ((index > 0) | (begin == 0))
        queries, keys = (end - begin for begin, end in zip(begins, ends, strict=True))
        if call.causal:
            valid &= queries <= keys
        # Bounds of invalid requests may decrease. Their running maximum gives each row to one
        # request.
        top = tops[0]
        first = jnp.where(index == 0, 0, jnp.clip(top, 0, call.num_queries))
        stop = jnp.clip(jnp.maximum(top, ends[0]), 0, call.num_queries)
        stop = jnp.where(index < call.num_requests, stop, call.num_queries)
        is_padding = index > call.num_requests
        return Request(
            first=first,
            queries=jnp.where(is_padding, 0, stop - first),
            kv_first=jnp.where(valid, begins[1], 0),
            keys=jnp.where(valid, keys, 0),
            invalid=jnp.where(valid | (index >= call.num_requests), 0, 1),
        )

    def list_tile(self, index: Any, exists: Any, by_request: Any) -> None:
        """Writes the tile of each warp to its place in the list.

        by_request: whether the list has the order "by request" (`work_items`).
        """
        g, call = self.g, self.call

        def ends_before(other: Any) -> Any:
            return jnp.where(self.load("tile_end", other) <= index, 1, 0)

        request = g.sum_in_warp(self.sum_over_requests(ends_before))
        request = jnp.minimum(request, call.num_requests)
        fields = Request(*(self.load(name, request) for name in Request._fields))
        tiles, tile_end = self.load("tiles", request), self.load("tile_end", request)
        within = index - (tile_end - tiles)
        tile = fields.tile(within, call.causal)
        blocks = self.load("blocks", request)

        def before(other: Any) -> Any:
            """Returns how many tiles of a request come before this one."""
            apart = by_request & (other != request)
            longer = self.load("blocks", other) - jnp.where(apart, blocks, tile.num_blocks)
            longer = longer + jnp.where(other < request, 1, 0)  # Equal tiles keep their order.
            tiles = self.load("tiles", other)
            all_of_them = jnp.where(longer > 0, tiles, 0)
            if not call.causal:
                return all_of_them
            some = jnp.minimum(jnp.maximum(longer, 0), tiles)
            return jnp.where((tile.num_blocks > 0) & ~apart, some, all_of_them)

        position = g.sum_in_warp(self.sum_over_requests(before))
        # All tiles of a request are equal without a mask, and where they see no key.
        alike = tile.num_blocks == 0 if call.causal else jnp.full_like(exists, True)
        position = position + jnp.where(alike, within, 0)
        row = [jnp.where(exists, field, 0) for field in tile]
        g.store_row_per_warp(self.outputs.tiles, jnp.where(exists, position, index), row)

    def sum_over_requests(self, function: Any) -> Any:
        """Returns per lane the sum of function(request) over every 32nd request."""
        lane = self.g.thread_index() % LANES

        def add(i: Any, total: Any) -> Any:
            for k in range(WARPS):
                total = total + function(lane + LANES * k + THREADS * i)
            return total

        total = add(0, jnp.zeros_like(lane))
        return lax.fori_loop(1, self.call.per_thread, add, total)

    def store_counts(self, num_tiles: Any, num_keys: Any, longest: Any) -> None:
        call = self.call
        heads = heads_in_work(
            num_keys, longest, call.num_heads, call.bytes_per_key, call.heads_at_once
        )
        self.g.store_row_per_warp(
            self.outputs.counts, jnp.zeros_like(num_tiles), [num_tiles, heads]
        )

    def table_index(self, field: str, request: Any) -> Any:
        """Returns where the table has a field of a request."""
        return Table._fields.index(field) * self.call.per_thread * THREADS + request

    def load(self, field: str, request: Any) -> Any:
        return self.g.load_indexed(self.scratch.table, self.table_index(field, request))
