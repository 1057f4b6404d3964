"""q of a launch: one array, or the latent part and the rope part apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class QueryParts(NamedTuple):
    """Arrays outside of a kernel, references inside; they have equal rows and dtypes.

    A layer's products make the two parts apart. To put them side by side would copy them.
    """

    parts: tuple[Any, ...]  # [B, R or more, columns] each: (q,) or (latent, rope)

    @staticmethod
    def of(q: jax.Array | tuple[jax.Array, jax.Array]) -> "QueryParts":
        return QueryParts(q if isinstance(q, tuple) else (q,))

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def batch(self) -> int:
        return self.parts[0].shape[0]

    @property
    def rows(self) -> int:
        """R or more."""
        return self.parts[0].shape[1]

    @property
    def width(self) -> int:
        """The columns of all parts, kv_lora_rank + rope_dim."""
        return sum(part.shape[2] for part in self.parts)

    def column(self, start: int) -> tuple[Any, int]:
        """Returns the part that has a column of q, and the column's number in it."""
        first = self.parts[0].shape[2]
        return (self.parts[0], start) if start < first else (self.parts[1], start - first)

    def padded(self, multiple: int) -> "QueryParts":
        """Returns q with rows of zeros behind it, up to a multiple."""
        spare = -self.rows % multiple
        if not spare:
            return self
        return QueryParts(tuple(jnp.pad(part, ((0, 0), (0, spare), (0, 0))) for part in self.parts))
