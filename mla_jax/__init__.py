"""Multi-head latent attention (MLA) for JAX.

- The op: `paged_mla_attention`, `available_implementations`, `merge_states`.
- The op over expanded keys and values, for prefill and training: `ragged_mla_attention`.
- The cache: `PagedKVCache`, `PageAllocator`, `OutOfPagesError`.
- The layer: `MLAConfig`, `YarnScaling`, `PRESETS` (configs of published models), `mla_layer`, its
  parts `preprocess`, `attend` and `project_output`, and `naive_mla_layer`, which expands K and V.
- Weights: `MLAParams`, `init_params`, `load_hf`, `load_hf_layers`, `save_hf`, `rotate_latent`,
  `CheckpointError`.
- Plans: `plan_decode` makes a `DecodePlan` for a step; `plan_fixed`, `plan_splits`, `plan_loads`,
  `SplitPlan` and `SlowPlanWarning` are of its split alone.
- Sharding: `param_specs` and `cache_specs` give PartitionSpecs, `mla_layer` takes a `head_axis` and
  a `kv_axis`.
- Modules: `cache_size` counts bytes of caches, `online_softmax` computes softmax by blocks of keys.
"""

from mla_jax import cache_size, online_softmax
from mla_jax._version import __version__ as __version__
from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.checkpoints.load import load_hf, load_hf_layers
from mla_jax.checkpoints.read import CheckpointError
from mla_jax.checkpoints.weights import MLAParams, init_params, rotate_latent, save_hf
from mla_jax.config import PRESETS, MLAConfig, YarnScaling
from mla_jax.export.pytrees import register_pytrees as _register_pytrees
from mla_jax.layer import attend, mla_layer, preprocess, project_output
from mla_jax.online_softmax import merge_states
from mla_jax.planning import plan_decode
from mla_jax.prefill.attention import ragged_mla_attention
from mla_jax.reference.naive import naive_mla_layer
from mla_jax.registry import available_implementations
from mla_jax.sharding.specs import cache_specs, param_specs
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.planner import SlowPlanWarning, SplitPlan, plan_fixed, plan_loads, plan_splits

_register_pytrees()

__all__ = [
    "PRESETS",
    "CheckpointError",
    "DecodePlan",
    "MLAConfig",
    "MLAParams",
    "OutOfPagesError",
    "PageAllocator",
    "PagedKVCache",
    "SlowPlanWarning",
    "SplitPlan",
    "YarnScaling",
    "attend",
    "available_implementations",
    "cache_size",
    "cache_specs",
    "init_params",
    "load_hf",
    "load_hf_layers",
    "merge_states",
    "mla_layer",
    "naive_mla_layer",
    "online_softmax",
    "paged_mla_attention",
    "param_specs",
    "plan_decode",
    "plan_fixed",
    "plan_loads",
    "plan_splits",
    "preprocess",
    "project_output",
    "ragged_mla_attention",
    "rotate_latent",
    "save_hf",
]
