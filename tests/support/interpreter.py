"""Cheaper callbacks for Mosaic GPU's interpreter, which makes some thousand of them per launch.

JAX puts the arguments of each callback on a device; the interpreter reads them back as integers and
NumPy arrays. Without that way there and back an interpreted test takes two thirds of the time.
"""

from typing import Any

import jax
import numpy as np
from jax._src import callback as jax_callback
from jax._src.pallas import fuser
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

# JAX imports this with its first interpreted kernel. It adds an option to JAX's configuration, so
# that every program of the process is traced and compiled again: import it before the first one.
del fuser


def use_cheap_callbacks(monkeypatch: Any) -> None:
    """Gives callbacks their arguments as NumPy arrays, copied because XLA reuses their memory."""

    def io_callback(*args: Any, callback: Any, **_: Any) -> Any:
        return jax.tree.map(np.asarray, callback(*map(np.array, args)))

    def to_int(x: Any) -> Any:
        return x if isinstance(x, jax.core.Tracer) else int(x)

    monkeypatch.setattr(jax_callback, "io_callback_impl", io_callback)
    monkeypatch.setattr(shared_memory, "_to_int", to_int)
