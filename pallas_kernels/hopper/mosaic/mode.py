"""The switch that every group of primitives reads: the GPU, or Pallas's interpreter."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mode:
    """The base class of all groups of primitives.

    interpreting: whether the kernel runs in the interpreter on a CPU. False emits instructions.
    """

    interpreting: bool
