"""Pallas kernels, which `mla_jax` loads on demand: `hopper` (H100, H200) and `blockwise`."""

from mla_jax._version import __version__ as __version__
