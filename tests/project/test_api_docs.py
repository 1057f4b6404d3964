"""The API reference builds without a warning, and public names are documented."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import mla_jax
import mla_jax.hal

pdoc_main = pytest.importorskip("pdoc.__main__")

ROOT = Path(mla_jax.__file__).parent.parent
PUBLIC = {name: getattr(mla_jax, name) for name in mla_jax.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isroutine(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{attribute}": inspect.unwrap(getattr(value, "__func__", value))
    for name, cls in CLASSES.items()
    for attribute, value in vars(cls).items()
    if not attribute.startswith("_")
    and (inspect.isfunction(value) or isinstance(value, classmethod | staticmethod))
}


def make_docs(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quick = "ARGS=--no-show-source --no-search"  # colouring the code takes most of the time
    return subprocess.run(
        ["make", "docs", f"PYTHON={sys.executable}", f"OUTPUT={folder}", quick, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_builds_without_a_warning(tmp_path, monkeypatch):
    """The command of the Makefile, in this process, which has loaded most modules already."""
    (command,) = make_docs(tmp_path, "--dry-run", "--no-print-directory").stdout.splitlines()
    python, *options, module = shlex.split(command)[:5]
    assert (python, options, module) == (sys.executable, ["-W", "error", "-m"], "pdoc")
    monkeypatch.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc_main.cli(shlex.split(command)[5:])
    page = (tmp_path / "docs" / "mla_jax.html").read_text(encoding="utf-8")
    for name in mla_jax.__all__:
        assert f'id="{name}"' in page or f"mla_jax/{name}.html" in page, name
    for page in ("index.html", "mla_jax/hal.html", "pallas_kernels/hopper.html"):
        assert (tmp_path / "docs" / page).is_file(), page


def test_a_warning_fails_the_build(tmp_path):
    """pdoc warns of a name in `__all__` that the module does not have."""
    (tmp_path / "badly.py").write_text('"""Lists a name too many."""\n\n__all__ = ["absent"]\n')
    done = make_docs(tmp_path, f"API={tmp_path / 'badly.py'}")
    assert done.returncode != 0
    assert "absent" in done.stderr


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS, *METHODS])
def test_has_a_docstring(name):
    value = (PUBLIC | METHODS)[name]
    assert value.__doc__, name
    assert not value.__doc__.startswith(f"{name}("), f"{name} has the docstring of a dataclass"


def test_modules_have_docstrings():
    modules = [value for value in PUBLIC.values() if inspect.ismodule(value)]
    for module in (mla_jax, mla_jax.hal, *modules):
        assert module.__doc__, module.__name__
    for name in mla_jax.__all__:
        assert f"`{name}`" in mla_jax.__doc__, f"the docstring of mla_jax does not list {name}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_names_each_parameter(name):
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"\b{parameter}\b", FUNCTIONS[name].__doc__), f"{name}: {parameter}"
