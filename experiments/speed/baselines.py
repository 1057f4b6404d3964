"""MLA decode of other libraries, the baselines, timed in the same run if they are installed.

FlashInfer (https://docs.flashinfer.ai/api/mla.html) has BatchMLAPagedAttentionWrapper with the
backends fa2 and fa3. It reads the same pages, shared by DLPack. `pip install mla-jax[peers]`
installs it. In one process with torch, JAX must leave memory to torch:
XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.speed import timing
from experiments.speed.decode.inputs import Inputs
from experiments.speed.decode.setup import SCALE

WORKSPACE_BYTES = 128 << 20  # recommended by FlashInfer's documentation


@functools.cache
def unavailable() -> str | None:
    """Returns why no baseline can run here, or None if they can."""
    for module in ("torch", "flashinfer.mla"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation may raise anything
            return f"{module} can't be imported: {type(error).__name__}: {error}"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


class FlashInfer:
    """One backend of FlashInfer's wrapper, planned for a row's inputs."""

    def __init__(self, name: str, inputs: Inputs) -> None:
        import torch
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        row, rank = inputs.row, inputs.setup.kv_lora_rank
        q = torch.from_dlpack(inputs.q).reshape(row.batch * row.s_q, row.heads, -1)
        # Latent and rope part are views of the same rows.
        pages = [
            torch.from_dlpack(layer["pages"]).reshape(-1, row.page_size, inputs.setup.width)
            for layer in inputs.layers
        ]
        self._latent, self._rope = zip(
            *((p[..., :rank], p[..., rank:]) for p in pages), strict=True
        )
        self._q, self._q_rope = q[..., :rank], q[..., rank:]
        self._out = torch.empty(
            (row.batch * row.s_q, row.heads, rank), dtype=torch.bfloat16, device="cuda"
        )
        self._lse = torch.empty(
            (row.batch * row.s_q, row.heads), dtype=torch.float32, device="cuda"
        )
        counts = [-(-length // row.page_size) for length in row.seq_lens]

        def on_gpu(values: Any) -> Any:
            return torch.tensor(np.asarray(values, np.int32), dtype=torch.int32, device="cuda")

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.int8, device="cuda")
        self._wrapper = BatchMLAPagedAttentionWrapper(workspace, backend=name.rpartition("_")[2])
        self._wrapper.plan(
            qo_indptr=on_gpu(np.arange(row.batch + 1) * row.s_q),
            kv_indptr=on_gpu(np.concatenate([[0], np.cumsum(counts)])),
            kv_indices=on_gpu(
                np.concatenate([t[:n] for t, n in zip(inputs.tables, counts, strict=True)])
            ),
            kv_len_arr=on_gpu(row.seq_lens),
            num_heads=row.heads,
            head_dim_ckv=rank,
            head_dim_kpe=inputs.setup.rope_dim,
            page_size=row.page_size,
            causal=True,
            sm_scale=SCALE,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        self._shape = (row.batch, row.s_q, row.heads)

    def launch(self, i: int) -> None:
        """Runs layer i, modulo the number of layers."""
        layer = i % len(self._latent)
        self._wrapper.run(
            q_nope=self._q,
            q_pe=self._q_rope,
            ckv_cache=self._latent[layer],
            kpe_cache=self._rope[layer],
            out=self._out,
            lse=self._lse,
            return_lse=True,
        )

    def between(self) -> None:
        """Runs a small kernel between launches: reads the output and writes q, unchanged."""
        element = self._out[:1, :1, :1]
        self._q[:1, :1, :1] += element != element

    def output(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (o, lse) of a layer; FlashInfer's lse to base 2 becomes a natural log."""
        self.launch(layer)
        o, lse = (x.float().cpu().numpy() for x in (self._out, self._lse))
        return o.reshape(*self._shape, -1), lse.reshape(self._shape) * np.log(2.0)

    def bursts(self, launches: int) -> dict[str, timing.Burst]:
        """Returns the bursts by the column of their time."""
        modes: dict[str, Callable[[], None] | None] = {"us": None, "us_separated": self.between}
        return {
            column: timing.torch_burst(self.launch, launches, separated=separated)
            for column, separated in modes.items()
        }
