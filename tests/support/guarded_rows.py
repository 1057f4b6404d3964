"""Runs a Hopper kernel into outputs with guards, for any number of query rows."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from guards import run_guarded
from hopper_batch import SCALE, HopperBatch
from int8_batch import Int8Batch

from mla_jax import SplitPlan, plan_splits
from pallas_kernels.hopper import attention

# One request of a single block, one of several, which the plans split, and one without a key.
SEQ_LENS = [40, 330, 0]


def tokens_and_lengths(rows: int) -> tuple[int, list[int]]:
    """Query tokens per request, so that they vary as the heads do, and the requests' lengths."""
    tokens = next(tokens for tokens in (3, 2, 1) if rows % tokens == 0)
    return tokens, [max(tokens, length) if length else 0 for length in SEQ_LENS]


def split_plan(rows: int, rows_per_tile: int, workers: int) -> SplitPlan:
    """A plan that splits a tile, so that the merge stores rows as well.

    A few workers more than asked for where equal shares happen to end where tiles do.
    """
    _, lens = tokens_and_lengths(rows)
    for num_workers in range(workers, 2 * workers):
        plan = plan_splits(
            jnp.asarray(lens, jnp.int32),
            num_workers=num_workers,
            rows=rows,
            rows_per_tile=rows_per_tile,
            overhead=1,
        )
        if (np.asarray(plan.partial) >= 0).any():
            return plan
    raise ValueError(f"no tile is split for {rows} rows in tiles of {rows_per_tile}")


def check_rows(
    kind: str, rows: int, rows_per_tile: int, *, workers: int = 2, interpret: Any = None
) -> None:
    """Raises AssertionError unless all rows are right and nothing else was written.

    kind: of the cache, "float" or "int8". The latent of floats is 128 wide here, which has the
    same stores as 512 and compiles in a third of the time.
    """
    rng = np.random.default_rng([rows, rows_per_tile])
    tokens, lens = tokens_and_lengths(rows)
    shape = {"heads": rows // tokens, "num_queries": tokens, "query_lens": [tokens, 1, 0]}
    options = {"num_heads": rows // tokens, "softmax_scale": SCALE, "causal": True}
    if kind == "int8":
        batch: Any = Int8Batch(rng, lens, **shape)
        attend: Any = attention.attend_int8
    else:
        batch = HopperBatch(rng, lens, kv_lora_rank=128, **shape)
        attend, options["kv_lora_rank"] = attention.attend, 128
    plan = split_plan(rows, rows_per_tile, workers)
    o, lse = run_guarded(
        attend,
        np.asarray(batch.q).reshape(len(lens), rows, -1),
        *batch.cache.arrays().values(),
        batch.block_tables,
        batch.seq_lens,
        batch.query_lens,
        plan,
        interpret=interpret,
        **options,
    )
    batch.check(o, lse)
