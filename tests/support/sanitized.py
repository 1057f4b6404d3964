"""A few short requests through one Hopper kernel, checked: what `test_hopper_sanitizer` runs.

    python tests/support/sanitized.py CACHE HEADS PAGE_SIZE

A program of its own, since compute-sanitizer slows all that a process does on the GPU: no test
runner, no length that does not show something (two tokens past a block, none, one).
"""

import sys

import numpy as np
from hopper_batch import HopperBatch, op
from test_hopper_int8 import Int8Batch

LENGTHS = [130, 0, 1]  # (no tile for a pair of workers: at those compute-sanitizer 2025.3 crashes)


def main(cache: str, heads: str, page_size: str) -> None:
    kind = {"float": HopperBatch, "int8": Int8Batch}[cache]
    rng = np.random.default_rng(int(heads))
    batch = kind(rng, LENGTHS, heads=int(heads), page_size=int(page_size))
    batch.check(*op(batch))
    print("all right")


if __name__ == "__main__":
    main(*sys.argv[1:])
