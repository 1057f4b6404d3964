"""Multi-head latent attention (MLA) for JAX."""

from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.implementations import available_implementations
from mla_jax.online_softmax import merge_states
from mla_jax.split_kv import SplitPlan, plan_fixed, plan_loads, plan_splits

__all__ = [
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "SplitPlan",
    "available_implementations",
    "merge_states",
    "paged_mla_attention",
    "plan_fixed",
    "plan_loads",
    "plan_splits",
]
