"""Pallas kernels that `mla_jax` loads on demand: `hopper` on H100 and H200, `blockwise` anywhere."""

from mla_jax._version import __version__ as __version__
