"""The instructions that the Hopper kernels need beyond the public API of Pallas's Mosaic GPU.

Only this package imports JAX's private modules (`jax._src`) and writes inline PTX. Private modules
change without notice from one release to the next, and a kernel could then compute wrong results
instead of failing. So the package imports only with versions of JAX that the kernels are tested
with. With any other version the import raises ImportError, `mla_jax.registry` reports its text as
the reason why "hopper" is unavailable, and the other implementations still run.
"""

import jax
import jaxlib

from pallas_kernels.hopper import version

_reason = version.refuses(jax.__version__, jaxlib.__version__)
if _reason is not None:
    raise ImportError(_reason)
