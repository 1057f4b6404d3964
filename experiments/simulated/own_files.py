"""A schedule or a kernel in a Python file of one's own, for `--schedule=FILE.py`.

The file defines `kernel`, or `schedule` alone:
- `kernel`: an `AscendKernel`, a `Kernel`, or a function from a profile to one, as `gpu_kernel`
  returns.
- `schedule`: an `AscendOrder`, or on a GPU a function from a number of KV blocks to a `Schedule`.
  It runs in the kernel "flashmla_dense".
"""

import contextlib
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_jax.hal import AscendKernel, AscendOrder, HardwareProfile, Kernel, gpu_kernel
from mla_jax.hal.simulator.simulate import named_kernel

_WANTED = (
    "a Kernel, an AscendKernel, a function from a profile to one (gpu_kernel makes one), "
    "or an AscendOrder"
)


def is_file(name: str) -> bool:
    """Returns whether a value of --schedule is the name of a file, and of no kernel."""
    return name.endswith(".py")


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Makes an error of a user's file a ValueError that names the file, and the line if it has one.

    name: a value of --schedule; errors of a kernel's name pass as they are.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if not is_file(name):
            raise
        path = Path(name)
        where = path.name
        if isinstance(error, SyntaxError) and error.filename == str(path):
            raise ValueError(f"{where}, line {error.lineno}: {error.msg}") from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if f.filename == str(path)]  # fmt: skip
        if str(error).startswith(where):  # it is named already
            raise
        if lines:
            where += f", line {lines[-1]}"
        if isinstance(error, OSError) and not lines:
            raise ValueError(f"{where}: {error.strerror}") from error
        kind = "" if isinstance(error, ValueError) and str(error) else type(error).__name__
        raise ValueError(": ".join(filter(None, (where, kind, str(error))))) from error


def load_kernel(profile: HardwareProfile, name: str, kv_dtype: str) -> Kernel | AscendKernel:
    """Returns the kernel of a value of --schedule: a file, or the name of a kernel or an order.

    Raises ValueError that names the file and what is wrong with it.
    """
    if not is_file(name):
        return named_kernel(profile, name, kv_dtype)
    with errors_of(name):
        found = runpy.run_path(name)
        if "kernel" not in found and "schedule" not in found:
            raise ValueError("it defines neither kernel nor schedule")
        part = "kernel" if "kernel" in found else "schedule"
        value: Any = found[part]
        if part == "schedule" and callable(value) and not isinstance(value, AscendOrder):
            if profile.family != "nvidia":
                raise ValueError(f"schedule must be an AscendOrder on {profile.name}")
            value = gpu_kernel(value)
        if callable(value) and not isinstance(value, AscendOrder):
            value = value(profile)
        if isinstance(value, AscendOrder):
            value = AscendKernel(value.name, value, kv_dtype)
        if not isinstance(value, Kernel | AscendKernel):
            raise ValueError(f"{part} must be {_WANTED}, got {value!r:.60}")
        return value


def name_of(name: str, kernel: str) -> str:
    """Returns how to call what a value of --schedule names: the kernel of a file has a name."""
    return kernel if is_file(name) else name
