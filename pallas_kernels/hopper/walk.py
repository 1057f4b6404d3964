"""What both decode kernels know of a plan and of pages."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

BLOCK = 64  # KV tokens a block: the height of a wgmma tile
LOG2E = math.log2(math.e)
LN2 = math.log(2)
NO_KEY = -1e30  # a running maximum (log2 units) that no score has raised yet
PIECE = ("request", "row_tile", "block_start", "block_end", "slot")  # a record of the plan


def records(plan: Any) -> tuple[Any, Any]:
    """For each worker (first piece, end, record of the first) [W, 7]; and all records [P, 5].

    A worker's first record stands beside its range, so that it starts with one read, not two.
    """
    pieces = jnp.stack([getattr(plan, field) for field in PIECE], axis=1)
    first = plan.worker_start[:-1]
    return jnp.column_stack([first, plan.worker_start[1:], pieces[first]]), pieces


def block_sources(
    table_ref: Any, len_ref: Any, request: Any, block: Any, page_size: int
) -> list[tuple[Any, Any, Any]]:
    """Where a block lies: (page, rows of the page, rows of the slot or None for all)."""
    if page_size >= BLOCK:
        per_page = page_size // BLOCK
        page = table_ref[request, block // per_page]
        return [(page, pl.ds((block % per_page) * BLOCK, BLOCK), None)]
    # Pages of the block that lie past the length hold garbage: read the last valid one in their
    # place. Its rows are masked.
    last = (len_ref[request] - 1) // page_size
    per_block = BLOCK // page_size
    return [
        (
            table_ref[request, jnp.minimum(block * per_block + i, last)],
            pl.ds(0, page_size),
            pl.ds(i * page_size, page_size),
        )
        for i in range(per_block)
    ]
