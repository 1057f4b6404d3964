"""The parts of a layer's decode step: which kernels belong to each, and the bytes that it reads.

The library names its parts with `jax.named_scope`. XLA keeps these names in the `op_name` of each
instruction, so that the kernel that computes an instruction belongs to the innermost scope. A
fusion across two parts counts in the part of its result.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from experiments.speed.timing import Kernel

ATTENTION, APPEND, REST = "attention", "append", "everything else"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the layer.

    Attributes:
        name: in tables.
        scope: the `jax.named_scope` in the library.
        weights: the fields of `MLAParams` that it reads.
    """

    name: str
    scope: str
    weights: tuple[str, ...] = ()


PARTS = (
    Part("projections, norms, RoPE", "mla_projections",
         ("w_dq", "b_dq", "norm_q", "w_uq", "w_dkv", "b_dkv", "norm_kv")),
    Part("absorption of W_UK", "mla_absorb", ("w_uk",)),
    Part(APPEND, "mla_append"),
    Part(ATTENTION, "mla_attention"),
    Part("W_UV", "mla_w_uv", ("w_uv",)),
    Part("W_O", "mla_w_o", ("w_o", "b_o")),
)  # fmt: skip
NAMES = (*(part.name for part in PARTS), REST)
_BY_SCOPE = {part.scope: part.name for part in PARTS}
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = [^\n]*?metadata=\{[^\n}]*?op_name="(?P<op>[^"]*)"',
    re.MULTILINE,
)
_MOSAIC = re.compile(r"(?P<stem>\w+)_mosaic_gpu\w*")  # kernels of Pallas have their own names


def part_of_op(op_name: str) -> str:
    """Returns the part of the innermost scope in an `op_name`, or the rest if it has none."""
    scopes = [_BY_SCOPE[step] for step in op_name.split("/") if step in _BY_SCOPE]
    return scopes[-1] if scopes else REST


@dataclasses.dataclass(frozen=True)
class Instructions:
    """The `op_name` of each instruction of a compiled program, by the name of its kernel."""

    op_names: Mapping[str, str]

    @staticmethod
    def of(hlo: str) -> "Instructions":
        """Reads the text of a compiled program."""
        found = {}
        for match in _INSTRUCTION.finditer(hlo):
            op_name = match["op"]
            found[_kernel_name(match["name"])] = op_name
            is_mosaic = 'custom_call_target="mosaic_gpu' in match[0]
            for step in op_name.split("/") if is_mosaic else ():
                found.setdefault(f"{_kernel_name(step)}_mosaic_gpu", op_name)
        return Instructions(found)

    def op_name(self, kernel: Kernel) -> str:
        """Returns the `op_name` of what a kernel computes; empty if it is not known."""
        names = [kernel.name] if kernel.hlo is None else [kernel.hlo, kernel.name]
        for name in map(_kernel_name, names):
            if name in self.op_names:
                return self.op_names[name]
            mosaic = _MOSAIC.fullmatch(name)
            if mosaic and (key := f"{mosaic['stem']}_mosaic_gpu") in self.op_names:
                return self.op_names[key]
        return ""

    def part(self, kernel: Kernel) -> str:
        return part_of_op(self.op_name(kernel))


def _kernel_name(instruction: str) -> str:
    """Returns the name of an instruction as XLA writes it in the name of a kernel."""
    return re.sub(r"\W", "_", instruction)


def exclusive(kernels: Iterable[Kernel]) -> Iterator[tuple[Kernel, float]]:
    """Yields each kernel with the nanoseconds in which no kernel that started earlier runs.

    A kernel may start early and wait for the one before it (programmatic dependent launch). The
    time of that wait counts for the kernel that it waits for.
    """
    end = float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: (kernel.start, kernel.end)):
        yield kernel, max(0.0, kernel.end - max(kernel.start, end))
        end = max(end, kernel.end)


def busy(kernels: Iterable[Kernel]) -> float:
    """Returns the nanoseconds in which at least one kernel runs."""
    edges = sorted(edge for k in kernels for edge in ((k.start, 1), (k.end, -1)))
    running, total = 0, 0.0
    for (at, change), (until, _) in itertools.pairwise(edges):
        running += change
        total += until - at if running else 0.0
    return total


@dataclasses.dataclass(frozen=True)
class Share:
    """The GPU time of a part in microseconds, and its number of kernels, per step."""

    us: float
    kernels: float


def shares(kernels: Sequence[Kernel], hlo: str, steps: int) -> dict[str, Share]:
    """Returns the share of each part, by its name, in the kernels of so many steps."""
    instructions = Instructions.of(hlo)
    times = dict.fromkeys(NAMES, 0.0)
    counts = dict.fromkeys(NAMES, 0)
    for kernel, ns in exclusive(kernels):
        part = instructions.part(kernel)
        times[part] += ns
        counts[part] += 1
    return {name: Share(times[name] / steps / 1e3, counts[name] / steps) for name in NAMES}
