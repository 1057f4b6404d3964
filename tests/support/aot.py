"""The second of three checks: compile Mosaic GPU kernels for sm_90a on a machine that has no GPU.

XLA compiles for a described chip (`h200.txtpb`) as well as for an attached one; Mosaic GPU then
prints what ptxas said of every kernel. It needs JAX's CUDA plugin and the CUDA toolkit's ptxas and
libdevice, and neither a driver nor a GPU; `unavailable` says which packages bring them.
With nvidia-cuda-nvdisasm beside them the report holds the machine code too.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import fragmented_array

TARGET_CONFIG = pathlib.Path(__file__).with_name("h200.txtpb")
TOOLKIT_VERSION = "13.0.88"  # whose registers and spills our bounds are; a ptxas on PATH goes first

# What Mosaic GPU prints of a kernel, in this order (no SASS_CTRL without nvdisasm). The host's code
# launches it with nine sizes (grid, cluster, block), then the bytes of its shared memory.
DUMPS = ("PTX", "PTXAS", "SASS_CTRL", "HOST_LLVM")
DUMPED = re.compile(
    r"(?P<ptx>.*?)(?P<ptxas>^ptxas .*?)(?P<sass>^\t\.target\t.*?)?^; ModuleID = .*?"
    r"^define i32 @(?P<name>\S+)_mosaic_gpu\(.*? call i32 @mosaic_gpu_launch_kernel\("
    r"ptr [^,]+(, i32 [^,]+){9}, i32 (?P<shared_memory>\d+),",
    re.DOTALL | re.MULTILINE,
)


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


def on_gpu_machines(*values: Any) -> Any:
    """Returns a case of a compile test that runs with the GPU tests.

    Those machines have many cores and the compiler, from the CUDA packages that JAX needs there.
    Where it is missing, `compile_sm90a` raises and names the packages.
    """
    return pytest.param(*values, marks=(pytest.mark.gpu, pytest.mark.compile))


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
        *args: its arguments, pytrees of arrays or `jax.ShapeDtypeStruct`. What JAX computes besides
            the kernels, such as a plan, is cheaper as an argument: XLA compiles it for the GPU too.

    Returns:
        One report a kernel, in the order in which XLA compiles them, which need not be the
        function's; none for a function without kernels.

    Raises:
        RuntimeError: JAX's CUDA plugin or the CUDA toolkit is missing.
    """
    if reason := unavailable():
        raise RuntimeError(f"can't compile for sm_90a: {reason}")
    sharding = jax.sharding.SingleDeviceSharding(_h200())
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    with version_of_ptxas_asked_once():
        lowered = jax.jit(function).lower(*structs)
    with _stdout_of_c() as stdout, _mosaic_dumps():
        lowered.compile()
        stdout.seek(0)
        _, *kernels = re.split(r"^(?=//\n// Generated by LLVM NVPTX)", stdout.read(), flags=re.M)
    return tuple(map(_read_report, kernels))


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
def version_of_ptxas_asked_once() -> Iterator[None]:
    """Keeps Mosaic GPU from starting ptxas for its version at each conversion of a boolean.

    A decode kernel has 660 of them, which take a third of the time of its lowering. Without JAX's
    plugin for CUDA there is nothing to keep.
    """
    library = fragmented_array.mgpu_lib
    if library is None:
        yield
        return
    asked = library._mosaic_gpu_ext
    answer = functools.cache(asked._get_ptxas_isa_version)
    once = types.SimpleNamespace(_get_ptxas_isa_version=answer)
    fragmented_array.mgpu_lib = types.SimpleNamespace(_mosaic_gpu_ext=once)
    try:
        yield
    finally:
        fragmented_array.mgpu_lib = library


@contextlib.contextmanager
def _mosaic_dumps() -> Iterator[None]:
    """Makes Mosaic GPU print `DUMPS`, and nothing else, of every kernel that it compiles.

    MOSAIC_GPU_DUMP_TO brings files, but also the IR around every pass: hundreds of MB a kernel.
    """
    prefix = "MOSAIC_GPU_DUMP_"
    before = {name: value for name, value in os.environ.items() if name.startswith(prefix)}
    ours = {prefix + dump: "1" for dump in DUMPS}
    for name in before:
        del os.environ[name]
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _stdout_of_c() -> Iterator[TextIO]:
    """A file that takes what the whole process writes to file descriptor 1, Python or not."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield file
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def _read_report(dumps: str) -> CompileReport:
    found = DUMPED.match(dumps)
    if found is None:
        raise ValueError(f"not the {DUMPS} of a kernel:\n{dumps[:2000]}")
    return CompileReport(
        name=found["name"],
        shared_memory=int(found["shared_memory"]),
        ptx=found["ptx"],
        sass=found["sass"],
        **parse_ptxas(found["ptxas"]),
    )
