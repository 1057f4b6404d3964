"""The baselines beside ours in one benchmark, by a fake library."""

import contextlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_runs import SMALL, run

from experiments.speed import baselines as peers
from mla_jax.reference.attention import attention_float64

pytestmark = pytest.mark.usefixtures("small_ceilings", "unrendered")


class TestPeers:
    """FlashInfer by a fake of its module and of what it takes from torch."""

    @pytest.fixture
    def flashinfer(self, monkeypatch):
        torch, module = types.ModuleType("torch"), types.ModuleType("flashinfer.mla")

        class Tensor(np.ndarray):
            def float(self):
                return self.astype(np.float32).view(Tensor)

            def cpu(self):
                return self

            def numpy(self):
                return np.asarray(self)

        def tensor(values, dtype=None, device=None):
            return np.array(values, dtype).view(Tensor)

        class Wrapper:
            made: list = []  # noqa: RUF012
            log2 = True

            def __init__(self, workspace, backend):
                self.backend, self.runs = backend, 0
                Wrapper.made.append(self)

            def plan(self, **arguments):
                self.arguments = arguments

            def run(self, *, q_nope, q_pe, ckv_cache, kpe_cache, out, lse, return_lse):
                assert return_lse
                a, self.runs = self.arguments, self.runs + 1
                q = np.concatenate([q_nope, q_pe], -1)
                for i, length in enumerate(a["kv_len_arr"]):
                    pages = a["kv_indices"][a["kv_indptr"][i] : a["kv_indptr"][i + 1]]
                    kv = np.concatenate([ckv_cache[pages], kpe_cache[pages]], -1)
                    kv = kv.reshape(-1, kv.shape[-1])[:length].astype(np.float64)
                    here = slice(a["qo_indptr"][i], a["qo_indptr"][i + 1])
                    rank, scale = a["head_dim_ckv"], a["sm_scale"]
                    o, e = attention_float64(
                        q[here].astype(np.float64), kv, softmax_scale=scale, kv_lora_rank=rank
                    )
                    out[here], lse[here] = o, e / np.log(2)

        class Graph:
            def replay(self):
                pass

        torch.from_dlpack = lambda x: np.array(x).view(Tensor)
        torch.empty = lambda shape, dtype, device: np.zeros(shape, dtype).view(Tensor)
        torch.tensor = tensor
        torch.int8, torch.int32, torch.float32 = np.int8, np.int32, np.float32
        torch.bfloat16 = jnp.bfloat16
        torch.cuda = types.SimpleNamespace(
            is_available=lambda: True, CUDAGraph=Graph, synchronize=lambda: None,
            graph=lambda graph: contextlib.nullcontext(),
        )  # fmt: skip
        module.BatchMLAPagedAttentionWrapper = Wrapper
        for name, fake in (("torch", torch), ("flashinfer", types.ModuleType("flashinfer")),
                           ("flashinfer.mla", module)):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, fake)
        peers.unavailable.cache_clear()
        yield module
        peers.unavailable.cache_clear()
        Wrapper.made.clear()

    def test_runs_beside_ours(self, tmp_path, flashinfer):
        status, result = run(
            tmp_path, *SMALL, "--batch=4", "--lengths=uniform", "--implementations=xla"
        )
        assert status == 0, result["rows"]
        rows = {row["implementation"]: row for row in result["rows"]}
        assert set(rows) == {"xla", "flashinfer_fa2", "flashinfer_fa3"}
        wrappers = flashinfer.BatchMLAPagedAttentionWrapper.made
        assert [wrapper.backend for wrapper in wrappers] == ["fa2", "fa3"]
        assert wrappers[0].arguments["page_size"] == 16
        assert wrappers[0].runs > 2
        assert rows["flashinfer_fa3"]["error"] < 4e-3
        assert "us_separated" in rows["flashinfer_fa3"]

    def test_one_that_fails_is_reported(self, tmp_path, flashinfer):
        def plan(self, **_):
            raise RuntimeError("no nvcc")

        flashinfer.BatchMLAPagedAttentionWrapper.plan = plan
        _, result = run(tmp_path, *SMALL, "--batch=4", "--implementations=xla")
        rows = {row["implementation"]: row for row in result["rows"]}
        assert rows["flashinfer_fa2"]["reason"] == "RuntimeError: no nvcc"
        assert rows["xla"]["status"] == "measured"

    def test_one_that_is_wrong_is_reported(self, tmp_path, flashinfer):
        run_ = flashinfer.BatchMLAPagedAttentionWrapper.run

        def wrong(self, *, out, **arguments):
            run_(self, out=out, **arguments)
            out *= 1.05

        flashinfer.BatchMLAPagedAttentionWrapper.run = wrong
        _, result = run(tmp_path, *SMALL, "--batch=4", "--implementations=xla")
        rows = {row["implementation"]: row for row in result["rows"]}
        assert "wrong: error" in rows["flashinfer_fa2"]["reason"]

    def test_missing_packages_are_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        peers.unavailable.cache_clear()
        assert "torch can't be imported" in peers.unavailable()
        peers.unavailable.cache_clear()
