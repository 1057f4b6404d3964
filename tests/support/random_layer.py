"""Random weights of a layer, to try it on."""

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.checkpoints.weights import MLAParams, param_shapes


def random_params(config, dtype=jnp.float32, seed=0):
    """Weights of unit gain, with norms and biases that aren't the neutral 1 and 0."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if shape is None:
            return None
        scale = 0.2 if len(shape) == 1 else shape[name in ("w_uk", "w_uv", "w_o")] ** -0.5
        values = rng.standard_normal(shape) * scale + name.startswith("norm")
        return jax.device_put(values.astype(jnp.dtype(dtype)))  # without a compiled program

    return MLAParams(**{name: draw(name, shape) for name, shape in param_shapes(config).items()})
