"""Runs a Hopper kernel into outputs with guards, for any number of query rows."""

from typing import Any

import numpy as np
from guards import run_guarded
from hopper_batch import SCALE, HopperBatch
from int8_batch import Int8Batch

from mla_jax import plan_splits
from pallas_kernels.hopper import attention, int8

# One request of a single block, one of several, which the plans split, and one without a key.
SEQ_LENS = [40, 330, 0]


def check_rows(
    kind: str, rows: int, rows_per_tile: int, *, workers: int = 2, interpret: Any = None
) -> None:
    """Raises AssertionError unless all rows are right and nothing else was written.

    kind: of the cache, "float" or "int8". The latent of floats is 128 wide here, which has the
    same stores as 512 and compiles in a third of the time.
    """
    rng = np.random.default_rng([rows, rows_per_tile])
    tokens = next(tokens for tokens in (3, 2, 1) if rows % tokens == 0)  # so that both vary
    lens = [max(tokens, length) if length else 0 for length in SEQ_LENS]
    shape = {"heads": rows // tokens, "num_queries": tokens, "query_lens": [tokens, 1, 0]}
    options = {"num_heads": rows // tokens, "softmax_scale": SCALE, "causal": True}
    if kind == "int8":
        batch: Any = Int8Batch(rng, lens, **shape)
        attend: Any = int8.attend_int8
    else:
        batch = HopperBatch(rng, lens, kv_lora_rank=128, **shape)
        attend, options["kv_lora_rank"] = attention.attend, 128
    plan = plan_splits(
        batch.seq_lens, num_workers=workers, rows=rows, rows_per_tile=rows_per_tile, overhead=1
    )
    assert (np.asarray(plan.slot) >= 0).any()  # so that the merge stores rows as well
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
