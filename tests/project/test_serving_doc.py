"""The code blocks of pages in docs run, in order, those of a page as one program."""

import re
import tempfile
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Returns the line before each Python block of a Markdown text, and the block's code."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


# Pages, and how many blocks they have at least.
PAGES = [
    ("serving.md", 15),
    ("sharding.md", 5),
    ("prefill.md", 3),
    ("gradients.md", 1),
    ("export.md", 2),
]


@pytest.mark.parametrize(("name", "least"), PAGES)
def test_the_code_blocks_run(tmp_path, monkeypatch, name, least):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the page makes its checkpoint
    page = ROOT / "docs" / name
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    assert len(blocks) >= least
    names: dict = {}
    for line, code in blocks:
        # Empty lines in front make a traceback name the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_each_form_of_sharding_is_short():
    for line, code in python_blocks((ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")):
        assert code.count("\n") <= 20, line
