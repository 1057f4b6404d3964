"""The demo's batch: hidden states of requests of different lengths, and the steps that serve them.

The steps prefill the prompts in chunks and then decode.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from mla_jax.allocator import PageAllocator
from mla_jax.config import MLAConfig

GARBAGE_PAGE = 2**31 - 1
PHASES = ("prefill", "decode", "MTP")


@dataclasses.dataclass(frozen=True)
class Step:
    """The tokens of every request in one step; arrays are [B] int32 except block_tables."""

    phase: str
    width: int  # S, the most tokens per request in this step
    query_lens: np.ndarray
    seq_lens: np.ndarray  # after this step
    block_tables: np.ndarray  # [B, max_pages]

    def tokens(self, hidden: list[np.ndarray]) -> np.ndarray:
        """Returns x [B, S, hidden], left aligned, with NaN where there is no token."""
        x = np.full((len(hidden), self.width, hidden[0].shape[1]), np.nan, hidden[0].dtype)
        for row, states, count, end in zip(x, hidden, self.query_lens, self.seq_lens, strict=True):
            row[:count] = states[end - count : end]
        return x

    def outputs(self, wanted: list[np.ndarray]) -> np.ndarray:
        """Returns the reference outputs for the tokens of this step, concatenated."""
        spans = zip(wanted, self.query_lens, self.seq_lens, strict=True)
        return np.concatenate([out[end - count : end] for out, count, end in spans])


@dataclasses.dataclass(frozen=True)
class Batch:
    """The requests' hidden states and the steps in which they are served."""

    prompts: list[int]
    hidden: list[np.ndarray]  # [tokens, hidden] per request
    steps: list[Step]
    num_pages: int

    @property
    def totals(self) -> list[int]:
        """The tokens of each request at the end."""
        return [len(states) for states in self.hidden]

    @property
    def first_steps(self) -> dict[str, Step]:
        """The first step of each phase; all steps of a phase have the same shapes."""
        first = {step.phase: step for step in reversed(self.steps)}
        return {phase: first[phase] for phase in PHASES}

    @staticmethod
    def draw(options: Any, config: MLAConfig, dtype: str) -> "Batch":
        """Draws random prompts, of which the first is the longest; `options` are the demo's."""
        rng = np.random.default_rng(options.seed)
        prompts = rng.integers(1, options.max_prompt + 1, options.requests)
        prompts[0] = options.max_prompt
        totals = prompts + options.decode_steps + 2 * options.mtp_steps
        hidden = [
            rng.normal(size=(total, config.hidden_size)).astype(jnp.dtype(dtype))
            for total in totals
        ]
        max_pages = -(-int(totals.max()) // options.page_size) + 1
        num_pages = int((-(-totals // options.page_size)).sum())
        allocator = PageAllocator(num_pages, options.page_size)
        for request in range(options.requests):
            allocator.allocate(request, 0)

        widths = [("prefill", options.chunk)] * -(-options.max_prompt // options.chunk)
        widths += [("decode", 1)] * options.decode_steps + [("MTP", 2)] * options.mtp_steps
        steps, lengths = [], np.zeros(options.requests, np.int64)
        for phase, width in widths:
            ends = np.minimum(lengths + width, prompts if phase == "prefill" else totals)
            for request, end in enumerate(ends):
                allocator.extend(request, int(end))
            tables = allocator.block_tables(range(options.requests), max_pages, fill=GARBAGE_PAGE)
            counts = (ends - lengths).astype(np.int32)
            steps.append(Step(phase, width, counts, ends.astype(np.int32), tables))
            lengths = ends
        return Batch(prompts.tolist(), hidden, steps, num_pages)
