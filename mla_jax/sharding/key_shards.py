"""Context parallelism: the keys of a request are split over the devices of a mesh axis.

The axis has n devices. Page p of a request, which holds tokens p * page_size .. (p + 1) * page_size
- 1, is on device p % n, as entry p // n of the request's block table there. A device attends to its
own keys, and the results of all devices are combined by their lse.

How many of a device's keys a query token sees depends on the token's position, and differs between
the tokens of a request. Every query token is therefore computed as a request of its own, with a
length of its own, and no implementation has to know the axis. The keys of a request are then read
once for each of its query tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.online_softmax import merge_states
from mla_jax.sharding.axes import require_manual_axis, varying_axes


@dataclasses.dataclass(frozen=True, eq=False)
class KeyShard:
    """Which keys this device has."""

    axis: str
    size: int  # n, the devices along the axis
    index: jax.Array  # [] int32, this device among them
    page_size: int

    @staticmethod
    def here(kv_axis: str, page_size: int) -> "KeyShard":
        """Returns the shard of this device; raises outside of a `jax.shard_map` over the axis."""
        size = require_manual_axis("kv_axis", kv_axis)
        return KeyShard(kv_axis, size, lax.axis_index(kv_axis), page_size)

    def count(self, tokens: jax.Array) -> jax.Array:
        """Returns how many of the first `tokens` tokens of a request are here; below 0 as it is."""
        rounds, rest = jnp.divmod(tokens, self.size * self.page_size)
        rest = jnp.clip(rest - self.index * self.page_size, 0, self.page_size)
        return jnp.where(tokens < 0, tokens, rounds * self.page_size + rest)

    def places(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns whether the token at a position is here, and its position among those here."""
        page, offset = jnp.divmod(positions, self.page_size)
        rounds, owner = jnp.divmod(page, self.size)
        return owner == self.index, rounds * self.page_size + offset

    def visible(
        self, seq_lens: jax.Array, query_lens: jax.Array | None, tokens: int, *, causal: bool
    ) -> jax.Array:
        """Returns how many keys each query token sees here, [B, S] int32.

        It is 0 for padding, and -1 for a request of invalid lengths. Arguments as in
        `paged_mla_attention`.
        """
        token = jnp.arange(tokens, dtype=jnp.int32)
        seq_lens = seq_lens[:, None]
        new = jnp.full_like(seq_lens, tokens) if query_lens is None else query_lens[:, None]
        seen = seq_lens - new + token + 1 if causal else seq_lens
        seen = self.count(jnp.where(token < new, jnp.maximum(seen, 0), 0))
        valid = seq_lens >= 0
        if query_lens is not None:
            valid &= (new >= 0) & (new <= jnp.minimum(seq_lens, tokens))
        return jnp.where(valid, seen, -1)

    def require_split(self, whole: dict[str, Any], **split: Any) -> None:
        """Raises ValueError unless pytrees are split over the axis, or equal along it, as named.

        Where `jax.shard_map` does not check types (`check_vma=False`), nothing is known of it.
        """
        if self.size == 1 or not varying_axes(self.index):
            return
        for name, tree in whole.items():
            if self.axis in varying_axes(tree):
                raise ValueError(
                    f"{name} must be equal on the devices of kv_axis {self.axis!r}, got one that "
                    "is split over it: kv_axis splits the keys of every request"
                )
        for name, tree in split.items():
            if self.axis not in varying_axes(tree):
                how = "plan_decode(kv_axis=...)" if name == "plan" else "cache_specs(kv_axis=...)"
                raise ValueError(
                    f"{name} must be split over kv_axis {self.axis!r} ({how}), got one that is "
                    "equal on its devices"
                )


def merge_parts(o: jax.Array, lse: jax.Array, kv_axis: str) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse of the keys of all devices, equal on them; o travels in its own dtype."""
    return merge_states(*lax.all_gather((o, lse), kv_axis, to="invarying"))


def weights_of_parts(lse: jax.Array, kv_axis: str) -> jax.Array:
    """Returns the weight of this device's o, float32 like lse; 0 where it has no key."""
    parts = lax.all_gather(lse, kv_axis)
    top = lax.stop_gradient(parts.max(0))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.exp(parts - top).sum(0)
    return jnp.exp(lse - top) / jnp.where(total == 0, 1.0, total)
