"""Requests for the engine, and drafters, which guess the next tokens of a request."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Gets all tokens of a request and a number; returns at most so many guesses of the next tokens.
Drafter = Callable[[np.ndarray, int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued.

    A temperature of 0 takes the most likely token each time. Otherwise tokens are drawn with `seed`
    from the most likely ones whose probability is `top_p`. The request ends after `max_new_tokens`,
    or with one of `stop_tokens`, which is then its last.
    """

    id: Any
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()

    def check(self, vocab_size: int, max_tokens: int) -> None:
        """Raises ValueError that names the field which is not an integer or out of range."""
        if not len(self.prompt):
            raise ValueError(f"prompt of request {self.id!r} must have a token, got none")
        for token in self.prompt:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompt of request {self.id!r} must have integer ids in "
                    f"0 .. {vocab_size - 1}, got {token!r}"
                )
        if not isinstance(self.max_new_tokens, int | np.integer):
            raise ValueError(f"max_new_tokens must be an integer, got {self.max_new_tokens!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if len(self.prompt) + self.max_new_tokens > max_tokens:
            raise ValueError(
                f"request {self.id!r} must fit in {max_tokens} tokens, got a prompt of "
                f"{len(self.prompt)} and {self.max_new_tokens} new ones"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2^32 - 1, got {self.seed}")


def lookup_drafter(tokens: np.ndarray, count: int) -> Sequence[int]:
    """Guesses that a request repeats itself: what came after its last n-gram, the last time.

    It looks for the last three tokens, then for two, then for one.
    """
    for length in (3, 2, 1):
        if len(tokens) <= length:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], length)
        found = np.flatnonzero((windows == tokens[-length:]).all(axis=1))
        if len(found):
            start = found[-1] + length
            return tokens[start : start + count].tolist()
    return []


def no_drafter(tokens: np.ndarray, count: int) -> Sequence[int]:
    """Guesses nothing, so that every step decodes one token per request."""
    return []
