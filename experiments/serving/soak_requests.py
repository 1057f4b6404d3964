"""The requests of the soak: token ids, and the latents that the cache has to hold for them.

Some requests begin like a document, so that they share a prefix. As in a model, equal prefixes have
equal latents.
"""

import dataclasses
from typing import Any

import numpy as np

DOCUMENTS = 3


@dataclasses.dataclass(eq=False)
class Request:
    """A request whose `latents` go to the cache; the first `prompt` of them come in chunks."""

    id: int
    tokens: np.ndarray  # [tokens] int64, the token ids
    latents: np.ndarray  # [tokens, D]
    prompt: int
    drafts: np.ndarray  # [drafts, D], latents of this step that are rejected after it
    done: int = 0  # tokens in the cache, without drafts
    new: int = 0  # tokens of this step, without drafts

    def keys(self) -> np.ndarray:
        """Returns the latents that this step attends to, [tokens, D], drafts included."""
        return np.concatenate([self.latents[: self.done + self.new], self.drafts])


class Arrivals:
    """Draws requests of up to `max_tokens` tokens."""

    def __init__(
        self, rng: np.random.Generator, max_tokens: int, latent_dim: int, dtype: Any
    ) -> None:
        self.rng = rng
        self.max_tokens = max_tokens
        self.latent_dim = latent_dim
        self.dtype = dtype
        self.arrived = 0
        self._next_token = 0
        self._documents = [self._new_text(max_tokens) for _ in range(DOCUMENTS)]

    def request(self) -> Request:
        """Returns a new request, which may begin like a document."""
        count = int(self.rng.integers(1, self.max_tokens + 1))
        tokens, latents = self._documents[self.rng.integers(DOCUMENTS)]
        shared = int(self.rng.integers(0, count + 1))
        prompt = int(self.rng.integers(0, count + 1))
        return self._continued(tokens[:shared], latents[:shared], count, prompt)

    def fork(self, parent: Request) -> Request:
        """Returns a new request that has the parent's tokens in the cache, and then its own."""
        count = int(self.rng.integers(parent.done + 1, self.max_tokens + 1))
        tokens, latents = parent.tokens[: parent.done], parent.latents[: parent.done]
        child = self._continued(tokens, latents, count, prompt=parent.done)
        child.done = parent.done
        return child

    def latents(self, count: int) -> np.ndarray:
        """Returns random latents, [count, D]."""
        return self.rng.normal(size=(count, self.latent_dim)).astype(self.dtype)

    def _continued(
        self, tokens: np.ndarray, latents: np.ndarray, count: int, prompt: int
    ) -> Request:
        own_tokens, own_latents = self._new_text(count - len(tokens))
        request = Request(
            self.arrived,
            np.concatenate([tokens, own_tokens]),
            np.concatenate([latents, own_latents]),
            prompt,
            self.latents(0),
        )
        self.arrived += 1
        return request

    def _new_text(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns token ids that no other text has, and their latents."""
        first = self._next_token
        self._next_token += count
        return np.arange(first, first + count), self.latents(count)
