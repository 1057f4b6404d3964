"""compute-sanitizer over the Hopper kernels: addresses out of bounds, races in shared memory.

Minutes a case, and several at once are slower yet. It is a program of the CUDA toolkit, which JAX
does not need, and on some virtual machines (gVisor) it refuses the device: only then is it skipped.
racecheck fails the last case, see "What is missing" in docs/hopper_decode.md.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CASES = (  # a kernel each; the last gathers small pages
    "test_hopper.py::test_heads_on_the_gpu[16]",
    "test_hopper.py::test_heads_on_the_gpu[64]",
    "test_hopper.py::test_heads_on_the_gpu[128]",
    "test_hopper_int8.py::test_heads_on_the_gpu[64-16]",
    "test_hopper_int8.py::test_heads_on_the_gpu[64-64]",
    "test_hopper.py::test_page_sizes_on_the_gpu[64-1]",
)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("case", CASES)
def test_finds_nothing(case: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer (of the CUDA toolkit)")
    done = subprocess.run(
        [
            *(sanitizer, f"--tool={tool}", "--error-exitcode=9", "--kernel-regex=kns=mla_"),
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / case)),
        ],
        # Each buffer is an allocation of its own then, and what lies past it is out of bounds.
        env=os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device or its virtual machine")
    assert "1 passed" in said, said[-3000:]
    assert done.returncode == 0, said[-3000:]
