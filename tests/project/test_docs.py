"""The pages are true: tables are those of the results and the code, examples run, links resolve."""

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mla_jax
from experiments import launch
from experiments.framework import plotting
from experiments.framework.results import validate_result
from experiments.speed import timing
from experiments.speed.decode.runner import Runner

ROOT = next(
    folder for folder in Path(__file__).resolve().parents if (folder / "Makefile").is_file()
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
UNTRACKED = {".venv", "out"}  # where there is no git: folders that the Makefile makes


@pytest.fixture(scope="module")
def tables():
    """tools/tables.py, which is a script."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def pages() -> list[Path]:
    """Every tracked page."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "*.md"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in names.split("\0") if name]
    found = (path for path in ROOT.rglob("*.md") if not path.name.startswith("."))
    return [path for path in found if not UNTRACKED & set(path.relative_to(ROOT).parts)]


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "``", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        same = [f"{anchor}{suffix}" for suffix in ("", *(f"-{i}" for i in range(1, 100)))]
        found.add(next(name for name in same if name not in found))
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1600


def test_tables_are_those_of_the_results_and_of_the_code(tables, monkeypatch, capsys):
    script = str(ROOT / "tools" / "tables.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0, f"run python tools/tables.py\n{capsys.readouterr().err}"


def test_tables_have_pages(tables):
    marker = re.compile(r"<!-- (\w+):begin -->")
    for page in pages():
        found = marker.findall(page.read_text(encoding="utf-8"))
        assert found == list(tables.PAGES.get(page.relative_to(ROOT).as_posix(), {})), page


def test_results_are_of_the_schema_and_passed():
    results = ROOT / "benchmarks" / "results"
    paths = [*results.glob("*.json"), *results.glob("parity/*.json")]
    paths += (ROOT / "benchmarks").glob("h?00/*/result.json")
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        validate_result(result)
        assert result["passed"], path


def test_the_examples_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # they need no checkout
    layer, simulator = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(layer.strip().splitlines()) <= 14
    assert len(simulator.strip().splitlines()) <= 5
    exec(compile(layer, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 1e-5
    exec(compile(simulator, "README.md", "exec"), {})
    seconds = float(capsys.readouterr().out)
    assert f"# {1e6 * seconds:.0f} µs;" in simulator


def test_names_of_the_api_exist():
    section = README.partition("\n## API\n")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    assert len(names) > 10
    assert not set(names) - set(mla_jax.__all__)


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    assert not broken_links(page)


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading: `code`, again\n# A heading: code, again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-heading-code-again) [c](other.md#a-heading-code-again-1) "
        "[d](https://example.org/none) `[e](none.md)` [f](none.md) [g](other.md#none) [h](#none)"
    )
    assert broken_links(page) == ["none.md", "other.md#none", "#none"]


class TestSupport:
    """The support matrix is what `available_implementations` and `refuses` say."""

    def cells(self):
        block = README.partition("<!-- support:begin -->")[2].partition("<!-- support:end -->")[0]
        rows = [line.strip("| ").split(" | ") for line in block.strip().splitlines()]
        return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]

    def test_every_implementation_has_a_row(self):
        named = {
            name for row in self.cells() for name in re.findall(r"`(\w+)`", row["implementation"])
        }
        assert named == set(mla_jax.available_implementations())

    def test_rows_are_what_calls_do(self, tables):
        """A probe of each implementation and page size: a call that it takes, or refuses."""
        support = sys.modules["tables_support"]
        for row in self.cells():
            for name in re.findall(r"`(\w+)`", row["implementation"]):
                for size in support.PAGE_SIZES:
                    dtype = "int8" if row["cache dtype"].startswith("int8") else "bfloat16"
                    options = {"dtype": dtype, "page_size": size}
                    options |= {"granularity": "token"} if dtype == "int8" else {}
                    reason = support.IMPLEMENTATIONS[name].refuses(support.problem(**options))
                    listed = str(size) in row["page sizes"].split(", ")
                    assert (reason is None) == listed, (name, size, reason)

    def test_changes_with_the_code(self, tables, monkeypatch):
        from pallas_kernels.hopper import planning

        support = sys.modules["tables_support"]
        before = support.support(ROOT)
        assert before in README
        monkeypatch.setattr(planning, "PAGE_SIZES", {"float": (16,), "int8": (64,)})
        after = support.support(ROOT)
        assert "| as the cache | 16 | ND | any |" in after
        assert after != before

    def test_only_products_make_a_row(self, tables):
        """What is refused for one pair of page size and layout can't be shown, and is an error."""
        support = sys.modules["tables_support"]

        def refuses(problem):
            refused = problem.cache.layout == "NZ" and problem.cache.page_size == 16
            return "no" if refused else None

        one = support.Implementation("mine", lambda problem: None, refuses)
        with pytest.raises(ValueError, match="mine takes no product"):
            support.takes(one, {"dtype": "float32"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A benchmark as it writes itself, of times that nobody has measured."""

    def time_nothing(self, pool, tasks, *_):
        for i, (row, who) in enumerate(tasks):
            self.journal.add(row, who.name, "measured", us=100.0 + i, error=1e-3)

    folder = tmp_path_factory.mktemp("out")
    rates = {"copy": 4000.0, "read": 4000.0, "matmul": 700.0, "matmul_int8": 1400.0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(timing, "ceilings", lambda **_: rates)
        monkeypatch.setattr(Runner, "_run_pool", time_nothing)
        monkeypatch.setattr(plotting, "_write", lambda picture, path, dpi: path.write_bytes(b"PNG"))
        status = launch.main([
            "launch", "--experiment=benchmark", f"--output_dir={folder}", "--preset=bars",
            "--heads=16", "--batch=1", "--kv_len=1024", "--implementations=xla,jnp",
        ])  # fmt: skip
    assert status == 0
    return folder / "benchmark"


class TestTakingABenchmark:
    """A small one is made here on the CPU, and taken into a copy of the pages and results."""

    @pytest.fixture
    def copy(self, tables, tmp_path):
        """The folder of the copy."""
        root = tmp_path / "copy"
        for folder in ("benchmarks", "mla_jax/hal/profiles"):
            shutil.copytree(ROOT / folder, root / folder)
        for name in (*tables.PAGES, tables.speed_picture.PATH):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        return root

    def test_is_one_command(self, tables, copy, folder, monkeypatch, capsys):
        monkeypatch.setitem(tables.CARDS, "h200", "cpu")
        target = copy / "benchmarks" / "h200" / "benchmark"
        (target / "old.csv").write_text("an earlier run's")
        assert tables.main([f"--take={folder}"], copy) == 0
        taken = {path.name for path in target.iterdir()}
        assert taken >= {"result.json", "benchmark.csv", "roofline.png"}
        assert not taken & {"old.csv", "rows.jsonl"}
        page = copy / "benchmarks" / "README.md"
        text = page.read_text()
        row = "| 16 heads, one x below 8192 | jnp | 1 | "
        other = "| 16 heads, one x below 8192 | xla | 1 | "
        assert row in text or other in text
        assert "(h200/benchmark/roofline.png)" in text
        assert tables.main(["--check"], copy) == 0
        page.write_text(text.replace("| 16 heads, one x below 8192 |", "| 16 heads |"))
        assert tables.main(["--check"], copy) == 1
        assert "out of date: benchmarks/README.md" in capsys.readouterr().err

    def test_refuses_what_is_of_another_device_or_none(
        self, tables, copy, folder, tmp_path, capsys
    ):
        assert tables.main([f"--take={folder}"], copy) == 2
        assert "80GB HBM3 or NVIDIA H200, got ['cpu']" in capsys.readouterr().err
        assert tables.main([f"--take={tmp_path}"], copy) == 2
        assert "is no result of a benchmark" in capsys.readouterr().err
        for name in (
            *tables.PAGES,
            *(f"benchmarks/{c}/benchmark/result.json" for c in tables.CARDS),
        ):
            assert (copy / name).read_bytes() == (ROOT / name).read_bytes()

    def test_a_picture_of_other_rows_is_out_of_date(self, tables, copy, capsys):
        path = copy / "benchmarks" / "measured" / "h200_decode.json"
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if row["variant"] == "hopper":
                row["us_separated"] *= 2
        path.write_text(json.dumps(result))
        assert tables.main(["--check"], copy) == 1
        assert "out of date: docs/images/h200_decode.svg" in capsys.readouterr().err
