"""One checked call of `ragged_mla_attention`, which every implementation takes."""

import dataclasses
import functools

import jax

from mla_jax.ragged.requests import KeyRanges, key_ranges


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k_nope", "k_rope", "v", "cu_q_lens", "cu_kv_lens"],
    meta_fields=["softmax_scale", "causal"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class RaggedProblem:
    """The arguments of `ragged_mla_attention`; a pytree, its options static.

    The bounds of traced requests are not checked. `key_ranges` finds the invalid ones, whose rows
    are NaN.
    """

    q: jax.Array  # [Tq, H, nope + rope]
    k_nope: jax.Array  # [Tk, H, nope]
    k_rope: jax.Array  # [Tk, rope], shared by all heads
    v: jax.Array  # [Tk, H, v_dim]
    cu_q_lens: jax.Array  # [B + 1] int32
    cu_kv_lens: jax.Array  # [B + 1] int32
    softmax_scale: float
    causal: bool

    @property
    def num_queries(self) -> int:
        """Tq, the packed queries."""
        return self.q.shape[0]

    @property
    def num_keys(self) -> int:
        """Tk, the packed keys."""
        return self.v.shape[0]

    def key_ranges(self) -> KeyRanges:
        """Returns the keys that each query sees."""
        return key_ranges(
            self.cu_q_lens,
            self.cu_kv_lens,
            num_queries=self.num_queries,
            num_keys=self.num_keys,
            causal=self.causal,
        )
