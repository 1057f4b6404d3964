"""What `pip install` brings, and what a process loads and needs."""

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import mla_jax
import pallas_kernels

ROOT = Path(mla_jax.__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def packages() -> set[str]:
    """The packages of the wheel: setuptools matches dotted names of folders in the same way."""
    include = SETUPTOOLS["packages"]["find"]["include"]
    tops = [path.parent for path in ROOT.glob("*/__init__.py")]  # not the environment
    paths = [path for top in tops for path in top.rglob("__init__.py")]
    names = {".".join(path.parent.relative_to(ROOT).parts) for path in paths}
    return {n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in include)}


def test_the_wheel_holds_the_library_and_its_kernels():
    assert {name.split(".")[0] for name in packages()} == {"mla_jax", "pallas_kernels"}


def test_the_wheel_leaves_nothing_out():
    patterns = ["*.py", *SETUPTOOLS["package-data"]["*"]]
    known = packages()
    for top in ("mla_jax", "pallas_kernels"):
        assert (ROOT / top / "py.typed").is_file()
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                package = ".".join(path.parent.relative_to(ROOT).parts)
                assert package in known, f"{path} is in no package"
                assert any(fnmatch.fnmatchcase(path.name, p) for p in patterns), path


def test_the_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mla_jax.__version__)
    assert pallas_kernels.__version__ == mla_jax.__version__
    assert "version" not in PYPROJECT["project"]
    module, name = SETUPTOOLS["dynamic"]["version"]["attr"].rsplit(".", 1)
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    # setuptools reads a literal without importing the package, which needs jax.
    assert f'\n{name} = "{mla_jax.__version__}"\n' in source


def test_the_library_asks_for_no_package_of_an_extra():
    """It loads where they are missing, and nobody has looked for one (but JAX for flatbuffers)."""
    extras = ("matplotlib", "rich", "scipy", "flatbuffers", "pytest", "torch", "flashinfer")
    done = run(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.split('.')[0] in {extras}:\n"
        "            name.startswith('flatbuffers') or print('asked for', name)\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import mla_jax, mla_jax.hal, pallas_kernels; print(mla_jax.__version__)"
    )
    assert done.stdout.strip() == mla_jax.__version__, done.stderr


def test_the_launcher_says_which_extra_is_missing():
    for missing in (("rich",), ("matplotlib",), ("matplotlib", "rich")):
        done = run(
            f"import runpy, sys; sys.modules.update(dict.fromkeys({missing}))\n"
            "sys.argv[1:] = ['--list']\n"
            "runpy.run_module('experiments.launch', run_name='__main__')"
        )
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"the experiments need {' and '.join(missing)}: " in line
        assert "install with pip install -e '.[experiments]'" in line
