"""Paged absorbed MLA decode for Hopper: one persistent kernel for tiles of 64 or 128 query rows.

A query row is one head of one query token. A tile of rows and a range of 64-token KV blocks are a
work item; every CTA, or cluster of two CTAs, runs the items that the plan gives it:

    tiles of 128 rows: the two CTAs of a cluster have 64 rows each and share every KV block, which
        each CTA loads half of and multicasts to both;
    tiles of 64 rows: the two CTAs of a cluster have items of their own ("pairs"), and combine a
        tile that only these two share in their shared memories.

A CTA has three warpgroups:

    2  loads q and KV by TMA, or gathers small pages            decode_load.py
    0  computes the left half of O's columns    }               decode_compute.py: S, softmax, O
    1  computes the right half of O's columns   }               decode_finish.py: combine, store

The latent is both key and value, so each block is loaded once. The overlap of the two computing
warpgroups is FlashMLA's "seesaw" pipeline (https://github.com/deepseek-ai/FlashMLA).
docs/hopper_decode.md draws it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.kernels.decode_compute import ComputingWarpgroup
from pallas_kernels.hopper.kernels.decode_kernel import (
    LOADER,
    Inputs,
    Kernel,
    Partials,
    Scratch,
)
from pallas_kernels.hopper.kernels.decode_load import Loader
from pallas_kernels.hopper.kernels.merge import BLOCK_COLUMNS, block_parts, merge_shares
from pallas_kernels.hopper.mosaic.cluster import Peer
from pallas_kernels.hopper.mosaic.primitives import OWN_BARRIERS, Backend
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs
from pallas_kernels.hopper.work_items import BLOCK


def decode(call: DecodeCall) -> tuple[jax.Array, ...]:
    """Runs the work items of a call.

    It writes rows below R of whole tiles to `call.outputs` and, if the call combines, those of
    split tiles too.

    Args:
        call: with q [B, R or more, D] of bfloat16 or float16, its rows a multiple of 8, and a cache
            of one array of pages [num_pages, page_size, D] of q's dtype.

    Returns:
        The partial results of split tiles, as `Partials` describes them: o and lse, and the scales
        of float16 partials.
    """
    tiles, plan = call.tiles, call.plan
    if tiles.pairs != (tiles.cluster == 1):
        raise ValueError(
            f"tiles must have pairs where cluster is 1 and not where it is 2, got pairs "
            f"{tiles.pairs} and cluster {tiles.cluster}"
        )
    g = Backend(interpreting=call.interpreting)

    def body(inputs: Inputs, outputs: Outputs, partials: Partials, scratch: Scratch) -> None:
        g.wait_for_previous_kernel()
        g.let_next_kernel_start()
        warpgroup = lax.axis_index("wg")
        rank = lax.axis_index("cluster")
        group = lax.axis_index("group")
        if call.interpreting and not tiles.pairs:
            # The interpreter runs one cluster after the other: first those whose partials others
            # wait for.
            group = plan.num_workers - 1 - group
        exchange = None if inputs.exchange is None else inputs.exchange.at[group]
        ranges = inputs.requests.work.ranges
        kernel = Kernel(
            call=call,
            g=g,
            inputs=inputs,
            outputs=outputs,
            partials=partials,
            scratch=scratch,
            rank=rank,
            range_ref=ranges.at[2 * group + rank if tiles.pairs else group],
            other_cta=Peer(g, rank, exchange),
        )
        # Branches, so that what one role needs holds no register through another.
        lax.cond(warpgroup < LOADER, lambda: compute(kernel, warpgroup), Loader(kernel).run)

    partials = plgpu.kernel(
        body,
        out_type=(partial_types(call),),
        scratch_types=(Scratch.types(call, g),),
        grid=(-(-plan.num_workers * tiles.cluster // 2),),
        grid_names=("group",),
        cluster=(2,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        interpret=call.interpret,
        kernel_name="mla_decode",
        compiler_params=OWN_BARRIERS,
    )(Inputs(call.q, call.cache[0], call.requests, exchange_of(call)), call.outputs)[0]
    return tuple(array for array in partials if array is not None)


def compute(kernel: Kernel, warpgroup: jax.Array) -> None:
    """Runs a computing warpgroup: its items, then its share of the split tiles."""
    kernel.g.take_registers(kernel.call.tiles.registers, 0)
    lax.switch(warpgroup, [ComputingWarpgroup(kernel, me).run for me in (0, 1)])
    if kernel.call.combines:
        # One copy of this code for both warpgroups: an SM caches 128 KB of instructions.
        merge_shares(
            block_parts(kernel.g, kernel.call.plan, kernel.call.kv_lora_rank, warpgroups=2),
            kernel.merge_refs,
            kernel.inputs.requests.work.items,
            kernel.work_range,
            meet=kernel.meet,
            place=kernel.place,
            wg=kernel.g.warpgroup(),
            wgs=2,
        )


def partial_types(call: DecodeCall) -> Partials:
    """Returns shapes and dtypes of the partial results.

    float16 holds no large numbers, so its partials have a power-of-two scale per row and half of o.
    """
    rows, blocks = call.plan.rows_per_tile, call.kv_lora_rank // BLOCK_COLUMNS
    shape = (call.num_partials, call.tiles.cluster, blocks, BLOCK * BLOCK_COLUMNS)
    scaled = call.partial_dtype == jnp.float16
    return Partials(
        o=jax.ShapeDtypeStruct(shape, call.partial_dtype),
        lse=jax.ShapeDtypeStruct((call.num_partials, rows), jnp.float32),
        scales=jax.ShapeDtypeStruct((call.num_partials, 2, rows), jnp.float32) if scaled else None,
    )


def exchange_of(call: DecodeCall) -> jax.Ref | None:
    """Returns what the CTAs of a pair exchange results through in the interpreter.

    The interpreter has no access to another CTA's shared memory.
    """
    if not (call.tiles.pairs and call.interpreting):
        return None
    groups = len(call.requests.work.ranges) // 2
    shape = (groups, 2, BLOCK, call.kv_lora_rank // 2 + 2)
    return jax.empty_ref(jax.ShapeDtypeStruct(shape, jnp.float32))
