"""The code blocks of docs/serving.md run, in order, as one program."""

import re
import tempfile
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PAGE = ROOT / "docs" / "serving.md"


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Returns the line before each Python block of a Markdown text, and the block's code."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def test_the_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the page makes its checkpoint
    blocks = python_blocks(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 12
    names: dict = {}
    for line, code in blocks:
        # Empty lines in front make a traceback name the line of the page.
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)
