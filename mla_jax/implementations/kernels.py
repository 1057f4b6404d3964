"""Whether the package `pallas_kernels` is there.

`mla_jax` imports it inside functions of `hopper.py` and `blockwise.py` only, so that neither
package needs the other to be imported.
"""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path

_KERNELS = Path(__file__).resolve().parents[2] / "pallas_kernels"  # ours, if another shadows it


def kernels_missing(name: str) -> str | None:
    """Returns why `pallas_kernels.name` can't be imported; None where it can."""
    loaded = sys.modules.get(f"{_KERNELS.name}.{name}")
    if loaded is not None and _is_in_kernels(str(loaded.__file__)):
        return None
    package = sys.modules.get(_KERNELS.name)
    try:
        spec = importlib.util.find_spec(_KERNELS.name) if package is None else package.__spec__
    except ValueError:  # a module that was put into sys.modules without a spec
        spec = None
    places: list[str | None] = []
    if spec is not None:
        places.extend(spec.submodule_search_locations or [spec.origin])
    found = [place for place in places if place]
    if _KERNELS.is_dir() and not any(map(_is_in_kernels, found)):
        return (
            f"its package {_KERNELS.name} is shadowed by {', '.join(found) or 'another module'}, "
            f"which Python finds before {_KERNELS}: rename that one, or take the folder that it "
            "is in from the front of sys.path"
        )
    try:
        importlib.import_module(f"{_KERNELS.name}.{name}")
    except ImportError as error:
        return f"{_KERNELS.name}.{name} can't be imported: {error}"
    return None


@functools.cache
def _is_in_kernels(path: str) -> bool:
    return Path(path).resolve().is_relative_to(_KERNELS)
