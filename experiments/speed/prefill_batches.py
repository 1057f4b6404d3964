"""Batches of packed requests: their lengths, by a short text."""

import dataclasses
import functools
import re

import numpy as np

from experiments.framework.experiment import InputError

SPREAD = 0.6  # standard deviation of the logarithm of ragged lengths
SHORTEST, LONGEST = 1 / 60, 6  # of ragged requests, relative to the mean

# Names -> (batches, heads).
PRESETS = {
    "served": (("1x4096", "8x1024", "1x2048+14336", "1x16384", "64x~1000"), (128, 16)),
    "quick": (("2x100", "3x~40", "1x30+90"), (4,)),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests with new tokens behind earlier ones; all lengths are equal, or log-normal.

    Attributes:
        requests: number of requests.
        queries: new tokens per request, on average if ragged.
        earlier: tokens before them.
        ragged: whether lengths differ.
        seed: of ragged lengths.
    """

    requests: int
    queries: int
    earlier: int = 0
    ragged: bool = False
    seed: int = 0

    @staticmethod
    def parse(text: str, seed: int = 0) -> "Batch":
        """Returns the batch of a text such as 8x1024, 1x2048+14336 or 64x~1000."""
        found = re.fullmatch(r"([1-9]\d*)x(~?)([1-9]\d*)(?:\+(\d+))?", text)
        if found is None:
            wanted = "REQUESTSxTOKENS, e.g. 8x1024, 1x2048+14336 or 64x~1000"
            raise InputError(f"--batches: wanted {wanted}, got {text!r}")
        requests, ragged, queries, earlier = found.groups()
        return Batch(int(requests), int(queries), int(earlier or 0), bool(ragged), seed)

    @property
    def text(self) -> str:
        """The text that `parse` takes."""
        behind = f"+{self.earlier}" if self.earlier else ""
        return f"{self.requests}x{'~' * self.ragged}{self.queries}{behind}"

    @functools.cached_property
    def query_lens(self) -> np.ndarray:
        """[requests] int64, the new tokens of each."""
        if not self.ragged:
            return np.full(self.requests, self.queries)
        # The mean of e^N(m, s^2) is e^(m + s^2 / 2).
        draws = np.random.default_rng(self.seed).normal(-(SPREAD**2) / 2, SPREAD, self.requests)
        lens = np.clip(np.exp(draws), SHORTEST, LONGEST) * self.queries
        return np.maximum(1, lens.astype(int))

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """`cu_q_lens` and `cu_kv_lens`, [requests + 1] int32."""
        lens = self.query_lens, self.query_lens + self.earlier
        cu_q, cu_kv = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in lens)
        return cu_q, cu_kv

    @property
    def num_queries(self) -> int:
        return int(self.query_lens.sum())

    @property
    def num_keys(self) -> int:
        return int(self.query_lens.sum()) + self.requests * self.earlier

    def flops(self, heads: int, width: int = 192 + 128) -> int:
        """Returns the operations of scores and outputs, of the keys that each query sees."""
        lens = self.query_lens
        pairs = int((lens * (lens + 1) // 2 + lens * self.earlier).sum())
        return 2 * heads * pairs * width
