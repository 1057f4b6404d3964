"""The portable Pallas kernel that executes hal schedules."""

from pallas_kernels.blockwise.kernel import blockwise_mla

__all__ = ["blockwise_mla"]
