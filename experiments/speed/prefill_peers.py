"""FlashInfer's ragged prefill as a baseline: BatchPrefillWithRaggedKVCacheWrapper, backend fa3.

K is assembled and the batch is planned before; neither is timed. See baselines.py for the packages.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import baselines
from experiments.speed.prefill_batches import Batch


def unavailable() -> str | None:
    """Returns why FlashInfer can't run here; None where it can."""
    return baselines.unavailable()


class FlashInfer:
    """FlashInfer's wrapper, planned for a batch."""

    def __init__(
        self, batch: Batch, q: jax.Array, k_rope: jax.Array, layers: list[Any], *, scale: float
    ) -> None:
        import torch
        from flashinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper

        heads, v_dim = layers[0][1].shape[1:]
        self._q, self._layers = torch.from_dlpack(q), []
        for k_nope, v in layers:
            rope = jnp.broadcast_to(k_rope[:, None], (*k_nope.shape[:2], k_rope.shape[1]))
            k = jnp.concatenate([k_nope, rope], axis=-1)
            self._layers.append((torch.from_dlpack(k), torch.from_dlpack(v)))
        workspace = torch.empty(2 * baselines.WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self._wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        cu_q, cu_kv = (torch.from_numpy(x).to("cuda") for x in batch.bounds)
        self._wrapper.plan(
            cu_q,
            cu_kv,
            heads,
            heads,
            self._q.shape[-1],
            head_dim_vo=v_dim,
            causal=True,
            sm_scale=scale,
            q_data_type=self._q.dtype,
            kv_data_type=self._q.dtype,
        )
        shape = (len(self._q), heads, v_dim)
        self._out = torch.empty(shape, dtype=self._q.dtype, device="cuda")
        self._lse = torch.empty(shape[:2], dtype=torch.float32, device="cuda")

    def launch(self, i: int) -> None:
        """Runs layer i, modulo the number of layers."""
        k, v = self._layers[i % len(self._layers)]
        self._wrapper.run(self._q, k, v, out=self._out, lse=self._lse, return_lse=True)

    def output(self) -> tuple[Any, Any]:
        """Returns (o, lse) of the first layer; FlashInfer's lse to base 2 becomes a natural log."""
        self.launch(0)
        o, lse = (x.float().cpu().numpy() for x in (self._out, self._lse))
        return o, lse * np.log(2.0)
