"""Runs one Hopper kernel on short requests and checks it, for `test_hopper_sanitizer`.

    python tests/support/sanitized.py CACHE HEADS PAGE_SIZE

It is a program without a test runner, because compute-sanitizer slows everything that a process
does on the GPU. Each length has its reason: two tokens past a block, no token, one token.
"""

import sys

import numpy as np
from hopper_batch import HopperBatch, op
from int8_batch import Int8Batch

# No tile is for two CTAs: compute-sanitizer 2025.3 crashes there.
LENGTHS = [130, 0, 1]


def main(cache: str, heads: str, page_size: str) -> None:
    kind = {"float": HopperBatch, "int8": Int8Batch}[cache]
    rng = np.random.default_rng(int(heads))
    batch = kind(rng, LENGTHS, heads=int(heads), page_size=int(page_size))
    batch.check(*op(batch))
    print("all right")


if __name__ == "__main__":
    main(*sys.argv[1:])
