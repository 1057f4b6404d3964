"""compute-sanitizer over the Hopper kernels: addresses out of bounds, races in shared memory.

It is a program of the CUDA toolkit, which JAX does not need. On some virtual machines (gVisor) it
refuses the device, and 2025.3 often ends with a segmentation fault of its own before it says
anything: with racecheck always on two of the kernels, else by chance, the less often with Python's
faulthandler on. What it was looking at then goes on without end in system calls, the GPU idle. It
is asked three times. If no verdict is to be had, the case is skipped, but only once the same
program has been seen to be right without it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "sanitized.py"
ROOT = PROGRAM.parents[2]
CASES = (  # a kernel each: cache, heads, page size; the last gathers small pages
    ("float", 16, 64),
    ("float", 64, 64),
    ("float", 128, 64),
    ("int8", 16, 64),
    ("int8", 64, 64),
    ("float", 64, 1),
)
TIMES = 3
SECONDS = 120  # a case takes 7 to 30


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_finds_nothing(case: tuple[str, int, int], tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer (of the CUDA toolkit)")
    program = [sys.executable, str(PROGRAM), *map(str, case)]
    options = [f"--tool={tool}", "--error-exitcode=9", "--kernel-name=kns=mla_"]
    for _ in range(TIMES):
        status, said = run([sanitizer, *options, "--show-backtrace=no", *program])
        crashed = status == -signal.SIGSEGV and "all right" not in said
        if not crashed:
            break
    refused = "Device not supported" in said
    if refused or crashed:
        _, alone = run(program)
        assert "all right" in alone, alone[-3000:]
        why = "refuses this device or virtual machine" if refused else "2025.3 itself crashes here"
        pytest.skip(f"compute-sanitizer {why}; the kernel runs and is right without it")
    assert "all right" in said, said[-3000:]
    assert status == 0, said[-3000:]


def test_leaves_nothing_running_that_a_crash_orphaned() -> None:
    crash = (
        "import os, subprocess as s; print(s.Popen(['sleep', '60']).pid, flush=True); os.abort()"
    )
    started = time.monotonic()
    status, said = run([sys.executable, "-c", crash])
    assert status == -signal.SIGABRT

    def orphan_runs() -> bool:
        try:
            stat = Path(f"/proc/{said.split()[0]}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.split()[2] != "Z"

    while orphan_runs():  # (the signal is sent: on a busy machine it takes a moment)
        assert time.monotonic() - started < 30
        time.sleep(0.01)
    assert time.monotonic() - started < 30


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and what was said; all that was started is ended with it, or after SECONDS."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # Each buffer is an allocation of its own, and what lies past it is out of bounds.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "PYTHONFAULTHANDLER": "1",
    }
    # A file, as an orphan would keep a pipe open.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            said.write(f"\nended after {SECONDS} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return process.returncode, said.read()
