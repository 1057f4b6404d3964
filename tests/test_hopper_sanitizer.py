"""compute-sanitizer over the Hopper kernels: addresses out of bounds, races in shared memory.

It is a program of the CUDA toolkit, which JAX does not need. On some virtual machines (gVisor) it
refuses the device, and 2025.3 often ends with a segmentation fault of its own before it says
anything: with racecheck always on two of the kernels, else by chance, the less often with Python's
faulthandler on. It is asked three times. If no verdict is to be had, the case is skipped, but only
once the same program has been seen to be right without it.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitized.py")
ROOT = PROGRAM.parent.parent
CASES = (  # a kernel each: cache, heads, page size; the last gathers small pages
    ("float", 16, 64),
    ("float", 64, 64),
    ("float", 128, 64),
    ("int8", 16, 64),
    ("int8", 64, 64),
    ("float", 64, 1),
)
TIMES = 3


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_finds_nothing(case: tuple[str, int, int], tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer (of the CUDA toolkit)")
    program = [sys.executable, str(PROGRAM), *map(str, case)]
    options = [f"--tool={tool}", "--error-exitcode=9", "--kernel-name=kns=mla_"]
    for _ in range(TIMES):
        done = run([sanitizer, *options, "--show-backtrace=no", *program])
        said = done.stdout + done.stderr
        crashed = done.returncode == -signal.SIGSEGV and "all right" not in said
        if not crashed:
            break
    refused = "Device not supported" in said
    if refused or crashed:
        alone = run(program)
        assert "all right" in alone.stdout, alone.stderr[-3000:]
        why = "refuses this device or virtual machine" if refused else "2025.3 itself crashes here"
        pytest.skip(f"compute-sanitizer {why}; the kernel runs and is right without it")
    assert "all right" in said, said[-3000:]
    assert done.returncode == 0, said[-3000:]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            # Each buffer is an allocation of its own, and what lies past it is out of bounds.
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
            "PYTHONFAULTHANDLER": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
