"""Who is timed: an implementation of the op with its options, or `jnp`, which is plain JAX."""

import dataclasses
from typing import Any

# KV tokens per batch up to which implementations are timed that are not made to be fast.
MOST_TOKENS = {"reference": 1 << 14, "split_kv": 1 << 14, "blockwise": 1 << 10}
SLOW_LAYERS = 4  # layers for plain JAX, which is limited by its many launches, not by memory


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation with options of the op, or `jnp`, as it is timed."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()  # options of the op, including implementation
    separated: bool = False  # whether it is also timed with a kernel between launches
    most_layers: int | None = None  # layers that it is timed on at most, if it is slow
    most_tokens: int | None = None  # KV tokens per batch up to which it is timed
    tiles: Any = None  # config of the Hopper kernel; None: that which a plan gets

    @property
    def implementation(self) -> str | None:
        """The name of the implementation; None is `jnp`, attention over contiguous KV."""
        return dict(self.options).get("implementation")


def contender(name: str) -> Contender:
    """Returns an implementation with default options, or "jnp"."""
    if name == "jnp":
        return Contender("jnp")
    options = (("implementation", name),)
    if name in MOST_TOKENS:
        return Contender(name, options, most_layers=SLOW_LAYERS, most_tokens=MOST_TOKENS[name])
    if name == "xla":
        return Contender(name, options, most_layers=SLOW_LAYERS)
    return Contender(name, options, separated=True)
