"""The code blocks of a page in docs, which run in order as one program."""

import re
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Returns the line before each Python block of a Markdown text, and the block's code."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def blocks_of(name: str) -> list[tuple[int, str]]:
    """Returns `python_blocks` of a page."""
    return python_blocks((ROOT / "docs" / name).read_text(encoding="utf-8"))


def run_blocks(name: str, *, at_least: int) -> dict:
    """Runs the blocks of a page, of which there are at least so many; returns its variables."""
    blocks = blocks_of(name)
    assert len(blocks) >= at_least
    names: dict = {}
    for line, code in blocks:
        # Empty lines in front make a traceback name the line of the page.
        exec(compile("\n" * line + code, str(ROOT / "docs" / name), "exec"), names)
    return names
