"""Portable Pallas kernels that execute hal schedules."""

from pallas_kernels.blockwise.int8 import blockwise_mla_int8
from pallas_kernels.blockwise.kernel import blockwise_mla

__all__ = ["blockwise_mla", "blockwise_mla_int8"]
