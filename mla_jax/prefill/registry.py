"""The implementations of `ragged_mla_attention` by name."""

from mla_jax.implementations.choice import Registry
from mla_jax.implementations.implementation import Implementation
from mla_jax.prefill.forward import attend_ragged_xla
from mla_jax.prefill.hopper import RAGGED_HOPPER

RAGGED_IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("xla", attend_ragged_xla, finds_invalid=True),
        RAGGED_HOPPER,
    )
}
RAGGED_REGISTRY = Registry(RAGGED_IMPLEMENTATIONS, preferred=("hopper", "xla"))
