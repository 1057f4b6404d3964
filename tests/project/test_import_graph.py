"""Imports go one way, and every module can be the first that a process imports."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mla_jax", "pallas_kernels", "experiments")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
# A module of mla_jax may import only what stands before it here; one that is missing is a leaf.
WITH_KERNELS = (
    "mla_jax.implementations.blockwise",
    "mla_jax.implementations.hopper",
    "mla_jax.prefill.hopper",
)
STOREYS = (
    *("problem", "implementations", "registry", "planning", "attention", "prefill", "layer"),
    *("export", "adapters"),
)


@functools.cache
def imports(module: str, *, top_level_only: bool = False) -> set[str]:
    """The modules that a module's source names in import statements."""
    found = set()
    for node, is_in_function in statements(module):
        if top_level_only and is_in_function:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{module} imports relatively"
            assert node.module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


@functools.cache
def statements(module: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """A module's import statements, each with whether it is inside a function."""
    found = []
    queue = [(ast.parse(FILES[module].read_text(encoding="utf-8")), False)]
    while queue:
        node, inside = queue.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, inside))
        inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        children = ast.iter_child_nodes(node)
        queue += [(child, inside) for child in children if not isinstance(child, ast.expr)]
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] in PACKAGES}


def storey(module: str) -> int:
    """0 for leaves; -1 for hal, which stands below them."""
    name = module.split(".")[1]
    return STOREYS.index(name) + 1 if name in STOREYS else 0


def test_mla_jax_imports_downwards():
    for module in FILES:
        if not module.startswith("mla_jax."):
            continue
        for name in ours(module):
            if name.startswith("mla_jax."):
                assert storey(name) <= storey(module), f"{module} imports {name}"
                beside = name.split(".")[1] == module.split(".")[1]  # in one folder
                assert storey(name) < storey(module) or storey(module) == 0 or beside
            elif name.startswith("pallas_kernels"):
                assert module in WITH_KERNELS, f"{module} imports {name}"
            else:
                pytest.fail(f"{module} imports {name}")


def test_only_functions_of_implementations_import_kernels():
    for module in FILES:
        top = imports(module, top_level_only=True)
        if module.startswith("mla_jax"):
            assert not any(name.startswith("pallas_kernels") for name in top), module


def test_kernels_import_leaves_by_their_own_names():
    for module in FILES:
        if module.startswith("pallas_kernels"):
            for name in ours(module):
                assert name != "mla_jax", f"{module} imports all of mla_jax"
                assert not name.startswith("experiments"), f"{module} imports {name}"
                assert not name.startswith("mla_jax.") or storey(name) == 0, f"{module}: {name}"


def test_leaves_make_no_circle():
    seen: dict[str, bool] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in seen:
            for name in ours(module) & set(FILES):
                visit(name, (*path, module))
            seen[module] = True

    for module in FILES:
        visit(module, ())


def test_matplotlib_loads_only_where_a_picture_is_drawn():
    for module in FILES:
        top = imports(module, top_level_only=True)
        assert not any(name.split(".")[0] == "matplotlib" for name in top), module


SCRIPT = """
import os, sys, traceback, warnings
import absl, importlib.resources.readers, jax, numpy, rich.live, rich.progress, rich.table
import safetensors.numpy, scipy.optimize, statistics
from jax.experimental.pallas import mosaic_gpu

def loaded():
    return {name.split(".")[0] for name in sys.modules}

import mla_jax
assert not loaded() & {"matplotlib", "pallas_kernels", "experiments"}, "mla_jax loads more"
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("error")
            __import__(module)
            assert "matplotlib" not in loaded(), "matplotlib is loaded"
            if module.startswith("mla_jax"):
                assert "pallas_kernels" not in loaded(), "pallas_kernels is loaded"
        except BaseException:
            print(module, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def first_modules() -> list[str]:
    """Modules that no other one of ours imports, and one of every folder.

    The others are imported by these, in an order without circles (the test above).
    """
    known = [module for module in FILES if not module.endswith("__main__")]
    imported = {name for module in known for name in ours(module)}
    of_folder = {module.rpartition(".")[0]: module for module in known}
    first = {module for module in known if module not in imported}
    return sorted(first | {*of_folder.values()} | {*PACKAGES})


def test_every_module_imports_first():
    """Each in a process where of ours only mla_jax is loaded; they are forks of that process.

    mla_jax loads none of the other packages, and Python imports it as a whole before any module of
    it. So a module finds the same whether mla_jax was loaded before or is loaded by it.
    """
    modules = first_modules()
    assert "experiments.launch" in modules
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *modules],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
