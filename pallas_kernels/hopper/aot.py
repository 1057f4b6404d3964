"""The second gate: compile Mosaic GPU kernels for sm_90a on a machine that has no GPU.

XLA compiles for a described chip (`h200.txtpb`) as well as for an attached one; Mosaic GPU then
writes down what ptxas said of every kernel. It needs JAX's CUDA plugin and the CUDA
toolkit's ptxas and libdevice, and neither a driver nor a GPU; `unavailable` says which packages
bring them. With nvidia-cuda-nvdisasm beside them the report holds the machine code too.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

TARGET_CONFIG = pathlib.Path(__file__).with_name("h200.txtpb")
TOOLKIT_VERSION = "13.0.88"  # whose registers and spills our bounds are; a ptxas on PATH goes first


@dataclass(frozen=True)
class CompileReport:
    """What ptxas made of one kernel.

    `registers` and the spill sizes (bytes) are per thread, `shared_memory` is the bytes of a block,
    barriers included. `messages` are the remarks of ptxas that carry a code, such as
    "(C7515) Potential Performance Loss: ...".
    """

    name: str
    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    messages: tuple[str, ...]
    ptx: str = field(repr=False)
    sass: str | None = field(repr=False)

    @property
    def serialized(self) -> bool:
        """True where ptxas gave up keeping wgmma asynchronous (C7510, C7515 and their kin)."""
        return any("serialized" in message for message in self.messages)

    @property
    def ignores_setmaxnreg(self) -> bool:
        """True where ptxas ignored `set_max_registers` (C7508 and its kin)."""
        return any("setmaxnreg" in message for message in self.messages)

    @property
    def misuses_setmaxnreg(self) -> bool:
        """True where it decreases to more registers than a thread starts with, or the reverse.

        That is undefined (PTX), and nothing warns of it.
        """
        steps = re.findall(r"setmaxnreg\.(inc|dec)\.\S+\s+(\d+)", self.ptx)
        return any(
            int(count) < self.registers if way == "inc" else int(count) > self.registers
            for way, count in steps
        )


def unavailable() -> str | None:
    """Returns why this gate can't run here and what to install, or None where it can."""
    version = jax.__version__
    for module in "jax_plugins", "jax_plugins.xla_cuda13", "jax_cuda13_plugin":
        if importlib.util.find_spec(module) is None:
            return (
                f"no module {module}: pip install --no-deps "
                f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
            )
    # Without libdevice XLA ends the process; without ptxas it raises and says where it looked.
    if not any((root / "nvvm/libdevice/libdevice.10.bc").exists() for root in _cuda_roots()):
        return (
            "no CUDA toolkit: pip install --no-deps "
            f"nvidia-cuda-nvcc=={TOOLKIT_VERSION} nvidia-nvvm=={TOOLKIT_VERSION}"
        )
    return None


def compile_sm90a(function: Callable[..., Any], *args: Any) -> tuple[CompileReport, ...]:
    """Compiles `jax.jit(function)` for an H200 and reports on every Mosaic GPU kernel in it.

    Args:
        function: anything that `jax.jit` takes, already jitted functions included.
        *args: its arguments, pytrees of arrays or `jax.ShapeDtypeStruct`.

    Returns:
        One report a kernel, in the order of compilation; none for a function without kernels.

    Raises:
        RuntimeError: JAX's CUDA plugin or the CUDA toolkit is missing.
    """
    if reason := unavailable():
        raise RuntimeError(f"can't compile for sm_90a: {reason}")
    sharding = jax.sharding.SingleDeviceSharding(_h200())
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    with _mosaic_dump() as folder:
        jax.jit(function).lower(*structs).compile()
        logs = sorted(folder.glob("*.ptxas"), key=lambda log: int(log.stem.rpartition("_")[2]))
        return tuple(_read_report(log) for log in logs)


def parse_ptxas(log: str) -> dict[str, Any]:
    """Reads the verbose log of ptxas for one kernel into the fields of a CompileReport."""

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise ValueError(f"no {pattern!r} in what ptxas said:\n{log}")
        return int(found[1])

    return {
        "registers": number(r"Used (\d+) registers"),
        "stack_frame": number(r"(\d+) bytes stack frame"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "messages": tuple(
            line.partition(":")[2].strip()
            for line in log.splitlines()
            if re.search(r"\(C\d+\)", line) or "warning" in line
        ),
    }


def _cuda_roots() -> Iterator[pathlib.Path]:
    """Where XLA looks for the CUDA toolkit: named, from NVIDIA's wheels, installed."""
    if root := os.environ.get("CUDA_ROOT"):
        yield pathlib.Path(root)
    with contextlib.suppress(ModuleNotFoundError):
        wheels = importlib.util.find_spec("nvidia.cu13")
        yield from map(pathlib.Path, (wheels and wheels.submodule_search_locations) or ())
    yield from map(pathlib.Path, ("/usr/local/cuda", "/opt/cuda"))


@functools.cache
def _h200() -> jax.Device:
    jax.devices()  # the plugins register themselves when the backends start
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET_CONFIG.read_text(), topology="1x1x1"
    )
    (device,) = topology.devices
    return device


@contextlib.contextmanager
def _mosaic_dump() -> Iterator[pathlib.Path]:
    """A folder that Mosaic GPU fills with <kernel>_<n>.ptx, .ptxas, .mlir-passes.log, ..."""
    variable = "MOSAIC_GPU_DUMP_TO"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[variable] = folder
        try:
            yield pathlib.Path(folder)
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before


def _read_report(log: pathlib.Path) -> CompileReport:
    sass = log.with_suffix(".sass_ctrl")
    return CompileReport(
        name=log.stem.rpartition("_")[0],
        shared_memory=_dynamic_shared_memory(log.with_suffix(".mlir-passes.log")),
        ptx=log.with_suffix(".ptx").read_text(),
        sass=sass.read_text() if sass.exists() else None,
        **parse_ptxas(log.read_text()),
    )


def _dynamic_shared_memory(passes: pathlib.Path) -> int:
    """The bytes that the launch asks for, from the module before Mosaic's first pass."""
    constants: dict[str, int] = {}
    with passes.open() as lines:
        for line in lines:
            if found := re.search(r"(%\S+) = arith.constant (\d+) : i32", line):
                constants[found[1]] = int(found[2])
            elif found := re.search(r"dynamic_shared_memory_size (%\S+)", line):
                return constants[found[1]]
    raise ValueError(f"no gpu.launch in {passes.name}")
